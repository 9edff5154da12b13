# SPDX-License-Identifier: Apache-2.0
"""Training objectives: one file for each method; each is a callable of a batch that gives a loss and what to log.

`scm_core.objectives.methods` lists the students' methods by name.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from scm_core.seeds import normal
from scm_core.validate import check_finite, check_like, check_positive, check_sample


class Batch(NamedTuple):
    """Clean data x0 (B, C, H, W), scaled to sigma_data, labels (B,) int64 or None, and the indices (B,) of its samples."""

    x0: Tensor
    labels: Tensor | None
    indices: Tensor

    def part(self, start: int, count: int) -> "Batch":
        """Its samples from number `start` on, `count` of them."""
        if count == len(self.x0):
            return self
        at = slice(start, start + count)
        return Batch(self.x0[at], None if self.labels is None else self.labels[at], self.indices[at])


class Terms(NamedTuple):
    """The scalar loss to differentiate and the scalars to log (detached, zero-dimensional); for the description of a step that went wrong,
    the samples' times t and their own contributions to the loss (detached, (B,)), where the objective has them.
    """

    loss: Tensor
    scalars: dict[str, Tensor]
    t: Tensor | None = None
    error: Tensor | None = None


class Objective(Protocol):
    """Gives the loss of a batch at an iteration; all randomness of a step, dropout aside, comes from `generator`."""

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms: ...


class Companion(NamedTuple):
    """A network that is trained beside the student: itself, its weighting heads, its objective, its learning rate (None: the student's)."""

    net: nn.Module
    heads: Mapping[str, nn.Module]
    objective: Objective
    lr: float | None = None


class Method(NamedTuple):
    """What a method trains the student with: the objective, the student's weighting heads, and further networks by name."""

    objective: Objective
    heads: Mapping[str, nn.Module]
    companions: Mapping[str, Companion]


def weighted(squared_error: Tensor, logvar: Tensor | None) -> Tensor:
    """e^{w(t)} · error − w(t) of each sample (App. D), or the error as it is (`logvar=None`); all of shape (B,), the error divided by D.

    Raises ValueError for a weight of another shape or device than the error.
    """
    if logvar is None:
        return squared_error
    check_like("logvar", logvar, squared_error, "squared_error")
    return torch.exp(logvar) * squared_error - logvar


def adaptive_weighting(squared_error: Tensor, logvar: Tensor | None) -> Tensor:
    """The mean of `weighted` over the batch; without adaptive weighting (`logvar=None`, Figure 5b) the mean of the error."""
    return weighted(squared_error, logvar).mean()


def mean_square(x: Tensor) -> Tensor:
    """‖x‖²/D per sample, in float32 at least: (B, …) → (B,)."""
    return x.float().square().flatten(1).mean(dim=1) if x.dtype != torch.float64 else x.square().flatten(1).mean(dim=1)


def noise_like(x0: Tensor, sigma_data: float, generator: torch.Generator) -> Tensor:
    """z ~ N(0, σ_d² I) of the shape and type of x0 (B, …), on the generator's device; ValueError unless x0 is in float32 or float64."""
    check_sample("x0", x0)
    return normal(generator, *x0.shape, dtype=x0.dtype) * sigma_data


def check_proposal(P_mean: float, P_std: float, prefix: str = "") -> None:
    """ValueError unless P_mean is finite and P_std > 0, the mean and standard deviation of ln σ; their names begin with `prefix`."""
    check_finite(f"{prefix}P_mean", P_mean)
    check_positive(f"{prefix}P_std", P_std)
