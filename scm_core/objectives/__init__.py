# SPDX-License-Identifier: Apache-2.0
"""Training objectives: one file for each method; each is a callable of a batch that gives a loss and what to log.

`scm_core.objectives.methods` lists the students' methods by name.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """Clean data x0 (B, C, H, W), scaled to sigma_data, labels (B,) int64 or None, and the indices (B,) of its samples."""

    x0: Tensor
    labels: Tensor | None
    indices: Tensor


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
    """A network that is trained beside the student: itself, its weighting heads, and its objective."""

    net: nn.Module
    heads: Mapping[str, nn.Module]
    objective: Objective


class Method(NamedTuple):
    """What a method trains the student with: the objective, the student's weighting heads, and further networks by name."""

    objective: Objective
    heads: Mapping[str, nn.Module]
    companions: Mapping[str, Companion]


def adaptive_weighting(squared_error: Tensor, logvar: Tensor | None) -> Tensor:
    """mean over the batch of e^{w(t)} · error − w(t) (App. D); both of shape (B,), error already divided by D.

    `logvar=None`: without adaptive weighting, the mean of the error (Figure 5b).
    """
    if logvar is None:
        return squared_error.mean()
    return (torch.exp(logvar) * squared_error - logvar).mean()


def mean_square(x: Tensor) -> Tensor:
    """‖x‖²/D per sample, in float32 at least: (B, …) → (B,)."""
    return x.float().square().flatten(1).mean(dim=1) if x.dtype != torch.float64 else x.square().flatten(1).mean(dim=1)


def check_positive(name: str, value: float) -> None:
    """ValueError unless an option is a finite number > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
