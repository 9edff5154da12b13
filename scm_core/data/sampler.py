# SPDX-License-Identifier: Apache-2.0
"""The order in which training sees the data: a function of (seed, step), so that resuming needs nothing but the step."""

from __future__ import annotations

import torch
from torch import Tensor

from scm_core.seeds import generator_for


class BatchOrder:
    """Indices of training step k over `n` items, `batch` at a time.

    Image number i = k·batch + j is entry i mod n of the permutation of epoch ⌊i/n⌋: every item comes once per epoch,
    and a batch may straddle two epochs. An epoch's permutation depends on (seed, epoch) only, and nothing here changes
    with use: the kept permutation is a cache. `ValueError` if n or batch < 1.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"BatchOrder: n must be ≥ 1, got {n}")
        if batch < 1:
            raise ValueError(f"BatchOrder: batch must be ≥ 1, got {batch}")
        self.n, self.batch, self.seed = n, batch, seed
        self._kept: tuple[int, Tensor] | None = None

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of epoch ≥ 0: a permutation of 0…n−1, int64."""
        if epoch < 0:
            raise ValueError(f"BatchOrder: epoch must be ≥ 0, got {epoch}")
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, torch.randperm(self.n, generator=generator_for("batch order", self.seed, epoch))
        return self._kept[1]

    def indices(self, step: int) -> Tensor:
        """Return the `batch` item indices of step ≥ 0 (the first step is 0), int64 of shape (batch,)."""
        if step < 0:
            raise ValueError(f"BatchOrder: step must be ≥ 0, got {step}")
        parts, position, left = [], self.images_seen(step), self.batch
        while left:
            epoch, offset = divmod(position, self.n)
            part = self.permutation(epoch)[offset : offset + left]
            parts.append(part)
            position, left = position + len(part), left - len(part)
        return torch.cat(parts)

    def images_seen(self, step: int) -> int:
        """Return how many images came before step (counted from 0), the paper's nimg."""
        return step * self.batch
