# SPDX-License-Identifier: Apache-2.0
"""The solvers on Gaussian data: measured order of convergence, and equality with the published forms in their own variables."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scm_core.sampling import (
    SOLVERS,
    ddim,
    dpm2m,
    dpmpp2m,
    heun,
    sample_diffusion,
    segment_times,
    sigma_grid,
    time_grid,
)
from scm_core.trigflow import t_max

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (1, 2, 3)
ORDERS = {"ddim": 1, "heun": 2, "dpm2m": 2, "dpmpp2m": 2}
WITHIN = {1: 0.1, 2: 0.15}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def order_of(solver: str, data: Any, grids: list[list[float]]) -> float:
    """The log-log slope of the error at the end of the grid against the number of steps."""
    errors = []
    for grid in grids:
        x = data.start(4, grid[0], seed=3)
        end = SOLVERS[solver](data.diffusion_net, x, grid, SIGMA_DATA)
        errors.append(float((end - data.along_the_ode(x, grid[0], grid[-1])).abs().max()))
    assert all(error > 1e-11 for error in errors)  # above rounding
    counts = [len(grid) - 1 for grid in grids]
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def uniform(start: float, end: float, n: int) -> list[float]:
    return [start + (end - start) * i / n for i in range(n)] + [end]


@pytest.mark.parametrize("solver", ORDERS)
def test_order_uniform_in_t(data: Any, solver: str) -> None:
    """On a piece of the PF-ODE that is smooth in t and in λ = −ln tan t, away from their ends: the order proper."""
    grids = [uniform(1.3, 0.1, n) for n in (64, 128, 256, 512)]
    order = ORDERS[solver]
    assert order_of(solver, data, grids) == pytest.approx(order, abs=WITHIN[order])


@pytest.mark.parametrize("solver", ORDERS)
def test_order_down_to_zero(data: Any, solver: str) -> None:
    """To t = 0, where the last step is of first order, on a grid that gets finer there (t ∝ (1 − i/n)²)."""
    grids = [[1.3 * (1 - i / n) ** 2 for i in range(n + 1)] for n in (64, 128, 256, 512)]
    order = ORDERS[solver]
    assert order_of(solver, data, grids) == pytest.approx(order, abs=WITHIN[order])


@pytest.mark.parametrize("solver", ["ddim", "dpm2m", "dpmpp2m"])
def test_order_from_zero_signal(data: Any, solver: str) -> None:
    """From exactly π/2, where tan t and −λ are infinite, to 0, finer at both ends. (Heun's method cannot start there.)"""
    grids = [
        [math.pi / 2 * math.sin(math.pi / 2 * (1 - i / n)) ** 2 for i in range(n + 1)] for n in (64, 128, 256, 512)
    ]
    assert all(grid[0] == math.pi / 2 for grid in grids)
    order = ORDERS[solver]
    assert order_of(solver, data, grids) == pytest.approx(order, abs=WITHIN[order])


@pytest.mark.parametrize(("solver", "start", "end"), [("dpm2m", 1.3, 0.0), ("dpmpp2m", math.pi / 2, 0.1)])
def test_two_step_solvers_lose_a_logarithm_on_uniform_grids(data: Any, solver: str, start: float, end: float) -> None:
    """Uniform in t to an end of λ, step k from that end has length ~1/k in λ however large n is: Σ Δt²/k = Δt² ln n.

    So n² · error grows by the same amount with each doubling of n, which no power of n does.
    """
    scaled = []
    for n in (512, 1024, 2048):
        grid = uniform(start, end, n)
        x = data.start(4, start, seed=3)
        error = SOLVERS[solver](data.diffusion_net, x, grid, SIGMA_DATA) - data.along_the_ode(x, start, end)
        scaled.append(n**2 * error)
    first, second = (float((b - a).abs().max()) for a, b in pairwise(scaled))
    assert second == pytest.approx(first, rel=0.1)


@pytest.mark.parametrize("solver", ORDERS)
def test_order_on_edms_grid(data: Any, solver: str) -> None:
    """On EDM's levels from σ = 80, refined, to σ = 0.002.

    Not to 0: the step from 0.002 to 0 is one of first order and does not get shorter with n, so that its error would be a floor.
    The narrowest dimension (0.05) needs a few hundred steps before the asymptotic order shows.
    """
    grids = [time_grid(n + 1, SIGMA_DATA)[:-1] for n in (128, 256, 512, 1024)]
    order = ORDERS[solver]
    assert order_of(solver, data, grids) == pytest.approx(order, abs=WITHIN[order])


# --- in the original variables ------------------------------------------------------------------------------------------------------


def test_heun_is_edms_algorithm_1(data: Any) -> None:
    """`sample_diffusion` from σ = 80 to 0 is EDM's deterministic sampler, written here in σ with EDM's denoiser."""
    steps = 18
    z = SIGMA_DATA * normal(8, *SHAPE, seed=5)
    sigma = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)] + [0.0]
    x = 80 * z / SIGMA_DATA  # N(0, 80²)
    for now, following in pairwise(sigma):
        slope = (x - data.denoiser(x, now)) / now
        x_next = x + (following - now) * slope
        if following:
            slope_next = (x_next - data.denoiser(x_next, following)) / following
            x_next = x + (following - now) * (slope + slope_next) / 2
        x = x_next
    got = sample_diffusion(data.diffusion_net, z, steps, SIGMA_DATA, solver="heun")
    torch.testing.assert_close(got, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.tensor(sigma_grid(steps)), torch.tensor(sigma[:-1]), rtol=1e-12, atol=0)
    exact = data.consistency(math.sin(t_max(SIGMA_DATA)) * z, torch.full((8,), t_max(SIGMA_DATA), dtype=F64))
    assert 1e-6 < (got - exact).abs().max() < 0.05  # 18 steps come close to the solution


def two_step_in_sigma(denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigma: list[float], form: str) -> Tensor:
    """DPM-Solver-2M ("noise") and ++(2M) ("data") of their papers for x_σ = x0 + σ ε: α = 1, λ = −ln σ, first and last step of order 1."""
    before: tuple[float, Tensor] | None = None
    for now, following in pairwise(sigma):
        D = denoise(x, now)
        p = D if form == "data" else (x - D) / now
        if before is None or following == 0:
            slope = p
        else:
            h, h_before = math.log(now / following), math.log(before[0] / now)
            r = h_before / h
            slope = (1 + 1 / (2 * r)) * p - 1 / (2 * r) * before[1]
        if following == 0:
            x = D
        elif form == "data":
            x = following / now * x - math.expm1(-math.log(now / following)) * slope
        else:
            x = x - following * math.expm1(math.log(now / following)) * slope
        before = now, p
    return x


@pytest.mark.parametrize(("solver", "form"), [("dpm2m", "noise"), ("dpmpp2m", "data")])
def test_two_step_solvers_are_the_published_ones(data: Any, solver: str, form: str) -> None:
    """In TrigFlow variables the 2M solvers give what they give in their papers' form on the same levels."""
    z = SIGMA_DATA * normal(8, *SHAPE, seed=5)
    levels = [*sigma_grid(18), 0.0]
    expected = two_step_in_sigma(data.denoiser, 80 * z / SIGMA_DATA, levels, form)
    got = sample_diffusion(data.diffusion_net, z, 18, SIGMA_DATA, solver=solver)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    first_order = sample_diffusion(data.diffusion_net, z, 18, SIGMA_DATA, solver="ddim")
    assert (got - first_order).abs().max() > 1e-3


# --- ends ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [dpm2m, dpmpp2m])
def test_first_and_last_step_are_of_first_order(data: Any, solver: Callable[..., Tensor]) -> None:
    """One step, and the last one to t = 0, are DDIM's; a step in between is not."""
    x = data.start(4, 1.3, seed=3)
    assert torch.equal(
        solver(data.diffusion_net, x, [1.3, 0.5], SIGMA_DATA), ddim(data.diffusion_net, x, [1.3, 0.5], SIGMA_DATA)
    )
    one_by_one = ddim(data.diffusion_net, x, [1.3, 0.5, 0.0], SIGMA_DATA)
    assert torch.equal(solver(data.diffusion_net, x, [1.3, 0.5, 0.0], SIGMA_DATA), one_by_one)
    inner = solver(data.diffusion_net, x, [1.3, 0.5, 0.1], SIGMA_DATA)
    assert not torch.allclose(inner, ddim(data.diffusion_net, x, [1.3, 0.5, 0.1], SIGMA_DATA), atol=1e-3)


@pytest.mark.parametrize("solver", [dpm2m, dpmpp2m])
def test_step_after_infinite_noise_is_of_first_order(data: Any, solver: Callable[..., Tensor]) -> None:
    """λ_s' = −∞ at π/2: nothing can be extrapolated from there; the third step is of second order again."""
    x, net = SIGMA_DATA * normal(4, *SHAPE, seed=3), data.diffusion_net
    grid = [math.pi / 2, 1.2, 0.5, 0.1]
    assert torch.equal(solver(net, x, grid[:3], SIGMA_DATA), ddim(net, x, grid[:3], SIGMA_DATA))
    assert not torch.allclose(solver(net, x, grid, SIGMA_DATA), ddim(net, x, grid, SIGMA_DATA), atol=1e-3)


@pytest.mark.parametrize("solver", ORDERS)
def test_solvers_approach_the_exact_endpoint(data: Any, solver: str) -> None:
    """On EDM's grid to 0, too, more steps bring the sample closer to the PF-ODE's endpoint."""
    z = SIGMA_DATA * normal(8, *SHAPE, seed=5)
    exact = data.consistency(math.sin(t_max(SIGMA_DATA)) * z, torch.full((8,), t_max(SIGMA_DATA), dtype=F64))
    few, many = (
        float((sample_diffusion(data.diffusion_net, z, n, SIGMA_DATA, solver) - exact).abs().max()) for n in (20, 160)
    )
    assert many < few / (5 if solver == "ddim" else 30)


def test_heun_refuses_infinite_noise(data: Any) -> None:
    """Its slope in σ has no meaning at t = π/2, where the rounded tangent would give finite nonsense."""
    with pytest.raises(ValueError, match="times: expected to start below π/2"):
        heun(data.diffusion_net, normal(1, *SHAPE, seed=0), [math.pi / 2, 1.0, 0.0], SIGMA_DATA)


def test_time_grid_ends_at_zero() -> None:
    """EDM's levels as times: from arctan(160), strictly descending, to arctan(0.004) and 0."""
    grid = time_grid(18, SIGMA_DATA)
    assert len(grid) == 19
    assert grid[0] == pytest.approx(math.atan(160))
    assert grid[-2] == pytest.approx(math.atan(0.004))
    assert grid[-1] == 0
    assert all(b < a for a, b in pairwise(grid))


@pytest.mark.parametrize("segments", [1, 2, 7, 16])
def test_segments_are_equal(segments: int) -> None:
    """From exactly t_max to exactly 0 in M equal steps of t."""
    boundaries = segment_times(segments, SIGMA_DATA)
    assert len(boundaries) == segments + 1
    assert boundaries[0] == t_max(SIGMA_DATA)
    assert boundaries[-1] == 0
    assert -np.diff(boundaries) == pytest.approx(t_max(SIGMA_DATA) / segments, rel=1e-12)
