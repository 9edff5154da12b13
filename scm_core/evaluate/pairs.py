# SPDX-License-Identifier: Apache-2.0
"""All pairs of two sets of features, block by block: products with a bound on their errors, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.evaluate.moments import check_features

SIDE = {"cpu": 1024, "cuda": 8192}  # rows and columns of a block: up to three matrices of a block's size at a time
FEW = 2**20  # pairs, up to which products are in float64: errors average out less, and it costs little
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # numbers that are in float64 at a time: they stay in the cache
UNDERFLOW = 1e-30  # more than underflows of products can add up to, where the largest norm is near 1


class Points:
    """Features (N, D) of one set, as they were given, and what products of them need.

    Products are taken of features less `shift` (D,), by default the mean, rounded to float32: distances do not change,
    and small products have small errors. Both sets of a comparison need the same shift. In float64: `norms` (N,), the
    squared norms of the shifted features; `projections` (N,), their products with the shift; `total` (D,), their sum.
    Raises `ValueError` for features that are not finite floating-point numbers of shape (N ≥ 2, D), or too large to
    square.
    """

    def __init__(self, features: Tensor, shift: Tensor | None = None, what: str = "features") -> None:
        check_features(features, None if shift is None else len(shift), what)
        if len(features) < 2:
            raise ValueError(f"{what}: at least 2 samples are needed, got {len(features)}")
        self.features = features.detach()
        self.count, self.dim = features.shape
        if shift is None:
            shift = torch.stack([chunk.sum(dim=0) for chunk in self.chunks()]).sum(dim=0) / self.count
        largest = torch.finfo(torch.float32).max  # float32 numbers can be subtracted from float32 features in float32
        self.shift = shift.to(features.device).clamp(-largest, largest).float().double()
        parts = []
        for chunk in self.chunks():
            shifted = chunk - self.shift
            parts.append((shifted.square().sum(dim=1), shifted @ self.shift, shifted.sum(dim=0)))
        norms, projections, totals = zip(*parts, strict=True)
        self.norms, self.projections = torch.cat(norms), torch.cat(projections)
        self.total = torch.stack(totals).sum(dim=0)
        if not bool(torch.isfinite(self.norms).all()):
            raise ValueError(f"{what} are too large to be squared in float64")

    @property
    def kind(self) -> str:
        """Of the device: "cpu" or "cuda"."""
        return "cpu" if self.features.device.type == "cpu" else "cuda"

    @property
    def chunk_rows(self) -> int:
        """How many features are converted to float64 at a time."""
        return max(1, CHUNK_ELEMENTS[self.kind] // self.dim)

    def chunks(self) -> Iterator[Tensor]:
        """The features in float64, a part at a time."""
        return (chunk.double() for chunk in self.features.split(self.chunk_rows))

    def shifted(self, part: slice, scale: float, dtype: torch.dtype) -> Tensor:
        """Return the shifted features of a part, times a power of two, rounded once in `dtype`."""
        return torch.add((-scale * self.shift).to(dtype), self.features[part].to(dtype), alpha=scale)


class Block(NamedTuple):
    """Products (R, C) of the shifted features, times `scale` each, of some rows of set `a` and columns of set `b`."""

    a: Points
    b: Points
    rows: slice
    columns: slice
    scale: float
    gram: Tensor

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
        part = (1 - relative_error(self.a.dim, self.gram.dtype)) * self.scale**2
        row, column = (
            (part * norms - UNDERFLOW).to(self.gram.dtype)
            for norms in (self.a.norms[self.rows], self.b.norms[self.columns])
        )
        return torch.add(column, self.gram, alpha=-2).add_(row[:, None])


def relative_error(dim: int, dtype: torch.dtype) -> float:
    """Bound ε of the error of a squared distance |a|² + |b|² − 2a·b computed in `dtype`, in units of |a|² + |b|².

    A product of D terms, summed in any order, is off by at most D·u·|a||b| ≤ D·u(|a|² + |b|²)/2, with u = 2⁻²⁴ in
    float32 and 2⁻⁵³ in float64. The rounding of a, b, their norms, the threshold and three operations is below 16u,
    terms of second order below a tenth.
    """
    return 1.1 * (dim + 16) * torch.finfo(dtype).eps / 2


def margin(norms: Tensor, dtype: torch.dtype, dim: int, scale: float) -> Tensor:
    """Return how far squared distances with these |a|² + |b|² may lie above `Block.lower`, both times scale²."""
    return 2 * relative_error(dim, dtype) * scale**2 * norms + 4 * UNDERFLOW


def blocks(a: Points, b: Points, side: int | None = None) -> Iterator[Block]:
    """All pairs of two sets in blocks of `side`² at most (by default `SIDE` of the device), always in the same order.

    Of a set with itself, one comes of each two blocks that are each other's transpose. Products are in float32, or in
    float64 for features in float64 and for few pairs.
    """
    exact = a.count * b.count <= FEW or torch.float64 in (a.features.dtype, b.features.dtype)
    dtype = torch.float64 if exact else torch.float32
    side = side or SIDE[a.kind]
    # No square overflows or vanishes where the largest norm is near 1, and a power of two is exact.
    largest = math.sqrt(float(torch.maximum(a.norms.max(), b.norms.max())))
    scale = 2.0 ** -math.frexp(largest)[1]
    for top in range(0, a.count, side):
        rows = slice(top, min(top + side, a.count))
        left = a.shifted(rows, scale, dtype)
        for start in range(top if a is b else 0, b.count, side):
            columns = slice(start, min(start + side, b.count))
            right = left if a is b and start == top else b.shifted(columns, scale, dtype)
            with full_float32():
                gram = left @ right.T
            yield Block(a, b, rows, columns, scale, gram)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 numbers as such, not of TF32 or bfloat16 ones, whose errors are beyond the bounds here."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


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
