# SPDX-License-Identifier: Apache-2.0
"""The discrete schedules of DDPM and its descendants, read as continuous ones.

A network of N steps was trained at s = 0 … N − 1 with ᾱ_s = Π_{i ≤ s} (1 − β_i): α = √ᾱ, σ = √(1 − ᾱ). With λ = ln(σ/α), which grows
with s, a time t of TrigFlow is where λ = ln(σ_d tan t), and s there comes from a monotone cubic through (λ_i, i) (Fritsch & Carlson 1980):
exact at the N trained points, with a continuous derivative between them. α and σ are those of t, exactly; only what the network is told of
s is interpolated, between points that no training has seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scm_core.conversions import Point

BISECTIONS = 60


def betas(rule: str, start: float, end: float, count: int) -> Tensor:
    """β_0 … β_{N−1} in float64 of diffusers' names: linear, scaled_linear (√β linear), squaredcos_cap_v2 (Nichol & Dhariwal 2021).

    `ValueError` for another name or numbers that make no schedule.
    """
    f64 = torch.float64
    if not (isinstance(count, int) and count >= 3):
        raise ValueError(f"num_train_timesteps: expected at least 3, got {count}")
    if rule == "squaredcos_cap_v2":
        level = torch.cos((torch.arange(count + 1, dtype=f64, device="cpu") / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)
    if not 0 < start < end < 1:
        raise ValueError(f"beta_start, beta_end: expected 0 < beta_start < beta_end < 1, got {start}, {end}")
    if rule == "linear":
        return torch.linspace(start, end, count, dtype=f64, device="cpu")
    if rule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=f64, device="cpu") ** 2
    raise ValueError(f"beta_schedule: expected linear, scaled_linear or squaredcos_cap_v2, got {rule!r}")


class DiscreteSchedule:
    """x_s = √ᾱ_s x0 + √(1 − ᾱ_s) ε at s in [0, N − 1], from β_0 … β_{N−1}; a `conversions.Schedule`.

    s stays at its ends for t beyond them: `first` and `last` are the times (radians) of the ends for a σ_d. Raises ValueError for β outside
    (0, 1).
    """

    def __init__(self, values: Sequence[float] | Tensor) -> None:
        beta = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        if beta.ndim != 1 or len(beta) < 3 or not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError("betas: expected at least 3 numbers in (0, 1)")
        log_alpha_bar = torch.log1p(-beta).cumsum(0)
        self.log_ratio = (torch.log(-torch.expm1(log_alpha_bar)) - log_alpha_bar) / 2  # λ_i = ln(σ_i/α_i)
        self.slopes = _slopes(self.log_ratio)

    def ends(self, sigma_data: float) -> tuple[float, float]:
        """The times t of s = 0 and of s = N − 1."""
        first, last = (math.atan(math.exp(float(value)) / sigma_data) for value in self.log_ratio[[0, -1]])
        return first, last

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(α_s, σ_s): the inverse of the cubic by bisection, in float64."""
        wide = s.double()
        index = wide.detach().long().clamp(0, len(self.log_ratio) - 2)
        low, high = torch.zeros_like(wide), torch.ones_like(wide)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self._cubic(index, middle) < wide
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        knots = self.log_ratio.to(s.device)
        ratio = torch.exp(knots[index] + low * (knots[index + 1] - knots[index]))
        alpha = 1 / torch.hypot(torch.ones_like(ratio), ratio)
        return alpha.to(s.dtype), (ratio * alpha).to(s.dtype)

    def at(self, t: Tensor, sigma_data: float) -> Point:
        norm = torch.hypot(torch.cos(t), sigma_data * torch.sin(t))
        wide = t.double()  # λ spans 14 over s: float32 would leave 1e-4 of a step
        knots = self.log_ratio.to(t.device)
        ratio = (math.log(sigma_data) + torch.log(torch.tan(wide))).clamp(knots[0], knots[-1])
        index = (torch.searchsorted(knots, ratio.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        s = self._cubic(index, (ratio - knots[index]) / (knots[index + 1] - knots[index]))
        return Point(s.to(t.dtype), torch.cos(t) / norm, sigma_data * torch.sin(t) / norm)

    def _cubic(self, index: Tensor, u: Tensor) -> Tensor:
        """s at the fraction u of the way from λ_index to the next (Hermite's form)."""
        knots, slopes = self.log_ratio.to(u.device), self.slopes.to(u.device)
        step = knots[index + 1] - knots[index]
        rise = u * u * (3 - 2 * u)
        bends = u * (1 - u) * ((1 - u) * slopes[index] - u * slopes[index + 1]) * step
        return index + rise + bends


def _slopes(knots: Tensor) -> Tensor:
    """ds/dλ at the points (λ_i, i): weighted harmonic means of the slopes beside, which keep the cubic monotone; secants at the ends."""
    steps = knots.diff()
    secants = 1 / steps
    before, after = steps[:-1], steps[1:]
    w0, w1 = 2 * after + before, after + 2 * before
    inner = (w0 + w1) / (w0 / secants[:-1] + w1 / secants[1:])
    return torch.cat([secants[:1], inner, secants[-1:]])
