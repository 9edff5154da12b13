# SPDX-License-Identifier: Apache-2.0
"""The tangent and consistency sampling on Gaussian data, where the truth is known in closed form (`Gaussian` in conftest.py)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scm_core.engines import Engine
from scm_core.sampling import sample_consistency, sample_multistep, segment_times
from scm_core.tangent import scm_tangent
from scm_core.trigflow import consistency_function, diffuse, t_max, velocity

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (1, 2, 3)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def times(count: int, low: float = 1e-3, high: float = t_max(SIGMA_DATA)) -> Tensor:
    """Times over the whole range of training and sampling, dense at both ends."""
    return torch.atan(torch.logspace(math.log10(math.tan(low)), math.log10(math.tan(high)), count, dtype=F64))


def at_times(data: Any, t: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x0, z and x_t at each time."""
    x0, z = data.sample(len(t), seed), SIGMA_DATA * normal(len(t), *SHAPE, seed=seed + 1)
    return x0, z, diffuse(x0, z, t)


# --- the oracle itself ---------------------------------------------------------------------------------------------------------------


def test_closed_form_solves_the_ode(data: Any) -> None:
    """The consistency function is where an independent integrator of the PF-ODE (scipy, DOP853) arrives at t = 0."""
    for t in (0.3, 1.1, t_max(SIGMA_DATA)):
        *_, x_t = at_times(data, torch.tensor([t], dtype=F64))

        def slope(s: float, y: np.ndarray) -> np.ndarray:
            return data.ode(torch.from_numpy(y).reshape(1, *SHAPE), torch.tensor([s], dtype=F64)).numpy().ravel()

        end = solve_ivp(slope, (t, 0.0), x_t.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
        expected = data.consistency(x_t, torch.tensor([t], dtype=F64)).numpy().ravel()
        np.testing.assert_allclose(end, expected, rtol=1e-8, atol=1e-9)


def test_regression_on_the_sample_velocity_gives_the_ode(data: Any) -> None:
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


@pytest.mark.parametrize(
    ("engine", "tolerance"),
    # A central difference of step h = ε^{1/3} is exact to h² and divides the rounding of F by h: ε/h = 4e-11, times the 1/(σ_d sin t) = 2e3
    # by which this F's own formula amplifies rounding at t = 1e-3.
    [("auto", 1e-9), ("func", 1e-9), ("finite_difference", 1e-6)],
)
def test_tangent_of_the_true_consistency_function_vanishes(data: Any, engine: Engine, tolerance: float) -> None:
    """Along the PF-ODE f is constant: g = cos(t) df/dt = 0 from t = 1e-3 to arctan(160)."""
    t = times(200)
    assert float(t[0]) == pytest.approx(1e-3)
    assert float(t[-1]) == pytest.approx(math.atan(160))
    *_, x_t = at_times(data, t)
    dxdt = data.ode(x_t, t)
    F, g = scm_tangent(data.consistency_net, x_t, t, dxdt, SIGMA_DATA, normalize="none", engine=engine)
    assert g.abs().max() < tolerance
    torch.testing.assert_close(
        consistency_function(F, x_t, t, SIGMA_DATA), data.consistency(x_t, t), rtol=1e-12, atol=1e-12
    )


def test_tangent_of_the_denoiser_does_not_vanish(data: Any) -> None:
    """The same with the diffusion model's F, which is no consistency function: the test above can fail."""
    t = times(20, 0.1, 1.5)
    *_, x_t = at_times(data, t)
    _, g = scm_tangent(data.diffusion_net, x_t, t, data.ode(x_t, t), SIGMA_DATA, normalize="none")
    assert (g.abs().flatten(1).amax(1) > 1e-3).all()


def test_expected_tangent_along_the_data_vanishes_for_the_truth(data: Any) -> None:
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
def test_tangent_is_cos_t_times_the_total_derivative_along_the_ode(data: Any, own: str) -> None:
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


# --- consistency sampling ------------------------------------------------------------------------------------------------------------


def test_one_step_lands_on_the_exact_endpoint(data: Any) -> None:
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
def test_consistency_sampling_keeps_the_data_distribution(data: Any, times_used: tuple[float, ...]) -> None:
    """Re-noising and mapping back with the true consistency function gives the data's mean and variance at any number of steps."""
    count = 100_000
    z = SIGMA_DATA * normal(count, *SHAPE, seed=5)
    x = sample_consistency(data.consistency_net, z, times_used, SIGMA_DATA, torch.Generator().manual_seed(6))
    error = 5 * data.std / count**0.5
    start_bias = (data.std / SIGMA_DATA * math.cos(times_used[0]) * data.mean.abs()) if len(times_used) == 1 else 0
    assert ((x.mean(0) - data.mean).abs() < error + start_bias).all()
    assert ((x.std(0) / data.std - 1).abs() < 5 / (2 * count) ** 0.5 + 1e-3).all()


def test_second_step_uses_fresh_noise(data: Any) -> None:
    """Two steps: x̂0 of the first, re-noised at t_mid with z', mapped back; written out (§5.2)."""
    z, fresh = SIGMA_DATA * normal(4, *SHAPE, seed=5), SIGMA_DATA * normal(4, *SHAPE, seed=6)
    first, t_mid = t_max(SIGMA_DATA), 1.1
    x0 = data.consistency(math.sin(first) * z, torch.full((4,), first, dtype=F64))
    middle = math.cos(t_mid) * x0 + math.sin(t_mid) * fresh
    expected = data.consistency(middle, torch.full((4,), t_mid, dtype=F64))
    got = sample_consistency(data.consistency_net, z, (first, t_mid), SIGMA_DATA, noise=[fresh])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("segments", [1, 2, 3, 8, 16])
def test_multistep_sampling_lands_on_the_exact_endpoint(data: Any, segments: int) -> None:
    """With the true f_s of each segment, from its upper boundary t to its lower one s, M steps are the PF-ODE's solution at 0."""
    boundaries = segment_times(segments, SIGMA_DATA)

    def segment_net(x: Tensor, t: Tensor) -> Tensor:
        """F = (cos(t−s) x_t − f_s)/(σ_d sin(t−s)), s the next boundary below t."""
        now = float(t[0])
        s = max(b for b in boundaries if b < now)
        x_t = SIGMA_DATA * x
        return (math.cos(now - s) * x_t - data.along_the_ode(x_t, now, s)) / (SIGMA_DATA * math.sin(now - s))

    z = SIGMA_DATA * normal(8, *SHAPE, seed=5)
    start = t_max(SIGMA_DATA)
    exact = data.consistency(math.sin(start) * z, torch.full((8,), start, dtype=F64))
    got = sample_multistep(segment_net, z, segments, SIGMA_DATA)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    # one step with the wrong end would not: the test can fail
    if segments > 1:
        assert not torch.allclose(sample_multistep(segment_net, z, segments - 1, SIGMA_DATA), exact, atol=1e-3)


def test_one_segment_is_one_step_consistency_sampling(data: Any) -> None:
    """M = 1 gives the bits of `sample_consistency` at t_max, in float32 and float64."""
    for dtype in (F64, torch.float32):
        z = SIGMA_DATA * normal(8, *SHAPE, seed=5).to(dtype)
        one = sample_consistency(data.consistency_net, z, (t_max(SIGMA_DATA),), SIGMA_DATA)
        assert torch.equal(sample_multistep(data.consistency_net, z, 1, SIGMA_DATA), one)
