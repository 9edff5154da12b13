# SPDX-License-Identifier: Apache-2.0
"""Discrete-time consistency models, Algorithm 2: the tangent as a difference quotient over one step of a grid (paper App. E).

With the smaller time t' of the pair, h = t − t', and x_t' = cos(h) x_t − sin(h) dx_t/dt, one DDIM step,
Δ = (f(x_t, t) − f(x_t', t')) / sin(h) = −cos(t') (σ_d F − dx_t/dt) − sin(t') (x_t + (σ_d cos(h) F − σ_d F') / sin(h)),
which tends to df/dt at first order in h. F = F(x_t/σ_d, t), F' = F(x_t'/σ_d, t').
"""

from typing import Any

import torch
from torch import Tensor, nn

from scm_core.engines import Net
from scm_core.guidance import data_velocity, teacher_velocity
from scm_core.objectives import Method
from scm_core.objectives.consistency import ConsistencyObjective, consistency_method, required, without_guidance
from scm_core.objectives.grid import Ascending, Copies
from scm_core.sampling import sigma_grid, time_grid
from scm_core.seeds import uniform
from scm_core.tangent import Normalize, Tangent, check_arguments, normalize_tangent
from scm_core.trigflow import broadcast_time
from scm_core.validate import check_dtype, check_like, check_times


def interval_times(intervals: int, sigma_data: float) -> Tensor:
    """0 = t_0 < t_1 < … < t_N = t_max: EDM's grid of N intervals, t_i = arctan(σ_i/σ_d); radians, shape (N + 1,), float64.

    Raises ValueError for fewer than 2 intervals.
    """
    if intervals < 2:
        raise ValueError(f"intervals: expected at least 2, got {intervals}")
    return torch.tensor(time_grid(intervals, sigma_data)[::-1], dtype=torch.float64)


def interval_probabilities(intervals: int, P_mean: float, P_std: float) -> Tensor:
    """The proposal on the grid: P(t = t_i) ∝ Φ(τ_i) − Φ(τ_{i−1}), τ_i = (ln σ_i − P_mean)/P_std, i = 1 … N; (N,), float64.

    That is the log-normal of the continuous method, given σ ≤ 80, rounded up to the grid; τ_0 = −∞.
    """
    log_sigma = torch.tensor(sigma_grid(intervals)[::-1], dtype=torch.float64).log()
    below = torch.special.ndtr((log_sigma - P_mean) / P_std)
    return torch.diff(below, prepend=below.new_zeros(1)) / below[-1]


def pass_before(net: Net, x: Tensor, t: Tensor) -> Tensor:
    """F⁻(x, t) without gradient, with the dropout mask of the network's next pass: the generators are put back to where they were."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        return net(x, t)


def discrete_tangent(
    net: Net,
    x_t: Tensor,
    t: Tensor,
    t_prev: Tensor,
    dxdt: Tensor,
    sigma_data: float,
    warmup: float = 1.0,
    normalize: Normalize = "norm",
    c: float = 0.1,
) -> Tangent:
    """Algorithm 2: F with its graph, g = cos(t) Δ, normalised, and ‖g‖ before; r = `warmup` stands before the second part of Δ.

    x_t, dxdt of shape (B, …), 0 ≤ t' = `t_prev` < t of shape (B,) in radians. One dropout mask for both passes.

    Raises ValueError for times outside [0, π/2] or not in that order, and for all else that `scm_core.tangent.scm_tangent` refuses.
    """
    check_arguments(x_t, t, dxdt, sigma_data, warmup, c)
    check_like("t_prev", t_prev, t, "t")
    check_dtype("t_prev", t_prev, t, "t")
    check_times(t_prev, "t_prev")
    wrong = t_prev >= t
    if bool(wrong.any()):
        raise ValueError(f"t_prev: expected times below t, got {t_prev[wrong][0]:g} for t = {t[wrong][0]:g}")
    return difference_tangent(net, x_t, t, t_prev, dxdt, sigma_data, warmup, normalize, c)


def difference_tangent(
    net: Net,
    x_t: Tensor,
    t: Tensor,
    t_prev: Tensor,
    dxdt: Tensor,
    sigma_data: float,
    warmup: float,
    normalize: Normalize,
    c: float,
) -> Tangent:
    """`discrete_tangent` for a training step: looks at no values, raises ValueError for shapes or devices that do not match."""
    check_like("dxdt", dxdt, x_t, "x_t")
    tb, end = broadcast_time(t, x_t), broadcast_time(t_prev, x_t, "t_prev")
    h = tb - end  # without rounding where t ≤ 2 t'
    with torch.no_grad():
        x_prev = torch.cos(h) * x_t - torch.sin(h) * dxdt
        # sin(t') = 0 takes F' out at t' = 0; a network of ln tan t' has none there, so that it is asked at another time
        F_prev = pass_before(net, x_prev / sigma_data, torch.where(t_prev > 0, t_prev, t)).to(x_t.dtype)
    F = net(x_t / sigma_data, t)
    check_like("F", F, x_t, "x_t")
    with torch.no_grad():
        F_minus = F.to(x_t.dtype)  # the arithmetic is never in half precision
        # (cos(h) F − F')/sin(h): the difference of neighbours first, which does not round; 1/sin(h) amplifies F's own roundings alone
        slope = (F_minus - F_prev) / torch.sin(h) - torch.tan(h / 2) * F_minus
        delta = -torch.cos(end) * (sigma_data * F_minus - dxdt) - warmup * torch.sin(end) * (x_t + sigma_data * slope)
        g, norm = normalize_tangent(torch.cos(tb) * delta, normalize, c)
    return Tangent(F, g, norm)


class DiscreteObjective(ConsistencyObjective):
    """Algorithm 2 on a grid of `intervals` steps; all else as in `ConsistencyObjective`, which has the other options (but `engine`).

    Raises ValueError for fewer than 2 intervals, or for so many that float32 cannot tell their times apart.
    """

    def __init__(self, *arguments: Any, intervals: int, **options: Any) -> None:
        if "engine" in options:
            raise ValueError(f"engine: discrete time takes no derivative, got {options['engine']!r}")
        super().__init__(*arguments, **options)
        grid = interval_times(intervals, self.sigma_data)
        if not bool((grid.float().diff() > 0).all()):
            raise ValueError(f"intervals: expected few enough for distinct times in float32, got {intervals}")
        self.grid = Ascending(grid)
        self.below = Copies(interval_probabilities(intervals, self.P_mean, self.P_std).cumsum(0)[:-1])

    def times(self, batch: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """t of shape (batch,), the upper ends of intervals of the grid."""
        below = self.below.on(generator.device, torch.float64)
        u = uniform(generator, batch, dtype=torch.float64)
        return self.grid.on(generator.device, dtype)[torch.searchsorted(below, u, right=True) + 1]

    def tangent(self, net: Net, x_t: Tensor, t: Tensor, dxdt: Tensor, r: float) -> Tangent:
        """F and the difference quotient to the grid's time before t > 0; nothing is before t = 0, whose g is not a number."""
        t_prev = self.grid.before(t)
        return difference_tangent(net, x_t, t, t_prev, dxdt, self.sigma_data, r, self.normalize, self.c)


def dsct(
    net: nn.Module, teacher: nn.Module | None, sigma_data: float, shape: tuple[int, ...], **options: Any
) -> Method:
    """Discrete consistency training: with v_t the DDIM step leads to the same (x0, z) at t'. `options`: `intervals` and those of `sct`."""
    without_guidance(options.get("guidance"))
    return consistency_method(DiscreteObjective, net, data_velocity, sigma_data, shape, **options)


def dscd(
    net: nn.Module, teacher: nn.Module | None, sigma_data: float, shape: tuple[int, ...], **options: Any
) -> Method:
    """Discrete consistency distillation, Algorithm 2: one DDIM step of the teacher. `options`: `intervals` and those of `scd`."""
    velocity_fn = teacher_velocity(required(teacher), sigma_data)
    return consistency_method(DiscreteObjective, net, velocity_fn, sigma_data, shape, **options)
