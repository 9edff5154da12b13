# SPDX-License-Identifier: Apache-2.0
"""Samplers: the teacher's ODE solvers and consistency sampling (paper §5.2, App. B). All exact in TrigFlow variables.

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
from scm_core.trigflow import SIGMA_MAX, SIGMA_MIN, consistency_function, t_max

Net = Callable[[Tensor, Tensor], Tensor]


def sigma_grid(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0) -> list[float]:
    """EDM's noise levels σ_i = (σ_max^{1/ρ} + i/(n−1) (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, i = 0 … n−1, descending (EDM, Eq. 5)."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if steps == 1:
        return [sigma_max]
    a, b = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(a + i / (steps - 1) * (b - a)) ** rho for i in range(steps)]


def time_grid(steps: int, sigma_data: float) -> list[float]:
    """The times of a diffusion sampler, t_i = arctan(σ_i/σ_d), then 0: steps + 1 numbers, descending, in radians."""
    return [math.atan(sigma / sigma_data) for sigma in sigma_grid(steps)] + [0.0]


def segment_times(segments: int, sigma_data: float) -> list[float]:
    """The boundaries of `segments` equal pieces of [0, t_max]: segments + 1 times in radians, from t_max down to exactly 0.

    A multistep consistency model leads from anywhere within a piece to its lower boundary (Heek et al. 2024). Raises ValueError for
    segments < 1.
    """
    if segments < 1:
        raise ValueError(f"segments: expected at least 1, got {segments}")
    return [t_max(sigma_data) * ((segments - i) / segments) for i in range(segments + 1)]


def _evaluate(net: Net, x_t: Tensor, t: float, sigma_data: float) -> Tensor:
    """σ_d F(x_t/σ_d, t) = dx_t/dt."""
    return sigma_data * net(x_t / sigma_data, x_t.new_full((x_t.shape[0],), t))


def _rotate(x_s: Tensor, v_s: Tensor, s: float, t: float) -> Tensor:
    """The DDIM step s → t: x_t = cos(s−t) x_s − sin(s−t) v_s (App. B); v_s = σ_d F."""
    return math.cos(s - t) * x_s - math.sin(s - t) * v_s


def _noise(x_s: Tensor, v_s: Tensor, s: float) -> Tensor:
    """ε = sin(s) x_s + cos(s) v_s."""
    return math.sin(s) * x_s + math.cos(s) * v_s


def ddim(net: Net, x: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """First-order solver; NFE = number of steps."""
    for s, t in pairwise(times):
        x = _rotate(x, _evaluate(net, x, s, sigma_data), s, t)
    return x


def heun(net: Net, x: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """EDM's second-order sampler = DPM-Solver-2S with Heun's intermediate step (App. B.4); NFE = 2·steps − 1.

    In EDM's variables x_σ = x_t / cos t the slope is dx_σ/dσ = ε/σ_d with ε the predicted noise: a DDIM step from s to t holds
    ε fixed, Heun's step averages it over the two ends.
    """
    for s, t in pairwise(times):
        v_s = _evaluate(net, x, s, sigma_data)
        euler = _rotate(x, v_s, s, t)
        if t > 0:
            eps_s = _noise(x, v_s, s)
            eps_t = _noise(euler, _evaluate(net, euler, t, sigma_data), t)
            # x_t/cos t = x_s/cos s + (tan t − tan s) ε̄ ; the difference to the Euler step is in ε̄ − ε_s alone
            x = euler + (math.cos(t) * (math.tan(t) - math.tan(s)) / 2) * (eps_t - eps_s)
        else:
            x = euler
    return x


SOLVERS: dict[str, Callable[[Net, Tensor, Sequence[float], float], Tensor]] = {"heun": heun, "ddim": ddim}


def diffusion_nfe(solver: str, steps: int, guidance: bool) -> int:
    """Forward passes for one sample: steps (DDIM) or 2·steps − 1 (Heun), twice that with guidance."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    return (2 * steps - 1 if solver == "heun" else steps) * (2 if guidance else 1)


@torch.no_grad()
def sample_diffusion(net: Net, z: Tensor, steps: int, sigma_data: float, solver: str = "heun") -> Tensor:
    """x0 from noise z ~ N(0, σ_d² I) of shape (B, …), with `steps` steps on EDM's grid from t_max = arctan(80/σ_d) to 0.

    Raises ValueError for an unknown solver or steps < 1.
    """
    diffusion_nfe(solver, steps, guidance=False)
    times = time_grid(steps, sigma_data)
    return SOLVERS[solver](net, math.sin(times[0]) * z, times, sigma_data)


@torch.no_grad()
def sample_consistency(
    net: Net,
    z: Tensor,
    times: Sequence[float],
    sigma_data: float,
    generator: torch.Generator | None = None,
    noise: Sequence[Tensor] = (),
) -> Tensor:
    """x0 from noise z ~ N(0, σ_d² I) of shape (B, …) by consistency sampling at descending `times` (§5.2): one step for each.

    Starts at x = sin(t_max) z and at each further time t re-noises, x_t = cos(t) x̂0 + sin(t) z', with z' from `noise` (one tensor for each
    further time) or drawn with `generator`. Raises ValueError for times that do not descend within (0, π/2].
    """
    if not times or not all(0 < b < a for a, b in pairwise(times)) or not 0 < times[0] <= math.pi / 2:
        raise ValueError(f"times: expected descending numbers in (0, π/2], got {tuple(times)}")
    if noise and len(noise) != len(times) - 1:
        raise ValueError(
            f"noise: expected {len(times) - 1} tensors, one for each time after the first, got {len(noise)}"
        )
    x = math.sin(times[0]) * z
    for i, t in enumerate(times):
        if i:
            fresh = (
                noise[i - 1]
                if noise
                else sigma_data * torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            )
            x = math.cos(t) * x + math.sin(t) * fresh
        tb = x.new_full((x.shape[0],), t)
        x = consistency_function(net(x / sigma_data, tb), x, tb, sigma_data)
    return x


class Guided:
    """A network with labels and guidance bound, F(x, t), that counts its forward passes in `nfe`.

    `student`: the scale is an input of the network (one pass); else it is classifier-free guidance (two passes unless s = 1, which is
    the conditional network itself). `guidance=None` asks for the plain conditional network.
    """

    def __init__(
        self, net: Callable[..., Tensor], labels: Tensor | None, guidance: float | None = None, student: bool = False
    ) -> None:
        self.nfe = 0
        self.passes = 1
        self.call: Net = partial(net, labels=labels)
        if guidance is None:
            pass
        elif student:
            self.call = lambda x, t: net(x, t, labels, x.new_full((x.shape[0],), guidance))
        elif guidance != 1.0:
            if labels is None:
                raise ValueError("guidance: classifier-free guidance needs labels, got labels=None")
            self.call = lambda x, t: guided(net, x, t, labels, guidance)
            self.passes = 2

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += self.passes
        return self.call(x, t)
