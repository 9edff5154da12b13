# SPDX-License-Identifier: Apache-2.0
"""Training objectives: one file for each method; each is a callable of a batch that gives a loss and what to log."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Clean data x0 (B, C, H, W), scaled to sigma_data, labels (B,) int64 or None, and the indices (B,) of its samples."""

    x0: Tensor
    labels: Tensor | None
    indices: Tensor


class Terms(NamedTuple):
    """The scalar loss to differentiate and the scalars to log (detached, zero-dimensional)."""

    loss: Tensor
    scalars: dict[str, Tensor]


def adaptive_weighting(squared_error: Tensor, logvar: Tensor) -> Tensor:
    """mean over the batch of e^{w(t)} · error − w(t) (App. D); both of shape (B,), error already divided by D."""
    return (torch.exp(logvar) * squared_error - logvar).mean()


def mean_square(x: Tensor) -> Tensor:
    """‖x‖²/D per sample, in float32 at least: (B, …) → (B,)."""
    return x.float().square().flatten(1).mean(dim=1) if x.dtype != torch.float64 else x.square().flatten(1).mean(dim=1)
