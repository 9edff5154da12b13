# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours, and who lies in whose ball: bounds from blocks of products, what they leave open in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scm_core.evaluate.pairs import Block, distances_to_all, squared_distances
from scm_core.evaluate.points import Points
from scm_core.evaluate.products import Products

SPARE = 8  # neighbours kept beside those asked for: bounds do not order distances that differ by less than their error
GROUP = 16
ALL_ELEMENTS = 2**22  # distances of few features to all others, in float64, at a time


class Nearest:
    """The squared distances of each feature of a set to its `count` nearest others."""

    def __init__(self, points: Points, count: int) -> None:
        if points.count <= count:
            raise ValueError(f"{count} nearest neighbours need more than k = {count} samples, got {points.count}")
        self.points, self.count = points, count
        self.products: Products | None = None  # how the blocks' were taken
        self.keep = min(count + SPARE, points.count - 1)
        device = points.features.device
        self.bounds = torch.full((points.count, self.keep), torch.inf, dtype=torch.float64, device=device)
        self.index = torch.full((points.count, self.keep), -1, device=device)

    def add(self, block: Block) -> None:
        """Take the pairs of a block of the set with itself, in both directions."""
        self.products, lower = block.products, block.lower()
        if block.diagonal:
            lower.fill_diagonal_(torch.inf)
        else:
            self._update(block.columns, lower.T.contiguous(), block.rows.start)
        self._update(block.rows, lower, block.columns.start)

    def _update(self, rows: slice, lower: Tensor, first: int) -> None:
        values, index = smallest(lower, self.keep)
        values = torch.cat([self.bounds[rows], values], dim=1)
        index = torch.cat([self.index[rows], index + first], dim=1)
        self.bounds[rows], chosen = values.topk(self.keep, largest=False)
        self.index[rows] = index.gather(1, chosen)

    def result(self, groups: Sequence[slice] = ()) -> tuple[Tensor, Tensor]:
        """Return the squared distances (N, count), ascending, as float64 finds them from the differences, and those (N, G) to
        the count-th nearest without each of the groups: −∞ for the features of the group itself.

        Of the kept, those whose lower bound is within the upper bound of the count-th are computed. They hold the
        nearest if the farthest of these is within the lower bounds of all that were not kept; else (many equal
        distances, or many neighbours of one group) every distance of that feature is computed.
        """
        assert self.products is not None
        points, bounds, scale, slack = self.points, self.bounds, self.products.scale, self.products.slack[0]
        upper = bounds + 2 * (slack[:, None] + slack[self.index])
        limit = upper[:, : self.count].amax(dim=1)
        for group in groups:
            limit = torch.maximum(limit, self._others(upper, group)[:, -1])
        i, j = (bounds <= limit[:, None]).nonzero(as_tuple=True)
        exact = torch.full_like(bounds, torch.inf)
        exact[i, j] = squared_distances(points, points, i, self.index[i, j])
        found = exact.sort(dim=1).values[:, : self.count].contiguous()
        without = exact.new_empty(points.count, len(groups))
        for g, group in enumerate(groups):
            without[:, g] = self._others(exact, group)[:, -1]
        if self.keep < points.count - 1:
            farthest = torch.cat([found[:, -1:], without], dim=1).amax(dim=1)
            unsure = (farthest * scale**2 > bounds[:, -1].clamp(min=0)).nonzero().flatten()
            for some in unsure.split(max(1, ALL_ELEMENTS // points.count)):
                squared = distances_to_all(points, points, some)
                squared[torch.arange(len(some), device=some.device), some] = torch.inf
                found[some] = squared.topk(self.count, largest=False).values
                for g, group in enumerate(groups):
                    left = torch.cat([squared[:, : group.start], squared[:, group.stop :]], dim=1)
                    without[some, g] = left.topk(self.count, largest=False).values[:, -1]
        for g, group in enumerate(groups):
            without[group, g] = -torch.inf
        return found, without

    def _others(self, values: Tensor, group: slice) -> Tensor:
        """The `count` smallest values (N, count) of kept neighbours outside of a group; for its own features, of all."""
        inside = (self.index >= group.start) & (self.index < group.stop)
        inside[group] = False
        return values.masked_fill(inside, torch.inf).topk(self.count, largest=False).values


def smallest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` smallest entries of each row (all, if there are fewer), ascending, and their columns."""
    height, width = matrix.shape
    if width % GROUP or width < 2 * GROUP * count:
        values, index = matrix.topk(min(count, width), largest=False)
        return values, index
    # They lie in the `count` groups with the smallest minima: a minimum costs a fraction of a selection.
    groups = matrix.view(height, GROUP, width // GROUP)
    chosen = groups.amin(dim=1).topk(count, largest=False).indices
    first = torch.arange(0, width, width // GROUP, device=matrix.device)
    among = (chosen[:, None, :] + first[:, None]).flatten(1)
    values, index = matrix.gather(1, among).topk(count, largest=False)
    return values, among.gather(1, index)


class Balls:
    """Which generated features lie in the balls of the real ones, and the other way round; boundaries belong to balls.

    Generated features have C balls each, of squared radii (N, C), which count apart: those of a set and of parts of it.
    Distances that differ by what float64 rounds, (D + 8)·2⁻⁵² of them, count as equal.
    """

    def __init__(self, fake: Points, real: Points, fake_radii: Tensor, real_radii: Tensor) -> None:
        device = real.features.device
        self.fake, self.real = fake, real
        self.fake_radii, self.real_radii = fake_radii, real_radii  # squared
        self.holders = torch.zeros(fake.count, dtype=torch.int64, device=device)  # real balls around each generated one
        self.covered = torch.zeros(real.count, dtype=torch.bool, device=device)  # has a generated one in its ball
        # (M, C): is in the ball of a generated one
        self.recalled = torch.zeros(real.count, fake_radii.shape[1], dtype=torch.bool, device=device)

    def add(self, block: Block) -> None:
        """Take the pairs of a block of the generated (rows) with the real ones (columns)."""
        lower = block.lower()
        slack = block.products.slack[0][block.rows], block.products.slack[1][block.columns]
        fake_radii, real_radii = self.fake_radii[block.rows], self.real_radii[block.columns]
        covered, recalled = self.covered[block.columns], self.recalled[block.columns]  # views

        def candidates(limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Pairs that may be within their limit, and the most that their distance can be."""
            i, j = (lower <= scaled(limits)).nonzero(as_tuple=True)
            upper = lower[i, j] + 2 * (slack[0][i] + slack[1][j])
            return i, j, upper / block.scale**2

        def scaled(limits: Tensor) -> Tensor:
            return (limits * block.scale**2).to(lower.dtype)

        def within(i: Tensor, j: Tensor, limits: Tensor) -> Tensor:
            """Whether pairs are within their limits (n, C), by their differences."""
            squared = squared_distances(self.fake, self.real, i + block.rows.start, j + block.columns.start)
            return squared[:, None] <= limits * (1 + (self.real.dim + 8) * 2.0**-52)

        i, j, upper = candidates(real_radii)
        inside = upper <= real_radii[j]
        unsure = (~inside).nonzero().flatten()
        inside[unsure] = within(i[unsure], j[unsure], real_radii[j[unsure], None])[:, 0]
        self.holders[block.rows] += torch.bincount(i[inside], minlength=len(lower))
        covered[j[inside]] = True

        def recall(j: Tensor, inside: Tensor) -> None:
            pair, ball = inside.nonzero(as_tuple=True)
            recalled[j[pair], ball] = True

        every = candidates(fake_radii.amax(dim=1, keepdim=True))
        part = max(1, ALL_ELEMENTS // fake_radii.shape[1])
        for i, j, upper in zip(*(of.split(part) for of in every), strict=True):
            recall(j, upper[:, None] <= fake_radii[i])
            possible = lower[i, j, None] <= scaled(fake_radii[i])
            open_ = (possible & ~recalled[j]).any(dim=1)
            i, j = i[open_], j[open_]
            recall(j, within(i, j, fake_radii[i]))
