# SPDX-License-Identifier: Apache-2.0
"""What a choice of the best does to a number: the spread over seeds, and the minimum of several with its expected bias."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """Mean and standard deviation (n − 1 in its denominator) of values over `seeds`."""

    mean: float
    sd: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.sd:.2g} ({self.seeds} seeds)"


class Minimum(NamedTuple):
    """The least of the values over `seeds`; `bias` is what the minimum of as many normal ones lies above their mean (below zero)."""

    value: float
    seeds: int
    bias: float

    def __str__(self) -> str:
        return f"{self.value:.4g} (minimum of {self.seeds}, expected {self.bias:+.2g} beside the mean)"


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of values over seeds; `ValueError` for less than two."""
    _require_two(values)
    return Spread(fmean(values), stdev(values), len(values))


def minimum(values: Sequence[float]) -> Minimum:
    """Return the least of values over seeds, with the bias of that choice; `ValueError` for less than two.

    The bias is `expected_minimum(n)` of their standard deviations, as if they were normal and alike.
    """
    _require_two(values)
    return Minimum(min(values), len(values), expected_minimum(len(values)) * stdev(values))


@cache
def expected_minimum(count: int) -> float:
    """Return E[min] of `count` standard normals: ∫ x n φ(x) (1 − Φ(x))ⁿ⁻¹ dx; 3 give −3/(2√π) ≈ −0.846.

    By the trapezoidal rule, which is exact to rounding for such an integrand. `ValueError` for count < 1.
    """
    if count < 1:
        raise ValueError(f"the minimum of {count} values: count must be ≥ 1")
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    return float(torch.trapezoid(x * count * density * torch.special.ndtr(-x) ** (count - 1), x))


def _require_two(values: Sequence[float]) -> None:
    if len(values) < 2:
        raise ValueError(f"a spread needs at least two values, got {len(values)}")
