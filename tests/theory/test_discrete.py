# SPDX-License-Identifier: Apache-2.0
"""Algorithm 2 against its definition, its continuous limit, and the log-normal that its grid discretises."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import norm as normal_law
from torch import Tensor

from scm_core.guidance import data_velocity, teacher_velocity
from scm_core.nn.embedding import LogVarHead
from scm_core.nn.small import SmallNet
from scm_core.objectives import Batch
from scm_core.objectives.consistency import scm_loss
from scm_core.objectives.discrete import (
    DiscreteObjective,
    discrete_tangent,
    interval_probabilities,
    interval_times,
    pass_before,
)
from scm_core.tangent import scm_tangent
from scm_core.trigflow import consistency_function, diffuse, t_max, velocity

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (2, 4, 4)
P_MEAN, P_STD = -1.0, 1.4
MEAN = torch.linspace(-0.7, 1.0, math.prod(SHAPE), dtype=F64).reshape(SHAPE)
STD = torch.linspace(0.05, 1.5, math.prod(SHAPE), dtype=F64).reshape(SHAPE)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def wide(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def gaussian_ode(x: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt of data N(MEAN, diag STD²): cos t E[z | x_t] − sin t E[x0 | x_t]."""
    cos, sin = torch.cos(wide(t)), torch.sin(wide(t))
    residual = (x - cos * MEAN) / (cos**2 * STD**2 + sin**2 * SIGMA_DATA**2)
    return cos * sin * SIGMA_DATA**2 * residual - sin * (MEAN + cos * STD**2 * residual)


def gaussian_net(x: Tensor, t: Tensor) -> Tensor:
    """The optimal diffusion model of that data; not a consistency function."""
    return gaussian_ode(SIGMA_DATA * x, t) / SIGMA_DATA


def small_net(dropout: float = 0.0, seed: int = 5, labels: int = 3, guidance_input: bool = False) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet(2, 4, labels=labels, width=8, blocks=2, dropout=dropout, guidance_input=guidance_input)
    for name, parameter in net.named_parameters():
        if "gain" in name:
            torch.nn.init.constant_(parameter, 0.8 + 0.4 * float(torch.rand(())))
    return net.double()


def points(t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t of Gaussian data, and its ODE's slope."""
    x_t = diffuse(MEAN + STD * randn(len(t), *SHAPE, seed=0), SIGMA_DATA * randn(len(t), *SHAPE, seed=1), t)
    return x_t, gaussian_ode(x_t, t)


T = torch.tensor([0.05, 0.3, 0.8, 1.2, 1.5], dtype=F64)
NETS = {"gaussian": gaussian_net, "small": small_net()}


# --- the tangent ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", NETS)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
def test_it_is_the_difference_quotient_of_the_consistency_function(own: str, ratio: float) -> None:
    """g = cos(t) (f(x_t, t) − f(x_t', t')) / sin(t − t') with x_t' by one DDIM step, from coarse steps to t' = 0."""
    net, (x_t, dxdt) = NETS[own], points(T)
    t_prev = ratio * T
    h = wide(T - t_prev)
    x_prev = torch.cos(h) * x_t - torch.sin(h) * dxdt
    f = consistency_function(net(x_t / SIGMA_DATA, T), x_t, T, SIGMA_DATA)
    f_prev = consistency_function(net(x_prev / SIGMA_DATA, t_prev), x_prev, t_prev, SIGMA_DATA)
    F, g, size = discrete_tangent(net, x_t, T, t_prev, dxdt, SIGMA_DATA, normalize="none")
    torch.testing.assert_close(g, torch.cos(wide(T)) * (f - f_prev) / torch.sin(h), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(F, net(x_t / SIGMA_DATA, T), rtol=0, atol=0)
    torch.testing.assert_close(size, g.flatten(1).norm(dim=1), rtol=1e-12, atol=0)


def order_in_the_step(net: Callable[..., Tensor], normalize: str, warmup: float) -> np.ndarray:
    """For each time the log-log slope of ‖g_discrete − g_continuous‖ against t − t'."""
    x_t, dxdt = points(T)
    _, limit = scm_tangent(net, x_t, T, dxdt, SIGMA_DATA, warmup, normalize)  # type: ignore[arg-type]
    steps = [2.0**-k for k in range(6, 12)]
    errors = []
    for step in steps:
        g = discrete_tangent(net, x_t, T, T * (1 - step), dxdt, SIGMA_DATA, warmup, normalize).g  # type: ignore[arg-type]
        errors.append((g - limit).detach().flatten(1).norm(dim=1).numpy())
    assert np.min(errors) > 1e-9  # far above rounding
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize("own", NETS)
@pytest.mark.parametrize(("normalize", "warmup"), [("none", 1.0), ("norm", 1.0), ("none", 0.3)])
def test_it_tends_to_the_continuous_tangent_at_first_order(own: str, normalize: str, warmup: float) -> None:
    """‖g_discrete − g_continuous‖ = O(t − t'): order 1.0 ± 0.1 at every time, warm-up and normalisation included."""
    np.testing.assert_allclose(order_in_the_step(NETS[own], normalize, warmup), 1.0, atol=0.1)


def test_it_vanishes_for_a_single_data_point_at_any_step() -> None:
    """All trajectories of a point mass are circles, which DDIM follows exactly: f = m, and Δ = 0 however coarse the grid."""
    grid = interval_times(8, SIGMA_DATA)
    t, t_prev = grid[1:], grid[:-1]
    x_t = diffuse(MEAN.expand(8, *SHAPE), SIGMA_DATA * randn(8, *SHAPE, seed=1), t)

    def truth(x: Tensor, t: Tensor) -> Tensor:
        sin = torch.sin(wide(t)).clamp(min=1e-30)  # at t = 0 nothing depends on F
        return (torch.cos(wide(t)) * SIGMA_DATA * x - MEAN) / (SIGMA_DATA * sin)

    dxdt = (torch.cos(wide(t)) * x_t - MEAN) / torch.sin(wide(t))
    g = discrete_tangent(truth, x_t, t, t_prev, dxdt, SIGMA_DATA, normalize="none").g
    assert g.abs().max() < 1e-9


@pytest.mark.parametrize("own", NETS)
def test_no_warmup_leaves_the_difference_to_the_velocity(own: str) -> None:
    """r = 0: g = −cos(t) cos(t') (σ_d F − dx_t/dt); F' plays no part."""
    net, (x_t, dxdt) = NETS[own], points(T)
    g = discrete_tangent(net, x_t, T, 0.9 * T, dxdt, SIGMA_DATA, warmup=0.0, normalize="none").g
    expected = -torch.cos(wide(T)) * torch.cos(wide(0.9 * T)) * (SIGMA_DATA * net(x_t / SIGMA_DATA, T) - dxdt)
    torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-13)


def test_single_precision_on_the_finest_grid() -> None:
    """4096 intervals in float32: the error stays that of F, some roundings, divided by the step."""
    net, rough = small_net(), small_net().float()
    grid = interval_times(4096, SIGMA_DATA).float()
    index = torch.linspace(2, 4096, 64).long()
    t, t_prev = grid[index], grid[index - 1]
    x_t, dxdt = (tensor.float() for tensor in points(t.double()))
    exact = discrete_tangent(
        net, x_t.double(), t.double(), t_prev.double(), dxdt.double(), SIGMA_DATA, normalize="none"
    ).g
    got = discrete_tangent(rough, x_t, t, t_prev, dxdt, SIGMA_DATA, normalize="none").g
    error = (got.double() - exact).abs().flatten(1).amax(1)
    assert got.dtype == torch.float32
    rounding = 4 * torch.finfo(torch.float32).eps
    amplified = torch.cos(t) * torch.sin(t_prev) / torch.sin(t - t_prev)
    assert (error < rounding * (1 + amplified)).all()
    assert (amplified > 100).any()


# --- dropout -------------------------------------------------------------------------------------------------------------------------


def test_one_dropout_mask_for_both_passes() -> None:
    """With dropout the quotient is the one of a single masked network: the passes seeded alike by hand agree, those seeded apart do not."""
    net, (x_t, dxdt) = small_net(dropout=0.5).train(), points(T)
    t_prev = T * (1 - 1e-4)
    h = wide(T - t_prev)
    x_prev = torch.cos(h) * x_t - torch.sin(h) * dxdt

    def quotient(seed: int, seed_prev: int) -> Tensor:
        torch.manual_seed(seed)
        f = consistency_function(net(x_t / SIGMA_DATA, T), x_t, T, SIGMA_DATA)
        torch.manual_seed(seed_prev)
        f_prev = consistency_function(net(x_prev / SIGMA_DATA, t_prev), x_prev, t_prev, SIGMA_DATA)
        return torch.cos(wide(T)) * (f - f_prev) / torch.sin(h)

    torch.manual_seed(3)
    g = discrete_tangent(net, x_t, T, t_prev, dxdt, SIGMA_DATA, normalize="none").g
    torch.testing.assert_close(g, quotient(3, 3), rtol=1e-6, atol=1e-9)
    assert (quotient(3, 4) - g).abs().max() > 10  # what two masks would give
    torch.manual_seed(4)
    other = discrete_tangent(net, x_t, T, t_prev, dxdt, SIGMA_DATA, normalize="none").g
    assert (other - g).abs().max() > 1e-3  # a new mask at every step


def test_the_pass_before_leaves_the_generator_as_it_was() -> None:
    """It draws the mask of the pass that follows, and keeps no graph."""
    net, x = small_net(dropout=0.5).train(), randn(5, *SHAPE, seed=2)
    torch.manual_seed(3)
    first = pass_before(net, x, T)
    assert not first.requires_grad
    assert torch.equal(first, net(x, T))
    assert not torch.equal(first, net(x, T))


# --- the grid and its proposal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intervals", [2, 256, 4096])
def test_grid_is_edms(intervals: int) -> None:
    """σ_i^{1/7} are evenly spaced from 0.002 to 80, t = arctan(σ/σ_d), and t_0 = 0; float32 tells all of them apart."""
    grid = interval_times(intervals, SIGMA_DATA)
    assert grid.shape == (intervals + 1,)
    assert grid[0] == 0
    assert float(grid[-1]) == pytest.approx(t_max(SIGMA_DATA), abs=1e-15)
    roots = (SIGMA_DATA * torch.tan(grid[1:])) ** (1 / 7)
    expected = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), intervals, dtype=F64)
    torch.testing.assert_close(roots, expected, rtol=1e-9, atol=0)
    assert (grid.float().diff() > 0).all()


@pytest.mark.parametrize("intervals", [2, 256, 4096])
@pytest.mark.parametrize(("P_mean", "P_std"), [(-1.0, 1.4), (0.4, 2.0)])
def test_probabilities_are_the_log_normals(intervals: int, P_mean: float, P_std: float) -> None:
    """Their sums up to t_i are the log-normal's distribution function at σ_i, given σ ≤ 80 (scipy); they sum to 1."""
    p = interval_probabilities(intervals, P_mean, P_std)
    assert p.shape == (intervals,)
    assert (p >= 0).all()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    sigma = SIGMA_DATA * np.tan(interval_times(intervals, SIGMA_DATA).numpy()[1:])
    below = normal_law.cdf(np.log(sigma), P_mean, P_std)
    np.testing.assert_allclose(p.cumsum(0).numpy(), below / below[-1], rtol=1e-9, atol=1e-12)


def objective(net: Callable[..., Tensor], intervals: int, **options: object) -> DiscreteObjective:
    values = {"velocity_fn": data_velocity, "warmup": 0, **options}
    return DiscreteObjective(
        net, None, sigma_data=SIGMA_DATA, P_mean=P_MEAN, P_std=P_STD, intervals=intervals, **values
    )


def test_times_are_drawn_with_these_probabilities() -> None:
    """Frequencies of 200,000 draws on 16 intervals within five standard errors; every t on the grid, never 0."""
    count, intervals = 200_000, 16
    t = objective(gaussian_net, intervals).times(count, torch.Generator().manual_seed(0))
    grid = interval_times(intervals, SIGMA_DATA).float()
    assert t.dtype == torch.float32
    frequency = (t[:, None] == grid[1:]).double().mean(0)
    assert float(frequency.sum()) == pytest.approx(1)
    p = interval_probabilities(intervals, P_MEAN, P_STD)
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()


@pytest.mark.parametrize("method", ["dsct", "dscd", "dscd guided"])
@pytest.mark.parametrize("iteration", [5, 50])
def test_objective_is_algorithm_2(method: str, iteration: int) -> None:
    """The objective rebuilt from its pieces: z, t on the grid, (s,) the time before t, the velocity, warm-up over H iterations."""
    guided = method == "dscd guided"
    net, teacher = small_net(guidance_input=guided).float(), small_net(seed=8).float()
    head, H, intervals, scales = LogVarHead(bias=2.0), 10, 32, (1.0, 2.0) if guided else None
    x0 = SIGMA_DATA * randn(6, *SHAPE, seed=20).float()
    labels = torch.arange(6) % 3
    fn = data_velocity if method == "dsct" else teacher_velocity(teacher, SIGMA_DATA)
    own = DiscreteObjective(
        net, head, fn, SIGMA_DATA, P_MEAN, P_STD, H, guidance=scales, intervals=intervals, normalize="clip"
    )
    terms = own(Batch(x0, labels, torch.arange(6)), torch.Generator().manual_seed(3), iteration)

    generator = torch.Generator().manual_seed(3)
    z = SIGMA_DATA * torch.randn(x0.shape, generator=generator)
    u = torch.rand(6, generator=generator, dtype=F64)
    s = 1 + torch.rand(6, generator=generator) if guided else None
    index = (u[:, None] >= interval_probabilities(intervals, P_MEAN, P_STD).cumsum(0)).sum(1)
    grid = interval_times(intervals, SIGMA_DATA).float()
    t, t_prev = grid[index + 1], grid[index]
    x_t = diffuse(x0, z, t)
    with torch.no_grad():
        if method == "dsct":
            dxdt = velocity(x0, z, t)
            h = wide(t - t_prev)  # the DDIM step with v_t is the same x0 and z at t'
            step = torch.cos(h) * x_t - torch.sin(h) * dxdt
            torch.testing.assert_close(step, diffuse(x0, z, t_prev), rtol=1e-5, atol=1e-6)
        else:
            cond, uncond = teacher(x_t / SIGMA_DATA, t, labels), teacher(x_t / SIGMA_DATA, t, None)
            dxdt = SIGMA_DATA * (cond if s is None else uncond + wide(s) * (cond - uncond))
    F, g, _ = discrete_tangent(
        lambda x, t: net(x, t, labels, s), x_t, t, t_prev, dxdt, SIGMA_DATA, min(1, iteration / H), "clip"
    )
    torch.testing.assert_close(terms.loss, scm_loss(F, F.detach(), g, head(t)), rtol=1e-4, atol=1e-5)


def test_bad_options() -> None:
    """Fewer than two intervals, more than float32 can tell apart, an engine: ValueError with name and value."""
    with pytest.raises(ValueError, match="intervals: expected at least 2, got 1"):
        objective(gaussian_net, 1)
    with pytest.raises(ValueError, match=r"intervals: .* float32, got 1000000"):
        objective(gaussian_net, 1_000_000)
    with pytest.raises(ValueError, match="engine: discrete time takes no derivative, got 'dual'"):
        objective(gaussian_net, 8, engine="dual")
