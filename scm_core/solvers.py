# SPDX-License-Identifier: Apache-2.0
"""Solvers of the PF-ODE dx_t/dt = σ_d F(x_t/σ_d, t) and their grids (paper App. B). All exact in TrigFlow variables.

With y = x_t/cos t and u = tan t the PF-ODE is dy/du = ε, the predicted noise; with y = x_t/sin t and u = 1/tan t it is dy/du = D, the
predicted data. So a solver of a diffusion model in another schedule becomes one of these once its coefficients are written in t, and
λ = −ln tan t takes the place of the half log-SNR. Every first-order step, in either form, is the rotation of `_rotate`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from scm_core.trigflow import SIGMA_MAX, SIGMA_MIN, t_max
from scm_core.validate import check_grid, check_like, check_positive, check_sample

Net = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[[Net, Tensor, Sequence[float], float], Tensor]


def sigma_grid(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0) -> list[float]:
    """EDM's noise levels σ_i = (σ_max^{1/ρ} + i/(n−1) (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, i = 0 … n−1, descending (EDM, Eq. 5).

    Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if steps == 1:
        return [sigma_max]
    a, b = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(a + i / (steps - 1) * (b - a)) ** rho for i in range(steps)]


def time_grid(steps: int, sigma_data: float) -> list[float]:
    """The times of a diffusion sampler, t_i = arctan(σ_i/σ_d), then 0: steps + 1 numbers, descending, in radians."""
    check_positive("sigma_data", sigma_data)
    return [math.atan(sigma / sigma_data) for sigma in sigma_grid(steps)] + [0.0]


def segment_times(segments: int, sigma_data: float) -> list[float]:
    """The boundaries of `segments` equal pieces of [0, t_max]: segments + 1 times in radians, from t_max down to exactly 0.

    A multistep consistency model leads from anywhere within a piece to its lower boundary (Heek et al. 2024). Raises ValueError for
    segments < 1.
    """
    if segments < 1:
        raise ValueError(f"segments: expected at least 1, got {segments}")
    return [t_max(sigma_data) * ((segments - i) / segments) for i in range(segments + 1)]


def _evaluate(net: Net, x_t: Tensor, t: float, sigma_data: float) -> Tensor:
    """σ_d F(x_t/σ_d, t) = dx_t/dt; ValueError for an F that is not of the shape of x_t."""
    F = net(x_t / sigma_data, x_t.new_full((x_t.shape[0],), t))
    check_like("F", F, x_t, "x_t")
    return sigma_data * F


def _rotate(x_s: Tensor, v_s: Tensor, s: float, t: float) -> Tensor:
    """The DDIM step s → t: x_t = cos(s−t) x_s − sin(s−t) v_s (App. B); v_s = σ_d F."""
    return math.cos(s - t) * x_s - math.sin(s - t) * v_s


def _noise(x_s: Tensor, v_s: Tensor, s: float) -> Tensor:
    """ε = sin(s) x_s + cos(s) v_s."""
    return math.sin(s) * x_s + math.cos(s) * v_s


def _data(x_s: Tensor, v_s: Tensor, s: float) -> Tensor:
    """D = cos(s) x_s − sin(s) v_s."""
    return math.cos(s) * x_s - math.sin(s) * v_s


def _check(x: Tensor, times: Sequence[float], sigma_data: float) -> None:
    check_sample("x", x)
    check_grid("times", times)
    check_positive("sigma_data", sigma_data)


def ddim(net: Net, x: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """First-order solver; NFE = number of steps. `times` in radians may start at π/2, where the signal is zero.

    x of shape (B, …) is x_t at the first of the descending `times`; the result is x_t at the last one, ≥ 0. Raises ValueError for times
    that do not descend within [0, π/2], x of another type than float32 or float64, sigma_data ≤ 0, or F of another shape than x; so do all
    solvers.
    """
    _check(x, times, sigma_data)
    for s, t in pairwise(times):
        x = _rotate(x, _evaluate(net, x, s, sigma_data), s, t)
    return x


def heun(net: Net, x: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """EDM's second-order sampler = DPM-Solver-2S with Heun's intermediate step (App. B.4); NFE = 2·steps − 1.

    In EDM's variables x_σ = x_t / cos t the slope is dx_σ/dσ = ε/σ_d with ε the predicted noise: a DDIM step from s to t holds
    ε fixed, Heun's step averages it over the two ends. Shapes, units and errors as in `ddim`; it cannot start at π/2, where σ is infinite.
    """
    _check(x, times, sigma_data)
    if times[0] >= math.pi / 2:
        raise ValueError(
            f"times: expected to start below π/2 for Heun's method, got {times[0]}; use ddim or a 2M solver"
        )
    for s, t in pairwise(times):
        v_s = _evaluate(net, x, s, sigma_data)
        euler = _rotate(x, v_s, s, t)
        if t > 0:
            eps_s = _noise(x, v_s, s)
            eps_t = _noise(euler, _evaluate(net, euler, t, sigma_data), t)
            # x_t/cos t = x_s/cos s + (tan t − tan s) ε̄ ; the difference to the Euler step is in ε̄ − ε_s alone
            x = euler + (math.cos(t) * (math.tan(t) - math.tan(s)) / 2) * (eps_t - eps_s)
        else:
            x = euler
    return x


def _log_tan(t: float) -> float:
    """−λ = ln tan t; infinite at π/2, which floating point rounds to a finite tangent."""
    return math.inf if t >= math.pi / 2 else math.log(math.tan(t))


def _two_step(
    net: Net,
    x: Tensor,
    times: Sequence[float],
    sigma_data: float,
    predict: Callable[[Tensor, Tensor, float], Tensor],
    weight: Callable[[float], float],
) -> Tensor:
    """x_t = cos(s−t) x_s − sin(s−t) σ_d F_s + weight(s) sin(s−t)/(2r) (p_s − p_s'), where s' came before s and p is what `predict` gives.

    r = (λ_s − λ_s')/(λ_t − λ_s). Two steps are of first order: the first, which has no s' (and the one after a start at π/2, where
    λ_s' = −∞ makes 1/r = 0), and the last to t = 0, where λ_t = ∞: p extrapolated linearly in λ has no limit there, 1/r grows like
    ln(1/t). Each costs O(Δt²) once, as much as the other steps' errors add up to, so the order stays 2 on grids that get finer towards
    t = 0 (and π/2), as EDM's does. On one uniform in t the steps in λ next to these ends stay long: the error is Δt² ln(1/Δt).
    """
    _check(x, times, sigma_data)
    before: tuple[float, Tensor] | None = None
    for s, t in pairwise(times):
        v_s = _evaluate(net, x, s, sigma_data)
        p_s = predict(x, v_s, s)
        x = _rotate(x, v_s, s, t)
        if before is not None and t > 0:
            inverse_r = (_log_tan(s) - _log_tan(t)) / (_log_tan(before[0]) - _log_tan(s))
            x = x + (weight(s) * math.sin(s - t) / 2 * inverse_r) * (p_s - before[1])
        before = s, p_s
    return x


def dpm2m(net: Net, x: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """DPM-Solver-2M (Lu et al. 2022; App. B.4): second order with one evaluation a step; NFE = number of steps.

    x_t/cos t = x_s/cos s − ∫ e^{−λ} ε dλ from λ_s to λ_t. With ε ≈ ε_s + (λ − λ_s) (ε_s − ε_s')/(λ_s − λ_s'), h = λ_t − λ_s, the
    integral is e^{−λ_t} [(e^h − 1) ε_s + (e^h − 1 − h)/(r h) (ε_s − ε_s')], and (e^h − 1 − h)/h = (e^h − 1)/2 + O(h²). As
    sin t (e^h − 1) = sin(s−t)/cos s, the correction is −sin(s−t)/(2 r cos s) (ε_s − ε_s'). Shapes, units and errors as in `ddim`.
    """
    return _two_step(net, x, times, sigma_data, _noise, lambda s: -1 / math.cos(s))


def dpmpp2m(net: Net, x: Tensor, times: Sequence[float], sigma_data: float) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022; App. B.4), the same with the predicted data; NFE = number of steps.

    x_t/sin t = x_s/sin s + ∫ e^{λ} D dλ, D linear in λ as ε is in `dpm2m`: cos t (1 − e^{−h}) = sin(s−t)/sin s gives the correction
    + sin(s−t)/(2 r sin s) (D_s − D_s'). Shapes, units and errors as in `ddim`.
    """
    return _two_step(net, x, times, sigma_data, _data, lambda s: 1 / math.sin(s))


SOLVERS: dict[str, Solver] = {"heun": heun, "ddim": ddim, "dpm2m": dpm2m, "dpmpp2m": dpmpp2m}


def diffusion_nfe(solver: str, steps: int, guidance: bool) -> int:
    """Forward passes for one sample: 2·steps − 1 (Heun) or steps (the others), twice that with guidance.

    Raises ValueError for an unknown solver or steps < 1.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return (2 * steps - 1 if solver == "heun" else steps) * (2 if guidance else 1)
