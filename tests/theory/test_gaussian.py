# SPDX-License-Identifier: Apache-2.0
"""Gaussian data, for which diffusion model, PF-ODE and consistency function are known in closed form.

For independent x0_i ~ N(m_i, λ_i²): x_t,i ~ N(cos t m_i, s_i²) with s_i² = cos²t λ_i² + sin²t σ_d². E[x0 | x_t] and E[z | x_t] make the
PF-ODE dx/dt = −sin t m + (s'/s) (x − cos t m), which carries (x − cos t m)/s along unchanged: f(x, t) = m + (λ/s(t)) (x − cos t m).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scm_core.sampling import ddim, heun, sample_consistency, sample_diffusion, sigma_grid, time_grid
from scm_core.tangent import scm_tangent
from scm_core.trigflow import consistency_function, diffuse, t_max, velocity

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (1, 2, 3)  # six dimensions, each with a variance of its own


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, diag(std²)), std unlike σ_d in every dimension; times have shape (B,)."""

    mean: Tensor
    std: Tensor

    def sample(self, count: int, seed: int) -> Tensor:
        return self.mean + self.std * normal(count, *SHAPE, seed=seed)

    def s(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t."""
        return (torch.cos(t) ** 2 * self.std**2 + torch.sin(t) ** 2 * SIGMA_DATA**2).sqrt()

    def denoiser(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + σ ε = x], in EDM's variables."""
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)

    def ode(self, x: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt = cos t E[z | x_t] − sin t E[x0 | x_t]."""
        t = t[:, None, None, None]
        residual = (x - torch.cos(t) * self.mean) / self.s(t) ** 2
        x0 = self.mean + torch.cos(t) * self.std**2 * residual
        z = torch.sin(t) * SIGMA_DATA**2 * residual
        return torch.cos(t) * z - torch.sin(t) * x0

    def consistency(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t), the end at t = 0 of the PF-ODE through (x, t)."""
        t = t[:, None, None, None]
        return self.mean + self.std / self.s(t) * (x - torch.cos(t) * self.mean)

    def diffusion_net(self, x: Tensor, t: Tensor) -> Tensor:
        """The optimal F of a diffusion model, E[v_t | x_t]/σ_d, of x = x_t/σ_d."""
        return self.ode(SIGMA_DATA * x, t) / SIGMA_DATA

    def consistency_net(self, x: Tensor, t: Tensor) -> Tensor:
        """The F of the true consistency function, (cos t x_t − f)/(σ_d sin t), of x = x_t/σ_d."""
        x_t, tb = SIGMA_DATA * x, t[:, None, None, None]
        return (torch.cos(tb) * x_t - self.consistency(x_t, t)) / (SIGMA_DATA * torch.sin(tb))


@pytest.fixture(scope="module")
def data() -> Gaussian:
    return Gaussian(
        mean=torch.tensor([0.0, 0.3, -0.7, 0.1, 1.0, -0.2], dtype=F64).reshape(SHAPE),
        std=torch.tensor([0.05, 0.2, 0.4, 0.5, 0.9, 1.5], dtype=F64).reshape(SHAPE),
    )


def times(count: int, low: float = 1e-3, high: float = t_max(SIGMA_DATA)) -> Tensor:
    """Times over the whole range of training and sampling, dense at both ends."""
    return torch.atan(torch.logspace(math.log10(math.tan(low)), math.log10(math.tan(high)), count, dtype=F64))


def at_times(data: Gaussian, t: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x0, z and x_t at each time."""
    x0, z = data.sample(len(t), seed), SIGMA_DATA * normal(len(t), *SHAPE, seed=seed + 1)
    return x0, z, diffuse(x0, z, t)


# --- the oracle itself ---------------------------------------------------------------------------------------------------------------


def test_closed_form_solves_the_ode(data: Gaussian) -> None:
    """The consistency function is where an independent integrator of the PF-ODE (scipy, DOP853) arrives at t = 0."""
    for t in (0.3, 1.1, t_max(SIGMA_DATA)):
        *_, x_t = at_times(data, torch.tensor([t], dtype=F64))

        def slope(s: float, y: np.ndarray) -> np.ndarray:
            return data.ode(torch.from_numpy(y).reshape(1, *SHAPE), torch.tensor([s], dtype=F64)).numpy().ravel()

        end = solve_ivp(slope, (t, 0.0), x_t.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
        expected = data.consistency(x_t, torch.tensor([t], dtype=F64)).numpy().ravel()
        np.testing.assert_allclose(end, expected, rtol=1e-8, atol=1e-9)


def test_regression_on_the_sample_velocity_gives_the_ode(data: Gaussian) -> None:
    """E[v_t | x_t], what the diffusion loss learns, is linear here: least squares on samples finds the closed form."""
    count, t = 200_000, 0.8
    x0, z = data.sample(count, 0), SIGMA_DATA * normal(count, *SHAPE, seed=1)
    tb = torch.full((count,), t, dtype=F64)
    x_t, v_t = diffuse(x0, z, tb), velocity(x0, z, tb)
    xc, vc = x_t - x_t.mean(0), v_t - v_t.mean(0)
    slope = (xc * vc).mean(0) / (xc * xc).mean(0)
    probe = torch.stack([torch.zeros(SHAPE, dtype=F64), torch.ones(SHAPE, dtype=F64)])
    low, high = data.ode(probe, tb[:2])
    torch.testing.assert_close(slope, high - low, rtol=0, atol=0.02)
    torch.testing.assert_close(v_t.mean(0) - slope * x_t.mean(0), low, rtol=0, atol=0.02)


# --- the tangent ---------------------------------------------------------------------------------------------------------------------


def test_tangent_of_the_true_consistency_function_vanishes(data: Gaussian) -> None:
    """Along the PF-ODE f is constant: g = cos(t) df/dt = 0 from t = 1e-3 to arctan(160)."""
    t = times(200)
    *_, x_t = at_times(data, t)
    F, g = scm_tangent(data.consistency_net, x_t, t, data.ode(x_t, t), SIGMA_DATA, warmup=1.0, normalize="none")
    assert g.abs().max() < 1e-9
    torch.testing.assert_close(
        consistency_function(F, x_t, t, SIGMA_DATA), data.consistency(x_t, t), rtol=1e-12, atol=1e-12
    )


def test_tangent_of_the_denoiser_does_not_vanish(data: Gaussian) -> None:
    """The same with the diffusion model's F, which is no consistency function: the test above can fail."""
    t = times(20, 0.1, 1.5)
    *_, x_t = at_times(data, t)
    _, g = scm_tangent(data.diffusion_net, x_t, t, data.ode(x_t, t), SIGMA_DATA, normalize="none")
    assert (g.abs().flatten(1).amax(1) > 1e-3).all()


def test_expected_tangent_along_the_data_vanishes_for_the_truth(data: Gaussian) -> None:
    """sCT: with the sample's own velocity v_t in place of the ODE's, g is zero on average given x_t, not sample by sample."""
    count, t = 100_000, 0.9
    tb = torch.full((count,), t, dtype=F64)
    x0, z, x_t = at_times(data, tb)
    _, g = scm_tangent(data.consistency_net, x_t, tb, velocity(x0, z, tb), SIGMA_DATA, normalize="none")
    assert g.std() > 0.1
    residual = (x_t - math.cos(t) * data.mean) / data.s(torch.tensor(t))
    for moment in (g, g * residual, g * residual**2):  # uncorrelated with functions of x_t
        assert (moment.mean(0).abs() < 5 * moment.std(0) / count**0.5).all()


@pytest.mark.parametrize("own", ["diffusion_net", "nonlinear"])
def test_tangent_is_cos_t_times_the_total_derivative_along_the_ode(data: Gaussian, own: str) -> None:
    """g = cos(t) d/dt [cos t x_t − sin t σ_d F(x_t/σ_d, t)] along the exact solution x_t of the PF-ODE, by autograd."""

    def nonlinear(x: Tensor, t: Tensor) -> Tensor:
        tb = t[:, None, None, None]
        return torch.tanh(1.5 * x + tb) * torch.cos(3 * tb) + 0.2 * x.flip(-1) ** 2

    net: Callable[[Tensor, Tensor], Tensor] = getattr(data, own, nonlinear)
    t = times(50)
    *_, x_t = at_times(data, t)
    unit = (x_t - torch.cos(t)[:, None, None, None] * data.mean) / data.s(t[:, None, None, None])

    def f_along_the_ode(s: Tensor) -> Tensor:
        sb = s[:, None, None, None]
        x_s = torch.cos(sb) * data.mean + data.s(sb) * unit  # what is constant along the ODE is (x − cos t m)/s
        return torch.cos(sb) * x_s - torch.sin(sb) * SIGMA_DATA * net(x_s / SIGMA_DATA, s)

    _, total = torch.func.jvp(f_along_the_ode, (t,), (torch.ones_like(t),))
    _, g = scm_tangent(net, x_t, t, data.ode(x_t, t), SIGMA_DATA, normalize="none")
    torch.testing.assert_close(g, torch.cos(t)[:, None, None, None] * total, rtol=1e-9, atol=1e-9)


# --- solvers -------------------------------------------------------------------------------------------------------------------------


def order_of(solver: Callable[..., Tensor], data: Gaussian, start: float, end: float) -> float:
    """The log-log slope of the error at the end against the number of steps, uniform in t."""
    ts = torch.tensor([start, end], dtype=F64)
    unit = normal(4, *SHAPE, seed=3)
    x_start, x_end = (torch.cos(t) * data.mean + data.s(t) * unit for t in ts)
    counts, errors = [64, 128, 256, 512], []
    for n in counts:
        grid = [start + (end - start) * i / n for i in range(n)] + [end]
        errors.append(float((solver(data.diffusion_net, x_start, grid, SIGMA_DATA) - x_end).abs().max()))
    assert all(error > 1e-11 for error in errors)  # above rounding
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize("end", [0.1, 0.0])
def test_order_of_convergence(data: Gaussian, end: float) -> None:
    """DDIM converges with order 1, Heun with order 2, also where its last step, to t = 0, is first-order."""
    assert order_of(ddim, data, 1.3, end) == pytest.approx(1, abs=0.1)
    assert order_of(heun, data, 1.3, end) == pytest.approx(2, abs=0.15)


def test_heun_is_edms_algorithm_1(data: Gaussian) -> None:
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


@pytest.mark.parametrize("solver", ["heun", "ddim"])
def test_solvers_approach_the_exact_endpoint(data: Gaussian, solver: str) -> None:
    """On EDM's grid, too, more steps bring the sample closer to the PF-ODE's endpoint."""
    z = SIGMA_DATA * normal(8, *SHAPE, seed=5)
    exact = data.consistency(math.sin(t_max(SIGMA_DATA)) * z, torch.full((8,), t_max(SIGMA_DATA), dtype=F64))
    few, many = (
        float((sample_diffusion(data.diffusion_net, z, n, SIGMA_DATA, solver) - exact).abs().max()) for n in (20, 160)
    )
    assert many < few / (30 if solver == "heun" else 5)


def test_time_grid_ends_at_zero() -> None:
    """EDM's levels as times: from arctan(160), strictly descending, to arctan(0.004) and 0."""
    grid = time_grid(18, SIGMA_DATA)
    assert len(grid) == 19
    assert grid[0] == pytest.approx(math.atan(160))
    assert grid[-2] == pytest.approx(math.atan(0.004))
    assert grid[-1] == 0
    assert all(b < a for a, b in pairwise(grid))


# --- consistency sampling ------------------------------------------------------------------------------------------------------------


def test_one_step_lands_on_the_exact_endpoint(data: Gaussian) -> None:
    """With the true consistency function one step is the PF-ODE's solution, here by an independent integrator."""
    z = SIGMA_DATA * normal(1, *SHAPE, seed=5)
    start = t_max(SIGMA_DATA)

    def slope(s: float, y: np.ndarray) -> np.ndarray:
        return data.ode(torch.from_numpy(y).reshape(1, *SHAPE), torch.tensor([s], dtype=F64)).numpy().ravel()

    begin = (math.sin(start) * z).numpy().ravel()
    end = solve_ivp(slope, (start, 0.0), begin, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    got = sample_consistency(data.consistency_net, z, (start,), SIGMA_DATA)
    np.testing.assert_allclose(got.numpy().ravel(), end, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("times_used", [(t_max(SIGMA_DATA),), (t_max(SIGMA_DATA), 1.1), (math.pi / 2, 1.2, 0.6, 0.1)])
def test_consistency_sampling_keeps_the_data_distribution(data: Gaussian, times_used: tuple[float, ...]) -> None:
    """Re-noising and mapping back with the true consistency function gives the data's mean and variance at any number of steps."""
    count = 100_000
    z = SIGMA_DATA * normal(count, *SHAPE, seed=5)
    x = sample_consistency(data.consistency_net, z, times_used, SIGMA_DATA, torch.Generator().manual_seed(6))
    error = 5 * data.std / count**0.5
    start_bias = (data.std / SIGMA_DATA * math.cos(times_used[0]) * data.mean.abs()) if len(times_used) == 1 else 0
    assert ((x.mean(0) - data.mean).abs() < error + start_bias).all()
    assert ((x.std(0) / data.std - 1).abs() < 5 / (2 * count) ** 0.5 + 1e-3).all()


def test_second_step_uses_fresh_noise(data: Gaussian) -> None:
    """Two steps: x̂0 of the first, re-noised at t_mid with z', mapped back; written out (§5.2)."""
    z, fresh = SIGMA_DATA * normal(4, *SHAPE, seed=5), SIGMA_DATA * normal(4, *SHAPE, seed=6)
    first, t_mid = t_max(SIGMA_DATA), 1.1
    x0 = data.consistency(math.sin(first) * z, torch.full((4,), first, dtype=F64))
    middle = math.cos(t_mid) * x0 + math.sin(t_mid) * fresh
    expected = data.consistency(middle, torch.full((4,), t_mid, dtype=F64))
    got = sample_consistency(data.consistency_net, z, (first, t_mid), SIGMA_DATA, noise=[fresh])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
