# SPDX-License-Identifier: Apache-2.0
"""Sampling: diffusion models by a solver of `scm_core.solvers`, consistency models in one or more steps (paper §5.2, App. B).

A sampler calls `net(x_t/σ_d, t)` with t of shape (B,); bind labels and guidance first (`Guided`). NFE counts the network's forward passes,
a guided one as two.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from scm_core.guidance import guided
from scm_core.solvers import (
    SOLVERS,
    Net,
    ddim,
    diffusion_nfe,
    dpm2m,
    dpmpp2m,
    heun,
    segment_times,
    sigma_grid,
    time_grid,
)
from scm_core.trigflow import consistency_function
from scm_core.validate import check_descending, check_dtype, check_labels, check_like, check_positive, check_sample

__all__ = [
    "SOLVERS",
    "Guided",
    "Net",
    "ddim",
    "diffusion_nfe",
    "dpm2m",
    "dpmpp2m",
    "heun",
    "sample_consistency",
    "sample_diffusion",
    "sample_multistep",
    "segment_times",
    "sigma_grid",
    "time_grid",
]


@torch.no_grad()
def sample_diffusion(net: Net, z: Tensor, steps: int, sigma_data: float, solver: str = "heun") -> Tensor:
    """x0 from noise z ~ N(0, σ_d² I) of shape (B, …), with `steps` steps on EDM's grid from t_max = arctan(80/σ_d) to 0.

    Raises ValueError for an unknown solver, steps < 1, sigma_data ≤ 0, z that is not a batch in float32 or float64, or F of another shape.
    """
    diffusion_nfe(solver, steps, guidance=False)
    check_sample("z", z)
    times = time_grid(steps, sigma_data)
    return SOLVERS[solver](net, math.sin(times[0]) * z, times, sigma_data)


@torch.no_grad()
def sample_consistency(
    net: Net,
    z: Tensor,
    times: Sequence[float] | Tensor,
    sigma_data: float,
    generator: torch.Generator | None = None,
    noise: Sequence[Tensor] | Tensor = (),
) -> Tensor:
    """x0 from noise z ~ N(0, σ_d² I) of shape (B, …) by consistency sampling at descending `times` (§5.2): one step for each.

    Starts at x = sin(t_max) z and at each further time t re-noises, x_t = cos(t) x̂0 + sin(t) z', with z' from `noise` (one tensor for each
    further time, or all of them in one) or drawn with `generator`; without either, with torch's default generator, which the caller then
    has to seed. Times are in radians, in a sequence or a tensor of shape (steps,).

    Raises ValueError for times that do not descend within (0, π/2], sigma_data ≤ 0, z that is not a batch in float32 or float64, noise
    unlike z, or F of another shape.
    """
    if isinstance(times, Tensor) and times.ndim != 1:
        raise ValueError(f"times: expected shape (steps,), got {tuple(times.shape)}")
    steps, given = [float(t) for t in times], tuple(noise)
    check_descending("times", steps)
    check_sample("z", z)
    check_positive("sigma_data", sigma_data)
    if given and len(given) != len(steps) - 1:
        raise ValueError(
            f"noise: expected {len(steps) - 1} tensors, one for each time after the first, got {len(given)}"
        )
    for i, fresh in enumerate(given):
        check_like(f"noise[{i}]", fresh, z, "z")
        check_dtype(f"noise[{i}]", fresh, z, "z")
    x = math.sin(steps[0]) * z
    for i, t in enumerate(steps):
        if i:
            fresh = (
                given[i - 1]
                if given
                else sigma_data * torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            )
            x = math.cos(t) * x + math.sin(t) * fresh
        tb = x.new_full((x.shape[0],), t)
        x = consistency_function(net(x / sigma_data, tb), x, tb, sigma_data)
    return x


@torch.no_grad()
def sample_multistep(net: Net, z: Tensor, segments: int, sigma_data: float) -> Tensor:
    """x0 from noise z ~ N(0, σ_d² I) of shape (B, …) by a multistep consistency model (Heek et al. 2024): one step for each segment.

    From each boundary t of `segment_times` to the next, s: x_s = f_s(x_t, t) = cos(t−s) x_t − sin(t−s) σ_d F(x_t/σ_d, t), without fresh
    noise. One segment is one-step consistency sampling. Raises ValueError for segments < 1, sigma_data ≤ 0, or z that is not a batch in
    float32 or float64.
    """
    check_sample("z", z)
    times = segment_times(segments, sigma_data)
    x = math.sin(times[0]) * z
    for t, s in pairwise(times):
        tb, sb = x.new_full((x.shape[0],), t), x.new_full((x.shape[0],), s)
        x = consistency_function(net(x / sigma_data, tb), x, tb - sb, sigma_data)
    return x


class Guided:
    """A network with labels and guidance bound, F(x, t), that counts its forward passes in `nfe`.

    `student`: the scale is an input of the network (one pass); else it is classifier-free guidance (two passes unless s = 1, which is
    the conditional network itself). `guidance=None` asks for the plain conditional network. Labels are int64 of shape (B,), −1 for none.

    Raises ValueError for labels that the network (by its attribute `labels`) does not have, classifier-free guidance without labels, a
    scale that is no finite number, a student without a guidance input; and, when called, for a batch of another size than the labels.
    """

    def __init__(
        self, net: Callable[..., Tensor], labels: Tensor | None, guidance: float | None = None, student: bool = False
    ) -> None:
        self.nfe = 0
        self.passes = 1
        self.labels = labels
        if labels is not None:
            _check_bound_labels(net, labels)
        if guidance is not None and not math.isfinite(guidance):
            raise ValueError(f"guidance: expected a finite scale or None, got {guidance}")
        self.call: Net = partial(net, labels=labels)
        if guidance is None:
            pass
        elif student:
            if not getattr(net, "guidance_input", True):  # networks that say so; others may refuse when called
                raise ValueError(
                    f"guidance: expected None, as the network was built without a guidance input, got {guidance}"
                )
            self.call = lambda x, t: net(x, t, labels, x.new_full((x.shape[0],), guidance))
        elif guidance != 1.0:
            if labels is None:
                raise ValueError("guidance: classifier-free guidance needs labels, got labels=None")
            self.call = lambda x, t: guided(net, x, t, labels, guidance)
            self.passes = 2

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.labels is not None:
            check_like("labels", self.labels, t, "t")
        self.nfe += self.passes
        return self.call(x, t)


def _check_bound_labels(net: Callable[..., Tensor], labels: Tensor) -> None:
    if labels.ndim != 1:
        raise ValueError(f"labels: expected shape (B,), got {tuple(labels.shape)}")
    count = getattr(net, "labels", None)  # a foreign network need not say how many classes it has
    if count == 0:
        raise ValueError(f"labels: expected None, as the network is unconditional, got {len(labels)} labels")
    if isinstance(count, int):
        check_labels(labels, count)
