# SPDX-License-Identifier: Apache-2.0
"""A Gaussian mixture: data whose diffusion model, PF-ODE and consistency function are known to any accuracy (Figure 3, tests).

Under TrigFlow component k of x_t is N(cos t m_k, s_k² I) with s_k² = cos²t λ_k² + sin²t σ_d², so that E[x0 | x_t] and E[z | x_t] are
averages over the components with the weights p(k | x_t). Nothing is divided by sin t or cos t: every formula holds on all of [0, π/2].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scm_core.trigflow import broadcast_time
from scm_core.validate import check_device, check_positive

SUBSTEPS = (2, 4, 6, 8, 10, 12)  # of the extrapolated midpoint rule: order 12
MAX_STEPS = 512  # of `solve`, which doubles their number until the result stands


class GaussianMixture(nn.Module):
    """p(x0) = Σ_k π_k N(m_k, λ_k² I); called as net(x_t/σ_d, t) it is F of the perfect diffusion model, in the dtype of its input.

    `means` (K, D), `std` λ and `weights` π (K,) or one number for all; weights are relative. For σ_d per element see `scaled`.
    Raises ValueError for other shapes and for numbers (sigma_data too) that are not positive.
    """

    means: Tensor
    std: Tensor
    weights: Tensor

    def __init__(
        self, means: Tensor, std: Tensor | float, weights: Tensor | float = 1.0, sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        if means.ndim != 2 or not means.numel():
            raise ValueError(f"means: expected shape (components, dimensions), got {tuple(means.shape)}")
        check_positive("sigma_data", sigma_data)
        self.sigma_data = sigma_data
        self.register_buffer("means", means.double())
        for name, value in (("std", std), ("weights", weights)):
            given = torch.as_tensor(value, dtype=torch.float64, device=means.device)
            if given.shape not in ((), means.shape[:1]):
                raise ValueError(f"{name}: expected one number or shape ({len(means)},), got {tuple(given.shape)}")
            if not bool((given > 0).all()):
                raise ValueError(f"{name}: expected positive numbers, got {given.min().item():g}")
            self.register_buffer(name, given.expand(len(means)).clone())
        self.weights /= self.weights.sum()

    @classmethod
    def scaled(
        cls, means: Tensor, std: Tensor | float, weights: Tensor | float = 1.0, sigma_data: float = 0.5
    ) -> GaussianMixture:
        """The mixture moved to mean 0 and scaled, means and std alike, to the variance σ_d² averaged over its elements."""
        raw = cls(means, std, weights, sigma_data)
        centred = raw.means - raw.weights @ raw.means
        variance = raw.weights @ (centred.square().mean(dim=1) + raw.std**2)
        factor = sigma_data / math.sqrt(float(variance))
        return cls(centred * factor, raw.std * factor, raw.weights, sigma_data)

    def sample(self, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """x0 of shape (count, D), on the device of the mixture.

        Raises ValueError for count < 0 and for a generator of another device.
        """
        if count < 0:
            raise ValueError(f"count: expected a number of samples >= 0, got {count}")
        device = self.means.device
        if generator.device.type != device.type:
            raise ValueError(f"generator: expected the device {device} of the mixture, got {generator.device}")
        if not count:  # torch.multinomial draws one at least
            return self.means.new_empty(0, self.means.shape[1], dtype=dtype)
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64, device=device)
        return (self.means[k] + self.std[k, None] * noise).to(dtype)

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ln π_k N(x_t; cos t m_k, s_k² I) (B, K), s_k² (B, K), and x_t − cos t m_k (B, K, D)."""
        if x_t.ndim != 2 or x_t.shape[1] != self.means.shape[1]:
            raise ValueError(f"x_t: expected shape (B, {self.means.shape[1]}), got {tuple(x_t.shape)}")
        check_device("x_t", x_t, self.means, "the mixture")
        means, std, weights = (value.to(x_t.dtype) for value in (self.means, self.std, self.weights))
        tb = broadcast_time(t, x_t)
        variance = (torch.cos(tb) * std) ** 2 + (torch.sin(tb) * self.sigma_data) ** 2
        residual = x_t[:, None] - torch.cos(tb)[:, :, None] * means
        exponent = residual.square().sum(dim=2) / variance + means.shape[1] * torch.log(2 * math.pi * variance)
        return torch.log(weights) - exponent / 2, variance, residual

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """ln p_t(x_t), shape (B,), for x_t (B, D) and t (B,) in radians."""
        return torch.logsumexp(self._components(x_t, t)[0], dim=1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """∇ ln p_t(x_t) = −Σ_k p(k | x_t) (x_t − cos t m_k)/s_k²; shapes as in `velocity`."""
        joint, variance, residual = self._components(x_t, t)
        return -torch.einsum("bk,bkd->bd", joint.softmax(dim=1) / variance, residual)

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] = Σ_k p(k | x_t) (m_k + cos t λ_k²/s_k² (x_t − cos t m_k)); shapes as in `velocity`."""
        joint, variance, residual = self._components(x_t, t)
        p, means, std = joint.softmax(dim=1), self.means.to(x_t.dtype), self.std.to(x_t.dtype)
        return p @ means + torch.einsum("bk,bkd->bd", p * torch.cos(t)[:, None] * std**2 / variance, residual)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt of the PF-ODE, E[v_t | x_t] = Σ_k p(k | x_t) (cos t sin t (σ_d² − λ_k²)/s_k² (x_t − cos t m_k) − sin t m_k).

        x_t (B, D), t (B,) in radians.
        """
        joint, variance, residual = self._components(x_t, t)
        p, means, std = joint.softmax(dim=1), self.means.to(x_t.dtype), self.std.to(x_t.dtype)
        factor = (torch.cos(t) * torch.sin(t))[:, None] * (self.sigma_data**2 - std**2) / variance
        return torch.einsum("bk,bkd->bd", p * factor, residual) - torch.sin(t)[:, None] * (p @ means)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        """F(x, t) = dx_t/dt / σ_d at x_t = σ_d x. Raises ValueError for labels or guidance: the mixture has neither."""
        if labels is not None or guidance is not None:
            raise ValueError(f"{'guidance' if labels is None else 'labels'}: a mixture is unconditional, expected None")
        return self.velocity(self.sigma_data * x, t) / self.sigma_data

    @torch.no_grad()
    def integrate(self, x_t: Tensor, t: Tensor, end: Tensor, tolerance: float = 1e-10) -> Tensor:
        """Where the PF-ODE through (x_t, t) is at the times `end`; all float64, x_t (B, D), t and end (B,) in radians.

        Accurate to about `tolerance`: see `solve`.
        """
        if x_t.dtype != torch.float64 or t.dtype != torch.float64:
            raise ValueError(f"x_t, t: expected float64, got {x_t.dtype} and {t.dtype}")
        return solve(self.velocity, x_t, t, end, tolerance)

    def pf_ode_map(self, x_t: Tensor, t: Tensor, tolerance: float = 1e-10) -> Tensor:
        """The true consistency function f(x_t, t): the PF-ODE's end at t = 0; arguments as in `integrate`."""
        return self.integrate(x_t, t, torch.zeros_like(t), tolerance)

    def mode_of(self, x0: Tensor) -> Tensor:
        """The component that clean data x0 (B, D) most likely come from: argmax_k p(k | x0), int64 (B,)."""
        return self._components(x0, x0.new_zeros(len(x0)))[0].argmax(dim=1)

    def mode_shares(self, x0: Tensor) -> Tensor:
        """The share of x0 (B, D) in each component over the share of the component, (K,): 1 for the data, 0 for a lost mode.

        Raises ValueError for an empty batch, which has no shares.
        """
        if not len(x0):
            raise ValueError("x0: expected at least one point, got 0")
        counts = torch.bincount(self.mode_of(x0), minlength=len(self.means))
        return counts / len(x0) / self.weights


def solve(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: Tensor, end: Tensor, tolerance: float) -> Tensor:
    """x(end) of dx/dt = slope(x, t), x (B, D) at the times `start` (B,): equal steps of order 12, a number of them for each sample.

    The number is doubled until the sample changes by less than `tolerance` in every element, which the last and finer result then is
    far more accurate than. Raises ArithmeticError if 512 steps are not enough.
    """
    result, left, last, steps = x.clone(), torch.arange(len(x), device=x.device), x.new_full(x.shape, math.inf), 4
    while len(left):
        if steps > MAX_STEPS:
            raise ArithmeticError(f"tolerance: {tolerance:g} is not reached in {MAX_STEPS} steps")
        y, time, h = x[left], start[left], (end - start)[left] / steps
        for i in range(steps):
            y = _extrapolated_step(slope, y, time + i * h, h)
        open_ = ((y - last).abs() > tolerance).any(dim=1) | ~y.isfinite().all(dim=1)
        result[left] = y
        left, last, steps = left[open_], y[open_], 2 * steps
    return result


def _extrapolated_step(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """One step h (B,) of Gragg's midpoint rule with 2, 4, … substeps, extrapolated to infinitely many.

    The rule's error is a series in (h/n)², from which the Aitken–Neville scheme removes one term with each further n (Hairer, Nørsett,
    Wanner: Solving Ordinary Differential Equations I, §II.9).
    """
    first = slope(x, t)
    row: list[Tensor] = []
    for j, n in enumerate(SUBSTEPS):
        sub = h / n
        before, now = x, x + sub[:, None] * first
        for i in range(1, n):
            before, now = now, before + 2 * sub[:, None] * slope(now, t + i * sub)
        above, row = row, [(before + now + sub[:, None] * slope(now, t + h)) / 2]
        for k in range(j):
            row.append(row[k] + (row[k] - above[k]) / ((n / SUBSTEPS[j - k - 1]) ** 2 - 1))
    return row[-1]
