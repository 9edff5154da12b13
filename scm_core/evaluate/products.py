# SPDX-License-Identifier: Apache-2.0
"""Products of the features of two sets as fast as their device can, and how far off squared distances from them may be.

In float64 for features in float64 and for few pairs, else in float32. Where matrices of bfloat16 are multiplied faster, features of many
dimensions are split: their coordinates along some directions, in which most of their spread lies, are multiplied in float32, which costs
little, and what is left, in bfloat16. Both the bounds and the errors themselves are then those of small numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scm_core.evaluate.points import Points, power_of_two
from scm_core.precision import full_precision

FEW = 2**20  # pairs, up to which products are in float64: errors average out less, and it costs little
WIDE = 512  # dimensions: with fewer, products are not what takes the time
UNDERFLOW = 1e-30  # more than underflows of products can add up to, where the largest norm is near 1
HALF_ULP = 2.0**-8  # of bfloat16, relative

Part = tuple[Tensor, ...]  # features as they are multiplied: one matrix, or lead and rest


class Products:
    """How products of two sets are taken. `slack`: squared distances |a|² + |b|² − 2a·b from them, of features times
    `scale` (a power of two), are off by at most the sum of the two features' slacks, (N,) and (M,), float64.
    """

    def __init__(self, a: Points, b: Points) -> None:
        # No square overflows or vanishes where the largest norm is near 1, and a power of two is exact.
        self.scale = power_of_two(torch.maximum(a.norms.max(), b.norms.max()))
        exact = a.count * b.count <= FEW or torch.float64 in (a.features.dtype, b.features.dtype)
        self.dtype = torch.float64 if exact else torch.float32
        self.split = not exact and split_pays(a, b)
        if not torch.equal(a.shift, b.shift) or (self.split and a.directions is not b.directions):
            raise ValueError(
                "two sets are compared that do not have shift and directions in common: make one `beside` the other"
            )
        self.unit = self.scale**2 / (a.split.scale * b.split.scale) if self.split else 1.0
        own = relative_error(a.dim, self.dtype) * self.scale**2
        rest = split_error(a.dim, a.split.error, b.split.error) * self.scale**2 if self.split else 0.0
        first, second = (
            own * points.norms + (rest * points.split.residual if self.split else 0.0) + UNDERFLOW for points in (a, b)
        )
        self.slack = first, second

    def part(self, points: Points, which: slice) -> Part:
        """Some features of a set, as `of` takes them."""
        if self.split:
            return points.split.lead[which], points.split.rest[which]
        return (points.shifted(which, self.scale, self.dtype),)

    def of(self, left: Part, right: Part) -> Tensor:
        """The products (R, C) of features in `dtype`, times scale²."""
        with full_precision(left[0].device):
            if not self.split:
                return left[0] @ right[0].T
            lead = (left[0] * self.unit) @ right[0].T
            return lead.add_(left[1] @ right[1].T, alpha=self.unit)


def relative_error(dim: int, dtype: torch.dtype) -> float:
    """Bound ε of the error of a squared distance |a|² + |b|² − 2a·b computed in `dtype`, in units of |a|² + |b|².

    A product of D terms, summed in any order, is off by at most D·u·|a||b| ≤ D·u(|a|² + |b|²)/2, with u = 2⁻²⁴ in
    float32 and 2⁻⁵³ in float64. The rounding of a, b, their norms, the threshold and three operations is below 16u,
    terms of second order below a tenth.
    """
    return 1.1 * (dim + 16) * torch.finfo(dtype).eps / 2


def split_error(dim: int, a: float, b: float) -> float:
    """The same for products of what splits leave, rounded to bfloat16 by `a` and `b` of it, in units of its |a|² + |b|².

    |(x + α)·(y + β) − x·y| ≤ (a + b + ab)|x||y|; sums in float32 err like `relative_error`, even if additions chop; and
    the result is rounded to bfloat16.
    """
    return 1.02 * (a + b + a * b + HALF_ULP) + 2 * relative_error(dim, torch.float32)


def split_pays(a: Points, b: Points) -> bool:
    """Whether products of split features take less time, the splitting included."""
    return a.dim >= WIDE and min(a.count, b.count) > a.dim and fast_bfloat16(a.features.device)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 faster than of float32, with sums in float32."""
    if device.type == "cpu":
        capable = torch.cpu.get_capabilities()
        return torch.backends.mkldnn.is_available() and bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
