# SPDX-License-Identifier: Apache-2.0
"""All pairs of two sets of features, block by block: products with a bound on their errors, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.evaluate.points import Points
from scm_core.evaluate.products import Products

SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of a block: up to three matrices of a block's size at a time


class Block(NamedTuple):
    """Products (R, C) of the shifted features, times `scale` each, of some rows of set `a` and columns of set `b`."""

    a: Points
    b: Points
    rows: slice
    columns: slice
    products: Products
    gram: Tensor

    @property
    def scale(self) -> float:
        """What features were multiplied by: a power of two."""
        return self.products.scale

    @property
    def within(self) -> bool:
        """Whether both sets are the same one: a block then stands for its transpose, too."""
        return self.a is self.b

    @property
    def diagonal(self) -> bool:
        """Whether the block's diagonal holds the pairs of a feature with itself; it is then its own transpose."""
        return self.within and self.rows == self.columns

    def lower(self) -> Tensor:
        """Return what squared distances, times scale², are at least: (R, C), as the products."""
        row, column = (
            (points.norms[part] * self.scale**2 - slack[part]).to(self.gram.dtype)
            for points, part, slack in zip(
                (self.a, self.b), (self.rows, self.columns), self.products.slack, strict=True
            )
        )
        return torch.add(column, self.gram, alpha=-2).add_(row[:, None])


def blocks(a: Points, b: Points, side: int | None = None) -> Iterator[Block]:
    """All pairs of two sets in blocks of `side`² at most (by default `SIDE` of the device), always in the same order.

    Of a set with itself, one comes of each two blocks that are each other's transpose.
    """
    products, side = Products(a, b), side or SIDE[a.kind]
    for top in range(0, a.count, side):
        rows = slice(top, min(top + side, a.count))
        left = products.part(a, rows)
        for start in range(top if a is b else 0, b.count, side):
            columns = slice(start, min(start + side, b.count))
            right = left if a is b and start == top else products.part(b, columns)
            yield Block(a, b, rows, columns, products, products.of(left, right))


def squared_distances(a: Points, b: Points, i: Tensor, j: Tensor) -> Tensor:
    """Return the squared distances (n,) of features i of `a` to features j of `b`, from their differences in float64."""
    found = [
        (a.features[x].double() - b.features[y].double()).square().sum(dim=1)
        for x, y in zip(i.split(a.chunk_rows), j.split(a.chunk_rows), strict=True)
    ]
    return torch.cat(found)


def distances_to_all(a: Points, b: Points, i: Tensor) -> Tensor:
    """Return the squared distances (n, M) of features i of `a` to every feature of `b`, from their differences in float64."""
    rows = a.features[i].double()
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(rows, chunk, compute_mode=mode).square() for chunk in b.chunks()], dim=1)
