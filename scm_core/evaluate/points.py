# SPDX-License-Identifier: Apache-2.0
"""The features of one set, and what products of them with others need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.evaluate.moments import CHUNK, Moments, check_features, gram

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # numbers that are in float64 at a time: they stay in the cache
CHEAP = 2**30  # multiplications that are in float64 in any case: a few hundredths of a second
DIRECTIONS = 64  # along which products are in float32 where the rest is in bfloat16
TINY = 1e-30  # squares below it count as zero, where the largest norm is near 1


class Split(NamedTuple):
    """Features (N, D) times `scale`, a power of two: `lead` (N, R) float32 along the directions, `rest` (N, D) bfloat16.

    `residual` (N,): squared norms of what was rounded to `rest`, unscaled; `error` bounds |rounding|/|rest| of each.
    """

    lead: Tensor
    rest: Tensor
    scale: float
    residual: Tensor
    error: float


class Points:
    """Features (N, D) of one set, as they were given, and what products of them need.

    Products are taken of features less `shift` (D,), by default the mean, rounded to float32: distances do not change,
    and small products have small errors. In float64: `norms` (N,), the squared norms of the shifted features; `alpha`
    (N,), their products with the shift, over D; `sums` (3, D), their sums with weights 1, alpha and alpha². A set that is
    compared with another takes its shift and directions from that one, `beside`. `moments`, if known, save work. Raises
    `ValueError` for features that are not finite floating-point numbers of shape (N ≥ 2, D), or too large to square.
    """

    def __init__(
        self,
        features: Tensor,
        shift: Tensor | None = None,
        what: str = "features",
        beside: Points | None = None,
        moments: Moments | None = None,
    ) -> None:
        shift = beside.shift if beside is not None else shift
        check_features(features, None if shift is None else len(shift), what)
        if len(features) < 2:
            raise ValueError(f"{what}: at least 2 samples are needed, got {len(features)}")
        self.features = features.detach()
        self.count, self.dim = features.shape
        self.beside, self.moments = beside, moments
        if moments is not None and moments.count != self.count:
            raise ValueError(f"{what}: moments of {moments.count} samples are not those of {self.count}")
        if shift is None:
            shift = torch.stack([chunk.sum(dim=0) for chunk in self.chunks()]).sum(dim=0) / self.count
        largest = torch.finfo(torch.float32).max  # float32 numbers can be subtracted from float32 features in float32
        self.shift: Tensor = shift.to(features.device).clamp(-largest, largest).float().double()
        norms, alpha = [], []
        self.sums = torch.zeros(3, self.dim, dtype=torch.float64, device=features.device)
        for chunk in self.chunks():
            shifted = chunk - self.shift
            norms.append(torch.linalg.vecdot(shifted, shifted))
            alpha.append(shifted @ self.shift / self.dim)
            self.sums += torch.stack([torch.ones_like(alpha[-1]), alpha[-1], alpha[-1].square()]) @ shifted
        self.norms, self.alpha = torch.cat(norms), torch.cat(alpha)
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

    @cached_property
    def second(self) -> Tensor:
        """Sum (D, D) of x̃x̃ᵀ over the shifted features x̃, in float64; of parts in float32 if the features are, and many."""
        if self.moments is not None:
            offset = self.moments.mean - self.shift.cpu()
            known = self.moments.cov.mul_(self.count - 1).addr_(offset, offset, alpha=self.count)
            return known.to(self.features.device)
        cheap = self.count * self.dim**2 <= CHEAP
        dtype = torch.float64 if cheap else torch.promote_types(self.features.dtype, torch.float32)
        scale = power_of_two(self.norms.max())
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.features.device)
        for start in range(0, self.count, 4 * CHUNK):
            total += gram(self.shifted(slice(start, start + 4 * CHUNK), scale, dtype))
        return total.div_(scale).div_(scale)  # scale² may be out of range

    @cached_property
    def directions(self) -> Tensor:
        """Orthonormal directions (D, R) with most of the shifted features' spread, float64."""
        if self.beside is not None:
            return self.beside.directions
        return leading_directions(self.second, DIRECTIONS)

    @cached_property
    def split(self) -> Split:
        """The shifted features in two parts, for products."""
        parts = (chunk - self.shift for chunk in self.chunks())
        return split(parts, self.directions, self.norms)


def leading_directions(second: Tensor, count: int) -> Tensor:
    """Orthonormal directions (D, count), float64, near the leading eigenvectors of a symmetric matrix (D, D).

    Three steps of subspace iteration from fixed random directions: they need not be exact.
    """
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(len(second), count, generator=generator, dtype=torch.float64).to(second.device)
    for _ in range(3):
        found = torch.linalg.qr(second @ found).Q
    return found


def split(parts: Iterable[Tensor], directions: Tensor, norms: Tensor) -> Split:
    """The `Split` of features in float64, which come in `parts` (n, D), along orthonormal directions (D, R)."""
    scale, error, row = power_of_two(norms.max()), 0.0, 0
    count, device = len(norms), norms.device
    lead = torch.empty(count, directions.shape[1], device=device)
    rest = torch.empty(count, len(directions), dtype=torch.bfloat16, device=device)
    residual = torch.empty_like(norms)
    for part in parts:
        rows = slice(row, row := row + len(part))
        lead[rows] = coordinates = scale * (part @ directions)
        left = torch.addmm(part, coordinates, directions.T, beta=scale, alpha=-1)
        rest[rows] = left
        size = torch.linalg.vecdot(left, left)
        residual[rows] = size / scale**2
        left -= rest[rows]
        error = max(error, float((torch.linalg.vecdot(left, left) / size.clamp(min=TINY)).max()))
    return Split(lead, rest, scale, residual, math.sqrt(error))


def power_of_two(largest: Tensor) -> float:
    """What brings a norm, given by its square, to below 1 and above ¼."""
    return 2.0 ** -math.frexp(math.sqrt(float(largest)))[1]
