# SPDX-License-Identifier: Apache-2.0
"""Networks of other schedules as a TrigFlow F, on Gaussian data: sampling through the wrapper equals sampling in the original variables."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core.conversions import (
    CosineSchedule,
    EDMNetwork,
    EDMSchedule,
    FlowSchedule,
    LinearVPSchedule,
    Schedule,
    TrigFlowNet,
    edm_denoiser,
    flow_velocity,
    from_trigflow,
    to_trigflow,
)
from scm_core.sampling import ddim, sample_diffusion, sigma_grid
from scm_core.tangent import scm_tangent
from scm_core.trigflow import t_max

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (1, 2, 3)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# name: schedule, (α, σ) and its derivatives (α', σ') at a time s, written out as numbers of s, and times of the schedule to visit
Form = tuple[Schedule, Callable[[float], tuple[float, float]], Callable[[float], tuple[float, float]], list[float]]
VP = (0.1, 20.0)


def vp(s: float) -> tuple[float, float]:
    alpha = math.exp(-(VP[1] - VP[0]) * s**2 / 4 - VP[0] * s / 2)
    return alpha, math.sqrt(1 - alpha**2)


def vp_rates(s: float) -> tuple[float, float]:
    alpha, sigma = vp(s)
    beta = VP[0] + (VP[1] - VP[0]) * s
    return -beta * alpha / 2, beta * alpha**2 / (2 * sigma)


FORMS: dict[str, Form] = {
    "edm": (EDMSchedule(), lambda s: (1.0, s), lambda s: (0.0, 1.0), [80.0, 5.0, 0.7, 0.1, 0.002]),
    "flow": (FlowSchedule(), lambda s: (1 - s, s), lambda s: (-1.0, 1.0), [0.99, 0.7, 0.4, 0.1, 0.002]),
    "reversed flow": (
        FlowSchedule(reverse=True),
        lambda s: (s, 1 - s),
        lambda s: (1.0, -1.0),
        [0.01, 0.3, 0.6, 0.9, 0.998],
    ),
    "cosine": (
        CosineSchedule(),
        lambda s: (math.cos(math.pi * s / 2), math.sin(math.pi * s / 2)),
        lambda s: (-math.pi / 2 * math.sin(math.pi * s / 2), math.pi / 2 * math.cos(math.pi * s / 2)),
        [0.99, 0.7, 0.4, 0.1, 0.002],
    ),
    "linear vp": (LinearVPSchedule(*VP), vp, vp_rates, [1.0, 0.7, 0.4, 0.1, 0.002]),
}
PREDICTIONS = ["x0", "epsilon", "velocity", "flow"]


def posterior(data: Any, x_s: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """E[x0 | x_s] and E[ε | x_s] for x_s = α x0 + σ ε."""
    residual = (x_s - alpha * data.mean) / (alpha**2 * data.std**2 + sigma**2)
    return data.mean + alpha * data.std**2 * residual, sigma * residual


def network_of(data: Any, form: Form, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The ideal network of the schedule in its own variables; it sees one time a batch, as in sampling, or one for each sample."""
    _, coefficients, rates, _ = form

    def at(x_s: Tensor, s: float) -> Tensor:
        alpha, sigma = coefficients(s)
        x0, eps = posterior(data, x_s, alpha, sigma)
        if prediction == "flow":
            a, b = rates(s)
            return a * x0 + b * eps
        return {"x0": x0, "epsilon": eps, "velocity": alpha * eps - sigma * x0}[prediction]

    return lambda x_s, s: torch.stack([at(x, float(time))[0] for x, time in zip(x_s.split(1), s, strict=True)])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", FORMS)
def test_wrapped_network_is_the_optimal_F(data: Any, name: str, prediction: str) -> None:
    """E[x0 | ·], E[ε | ·] or a velocity of any schedule, wrapped, is E[v_t | x_t]/σ_d."""
    form = FORMS[name]
    s = torch.tensor(form[3], dtype=F64)
    alpha, sigma = (torch.tensor(c, dtype=F64) for c in zip(*map(form[1], form[3]), strict=True))
    t = torch.atan(sigma / (SIGMA_DATA * alpha))
    x = normal(len(s), *SHAPE, seed=1)
    got = TrigFlowNet(network_of(data, form, prediction), form[0], prediction, SIGMA_DATA)(x, t)  # type: ignore[arg-type]
    # at t ~ 0.004 a denoiser's rounding grows by 1/(σ_d sin t) = 500
    torch.testing.assert_close(got, data.diffusion_net(x, t), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FORMS)
def test_points_round_trip(data: Any, name: str) -> None:
    """x_s, s → x_t, t → x_s, s; t and x_t are those of the definition."""
    schedule, coefficients, _, times = FORMS[name]
    s = torch.tensor(times, dtype=F64)
    x_s = normal(len(s), *SHAPE, seed=1)
    x_t, t = to_trigflow(x_s, s, schedule, SIGMA_DATA)
    for i, time in enumerate(times):
        alpha, sigma = coefficients(time)
        assert float(t[i]) == pytest.approx(math.atan(sigma / (SIGMA_DATA * alpha)), rel=1e-13)
        root = math.sqrt(alpha**2 * SIGMA_DATA**2 + sigma**2)
        torch.testing.assert_close(x_t[i], x_s[i] * SIGMA_DATA / root, rtol=1e-13, atol=0)
    back, again = from_trigflow(x_t, t, schedule, SIGMA_DATA)
    torch.testing.assert_close(back, x_s, rtol=1e-10, atol=0)
    torch.testing.assert_close(again, s, rtol=1e-10, atol=1e-12)
    forth, once_more = to_trigflow(back, again, schedule, SIGMA_DATA)
    torch.testing.assert_close(forth, x_t, rtol=1e-10, atol=0)
    torch.testing.assert_close(once_more, t, rtol=1e-10, atol=0)
    point = schedule.at(t, SIGMA_DATA)
    for got, expected in zip((point.alpha, point.sigma), schedule.coefficients(point.s), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# --- sampling ------------------------------------------------------------------------------------------------------------------------


def test_edm_heun_through_the_wrapper(data: Any) -> None:
    """EDM's deterministic sampler in σ with the denoiser = `sample_diffusion` with the wrapped denoiser."""
    steps = 18
    sigma = [*sigma_grid(steps), 0.0]
    z = SIGMA_DATA * normal(8, *SHAPE, seed=5)
    x = 80 * z / SIGMA_DATA
    for now, following in pairwise(sigma):
        slope = (x - data.denoiser(x, now)) / now
        x_next = x + (following - now) * slope
        if following:
            slope_next = (x_next - data.denoiser(x_next, following)) / following
            x_next = x + (following - now) * (slope + slope_next) / 2
        x = x_next
    wrapped = edm_denoiser(lambda x, s: data.denoiser(x, float(s[0])), SIGMA_DATA)
    torch.testing.assert_close(sample_diffusion(wrapped, z, steps, SIGMA_DATA, "heun"), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", FORMS)
def test_ddim_through_the_wrapper(data: Any, name: str, prediction: str) -> None:
    """DDIM in the original variables, x_r = α_r x̂0 + σ_r ε̂ with the network's own x̂0 and ε̂, equals DDIM through the wrapper."""
    form = FORMS[name]
    schedule, coefficients, rates, times = form
    net = network_of(data, form, prediction)
    x = start = normal(4, *SHAPE, seed=5)
    for s, r in pairwise(times):
        alpha, sigma = coefficients(s)
        p = net(x, torch.full((4,), s, dtype=F64))
        if prediction == "x0":
            x0, eps = p, (x - alpha * p) / sigma
        elif prediction == "epsilon":
            x0, eps = (x - sigma * p) / alpha, p
        else:
            a, b = rates(s) if prediction == "flow" else (-sigma, alpha)
            pair = torch.linalg.solve(
                torch.tensor([[alpha, sigma], [a, b]], dtype=F64), torch.stack([x, p]).reshape(2, -1)
            )
            x0, eps = pair.reshape(2, *x.shape)
        x = coefficients(r)[0] * x0 + coefficients(r)[1] * eps
    wrapped = TrigFlowNet(net, schedule, prediction, SIGMA_DATA)  # type: ignore[arg-type]
    x_t, _ = to_trigflow(start, torch.full((4,), times[0], dtype=F64), schedule, SIGMA_DATA)
    grid = [math.atan2(coefficients(s)[1], SIGMA_DATA * coefficients(s)[0]) for s in times]
    got = ddim(wrapped, x_t, grid, SIGMA_DATA)
    end, _ = to_trigflow(x, torch.full((4,), times[-1], dtype=F64), schedule, SIGMA_DATA)
    torch.testing.assert_close(got, end, rtol=1e-10, atol=1e-10)


def test_eulers_method_of_flow_matching_is_ddim(data: Any) -> None:
    """On x_s = (1 − s) x0 + s ε, Euler's x_r = x_s + (r − s) u holds x̂0 and ε̂ = x̂0 + u fixed, as DDIM does: pure noise to data."""
    times = [1.0, 0.8, 0.5, 0.2, 0.0]
    net = network_of(data, FORMS["flow"], "flow")
    x = start = normal(4, *SHAPE, seed=5)
    for s, r in pairwise(times):
        x = x + (r - s) * net(x, torch.full((4,), s, dtype=F64))
    grid = [math.atan2(s, SIGMA_DATA * (1 - s)) for s in times]  # from π/2 to 0
    assert grid[0] == math.pi / 2
    got = ddim(flow_velocity(net, SIGMA_DATA), SIGMA_DATA * start, grid, SIGMA_DATA)
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


# --- derivatives and ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["func", "finite_difference"])
@pytest.mark.parametrize("name", ["edm", "flow", "reversed flow", "cosine", "linear vp"])
def test_tangent_through_the_wrapper(data: Any, name: str, engine: str) -> None:
    """The tangent of Algorithm 1 of a wrapped network is that of the closed form: the wrapper is differentiable in x and t."""
    schedule = FORMS[name][0]

    def velocity(x_s: Tensor, s: Tensor) -> Tensor:
        alpha, sigma = (c[:, None, None, None] for c in schedule.coefficients(s))
        residual = (x_s - alpha * data.mean) / (alpha**2 * data.std**2 + sigma**2)
        return alpha * sigma * residual - sigma * (data.mean + alpha * data.std**2 * residual)

    wrapped = TrigFlowNet(velocity, schedule, "velocity", SIGMA_DATA)
    t = torch.tensor([1e-3, 0.2, 0.9, 1.4, t_max(SIGMA_DATA)], dtype=F64)
    x_t = SIGMA_DATA * normal(5, *SHAPE, seed=1)
    dxdt = data.ode(x_t, t)
    _, expected = scm_tangent(data.diffusion_net, x_t, t, dxdt, SIGMA_DATA, normalize="none")
    _, got = scm_tangent(wrapped, x_t, t, dxdt, SIGMA_DATA, normalize="none", engine=engine)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 if engine == "func" else 1e-6)


def test_raw_edm_network_is_minus_F(data: Any) -> None:
    """D = c_skip x_σ + c_out raw(c_in x_σ, ¼ ln σ) wrapped as a denoiser and the raw network wrapped directly are the same F."""

    def raw(x: Tensor, c_noise: Tensor) -> Tensor:
        return torch.tanh(x + c_noise[:, None, None, None])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        total = s**2 + SIGMA_DATA**2
        c_skip, c_out, c_in = SIGMA_DATA**2 / total, s * SIGMA_DATA / total.sqrt(), 1 / total.sqrt()
        return c_skip * x + c_out * raw(c_in * x, sigma.log() / 4)

    t = torch.atan(torch.logspace(-3, 2.2, 20, dtype=F64))
    x = normal(20, *SHAPE, seed=1)
    direct = EDMNetwork(raw, SIGMA_DATA)(x, t)
    torch.testing.assert_close(edm_denoiser(denoise, SIGMA_DATA)(x, t), direct, rtol=0, atol=1e-11)
    # near t = 0 in single precision: the denoiser's route divides rounding by σ_d sin t, the direct one does not
    small, x32 = torch.full((20,), 1e-4), x.float()
    exact = EDMNetwork(raw, SIGMA_DATA)(x32.double(), small.double())
    assert (EDMNetwork(raw, SIGMA_DATA)(x32, small) - exact).abs().max() < 1e-6
    bound = 4 * torch.finfo(torch.float32).eps * float(x32.abs().max()) / math.sin(1e-4)
    error = float((edm_denoiser(denoise, SIGMA_DATA)(x32, small) - exact).abs().max())
    assert 1e-5 < error < bound


@pytest.mark.parametrize("reverse", [False, True])
def test_velocities_keep_single_precision_at_both_ends(data: Any, reverse: bool) -> None:
    """A flow-matching velocity gives F to float32's rounding at every t, 0 and π/2 included."""
    name = "reversed flow" if reverse else "flow"
    wrapped = flow_velocity(network_of(data, FORMS[name], "flow"), SIGMA_DATA, reverse)
    t = torch.tensor([0.0, 1e-6, 1e-3, 0.8, t_max(SIGMA_DATA), math.pi / 2])
    x = normal(6, *SHAPE, seed=1)
    # the narrowest dimension (0.05) of the closed form itself asks for a few more digits than the wrapper
    torch.testing.assert_close(wrapped(x.float(), t).double(), data.diffusion_net(x, t.double()), rtol=1e-5, atol=1e-5)
