# SPDX-License-Identifier: Apache-2.0
"""The Gaussian mixture: its formulas against autograd, sampling and quadrature, its PF-ODE against scipy, the tangent on its exact map."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scm_core.mixture import GaussianMixture, _extrapolated_step, solve
from scm_core.sampling import sample_consistency, sample_diffusion
from scm_core.tangent import scm_tangent
from scm_core.trigflow import denoiser, diffuse, noise_prediction, t_max, velocity

SIGMA_DATA = 0.5
F64 = torch.float64


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    """Five modes of unlike weight and width, in general position."""
    means = torch.tensor([[1.0, 0.2], [-0.3, 1.1], [-1.2, -0.4], [0.1, -1.0], [0.9, -1.3]])
    std = torch.tensor([0.2, 0.35, 0.25, 0.2, 0.15])
    return GaussianMixture.scaled(means, std, torch.tensor([2.0, 1.0, 1.5, 1.0, 0.7]), SIGMA_DATA)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def times(count: int, low: float = 1e-3, high: float = t_max(SIGMA_DATA)) -> Tensor:
    """Times over the whole range of training and sampling, dense at both ends."""
    return torch.atan(torch.logspace(math.log10(math.tan(low)), math.log10(math.tan(high)), count, dtype=F64))


def at_times(mixture: GaussianMixture, t: Tensor, seed: int = 0) -> Tensor:
    """x_t at each time."""
    x0 = mixture.sample(len(t), generator(seed), F64)
    return diffuse(x0, SIGMA_DATA * torch.randn(len(t), 2, generator=generator(seed + 1), dtype=F64), t)


def gradient(mixture: GaussianMixture, x_t: Tensor, t: Tensor) -> Tensor:
    """∇ ln p_t by autograd of the log-density."""
    x = x_t.clone().requires_grad_()
    return torch.autograd.grad(mixture.log_density(x, t).sum(), x)[0]


# --- formulas ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.4, math.pi / 2])
def test_log_density_is_a_density_and_that_of_the_samples(mixture: GaussianMixture, t: float) -> None:
    """It integrates to 1 over a grid of the plane, and its mean over samples is minus the entropy on that grid."""
    axis = torch.linspace(-3.5, 3.5, 351, dtype=F64)
    points = torch.cartesian_prod(axis, axis)
    log_p = mixture.log_density(points, torch.full((len(points),), t, dtype=F64))
    mass = log_p.exp() * float(axis[1] - axis[0]) ** 2
    assert float(mass.sum()) == pytest.approx(1, abs=1e-9)
    count = 100_000
    at_samples = mixture.log_density(*_diffused(mixture, count, t))
    assert abs(float(at_samples.mean() - (mass * log_p).sum())) < 5 * float(at_samples.std()) / count**0.5


def _diffused(mixture: GaussianMixture, count: int, t: float) -> tuple[Tensor, Tensor]:
    tb = torch.full((count,), t, dtype=F64)
    return at_times(mixture, tb), tb


def test_score_is_the_gradient_of_the_log_density(mixture: GaussianMixture) -> None:
    t = times(100)
    x_t = at_times(mixture, t)
    torch.testing.assert_close(mixture.score(x_t, t), gradient(mixture, x_t, t), rtol=1e-9, atol=1e-9)


def test_F_follows_from_the_log_density(mixture: GaussianMixture) -> None:
    """∇ ln p_t = −(cos t σ_d F + sin t x_t)/(σ_d² sin t) (App. B), with ∇ by autograd."""
    t = times(100)
    x_t = at_times(mixture, t)
    F, tb = mixture(x_t / SIGMA_DATA, t), t[:, None]
    expected = -(torch.cos(tb) * SIGMA_DATA * F + torch.sin(tb) * x_t) / (SIGMA_DATA**2 * torch.sin(tb))
    torch.testing.assert_close(gradient(mixture, x_t, t), expected, rtol=1e-7, atol=1e-7)


def test_denoiser_of_F_is_the_posterior_mean(mixture: GaussianMixture) -> None:
    """cos t x_t − sin t σ_d F = E[x0 | x_t], and with Tweedie's formula sin t x_t + cos t σ_d F = −σ_d² sin t ∇ ln p_t = E[z | x_t]."""
    t = torch.cat([times(50), torch.tensor([0.0, math.pi / 2], dtype=F64)])
    x_t = at_times(mixture, t)
    F = mixture(x_t / SIGMA_DATA, t)
    torch.testing.assert_close(denoiser(F, x_t, t, SIGMA_DATA), mixture.posterior_mean(x_t, t), rtol=1e-12, atol=1e-12)
    noise = -(SIGMA_DATA**2) * torch.sin(t)[:, None] * gradient(mixture, x_t, t)
    torch.testing.assert_close(noise_prediction(F, x_t, t, SIGMA_DATA), noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.15, 0.6, 1.3])
def test_velocity_is_the_mean_of_the_sample_velocities(mixture: GaussianMixture, t: float) -> None:
    """E[v_t | x_t] by quadrature over x0: ∫ v_t p(x_t | x0) p(x0) dx0 / p_t(x_t), z = (x_t − cos t x0)/sin t."""
    x_t, tb = _diffused(mixture, 5, t)
    axis = torch.linspace(-2.5, 2.5, 501, dtype=F64)
    x0 = torch.cartesian_prod(axis, axis)
    prior = mixture.log_density(x0, x0.new_zeros(len(x0)))
    for x, v in zip(x_t, mixture.velocity(x_t, tb), strict=True):
        z = (x - math.cos(t) * x0) / math.sin(t)
        p = (prior - z.square().sum(1) / (2 * SIGMA_DATA**2)).softmax(0)
        expected = p @ velocity(x0, z, torch.full((len(x0),), t, dtype=F64))
        torch.testing.assert_close(v, expected, rtol=1e-8, atol=1e-8)


def test_F_in_float32_is_that_in_float64(mixture: GaussianMixture) -> None:
    t = times(200)
    x = at_times(mixture, t) / SIGMA_DATA
    F = mixture(x.float(), t.float())
    assert F.dtype == torch.float32
    assert (F - mixture(x, t)).abs().max() < 1e-5


def test_scaled_mixture_has_mean_zero_and_the_variance_of_the_data(mixture: GaussianMixture) -> None:
    count = 400_000
    x = mixture.sample(count, generator(3), F64)
    assert x.mean(0).abs().max() < 5 * SIGMA_DATA / count**0.5
    assert float(x.square().mean().sqrt()) == pytest.approx(SIGMA_DATA, rel=5e-3)
    torch.testing.assert_close(mixture.std[0] / mixture.std[4], torch.tensor(0.2 / 0.15, dtype=F64))


def test_modes_are_counted(mixture: GaussianMixture) -> None:
    """A mean belongs to its own mode; shares are about 1 for the data (up to overlap) and exactly 0 for a mode without samples."""
    assert mixture.mode_of(mixture.means).tolist() == [0, 1, 2, 3, 4]
    x = mixture.sample(50_000, generator(4), F64)
    assert ((mixture.mode_shares(x) - 1).abs() < 0.05).all()
    without = x[mixture.mode_of(x) != 2]
    shares = mixture.mode_shares(without)
    assert shares[2] == 0
    assert (shares[[0, 1, 3, 4]] > 1).all()


# --- the PF-ODE ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.2, 1.0, t_max(SIGMA_DATA)])
def test_pf_ode_map_is_where_scipy_arrives(mixture: GaussianMixture, t: float) -> None:
    """An independent integrator (DOP853) of an independent form of the ODE, dx/dt = σ_d F with F from the score by autograd, to 1e-9."""
    x_t, tb = _diffused(mixture, 4, t)

    def slope(s: float, y: np.ndarray) -> np.ndarray:
        x, sb = torch.from_numpy(y).reshape(-1, 2), torch.full((4,), s, dtype=F64)
        # σ_d F cos t = −σ_d² sin t ∇ ln p − sin t x_t
        v = -math.sin(s) * (SIGMA_DATA**2 * gradient(mixture, x, sb) + x) / math.cos(s)
        return v.numpy().ravel()

    end = solve_ivp(slope, (t, 0.0), x_t.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(mixture.pf_ode_map(x_t, tb).numpy().ravel(), end, rtol=0, atol=1e-9)


def test_pf_ode_map_follows_the_paths(mixture: GaussianMixture) -> None:
    """Points on one solution have one end; there and back again is the identity; t = 0 is the identity."""
    t = times(32, 0.05)
    x_t = at_times(mixture, t)
    end = mixture.pf_ode_map(x_t, t)
    middle = mixture.integrate(x_t, t, t / 2)
    torch.testing.assert_close(mixture.pf_ode_map(middle, t / 2), end, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixture.integrate(middle, t / 2, t), x_t, rtol=0, atol=1e-8)
    assert torch.equal(mixture.pf_ode_map(x_t, torch.zeros_like(t)), x_t)
    assert (middle - x_t).abs().max() > 0.1


def test_pf_ode_map_of_one_gaussian_is_the_closed_form() -> None:
    """f(x, t) = m + λ/s(t) (x − cos t m) for a mixture of one."""
    mean, std = torch.tensor([[0.4, -0.3]], dtype=F64), 0.2
    gaussian = GaussianMixture(mean, std, sigma_data=SIGMA_DATA)
    t = times(50)
    x_t = at_times(gaussian, t)
    s = ((torch.cos(t) * std) ** 2 + (torch.sin(t) * SIGMA_DATA) ** 2).sqrt()[:, None]
    expected = mean + std / s * (x_t - torch.cos(t)[:, None] * mean)
    torch.testing.assert_close(gaussian.pf_ode_map(x_t, t), expected, rtol=0, atol=1e-10)


def test_the_solver_has_its_order() -> None:
    """dx/dt = 2 cos(2t) x: one step of length h errs as h¹³, and `solve` errs by less than its tolerance."""

    def exact(t: Tensor) -> Tensor:
        return torch.exp(torch.sin(2 * t))[:, None]

    def slope(x: Tensor, t: Tensor) -> Tensor:
        return 2 * torch.cos(2 * t)[:, None] * x

    start = torch.linspace(0, 6, 40, dtype=F64)
    lengths, errors = [0.5, 0.6, 0.7], []
    for h in lengths:
        step = torch.full_like(start, h)
        errors.append(float((_extrapolated_step(slope, exact(start), start, step) - exact(start + step)).norm()))
    assert np.polyfit(np.log(lengths), np.log(errors), 1)[0] == pytest.approx(13, abs=0.2)
    for tolerance in (1e-3, 1e-6, 1e-9):
        assert (solve(slope, exact(start), start, start + 20, tolerance) - exact(start + 20)).abs().max() < tolerance


def test_a_solution_that_blows_up_is_refused() -> None:
    """dx/dt = x² reaches infinity at t = 1."""
    one = torch.ones(1, dtype=F64)
    with pytest.raises(ArithmeticError, match="is not reached in 512 steps"):
        solve(lambda x, t: x**2, one[:, None], 0 * one, 2 * one, 1e-8)


def test_sampler_approaches_the_map(mixture: GaussianMixture) -> None:
    """Heun's sampler with the mixture's F ends, with many steps, where the PF-ODE ends: of second order."""
    z = SIGMA_DATA * torch.randn(100, 2, generator=generator(8), dtype=F64)
    start = torch.full((100,), t_max(SIGMA_DATA), dtype=F64)
    exact = mixture.pf_ode_map(math.sin(t_max(SIGMA_DATA)) * z, start)
    few, many = (float((sample_diffusion(mixture, z, n, SIGMA_DATA) - exact).square().mean().sqrt()) for n in (40, 160))
    assert many < 2e-4
    assert few > 8 * many


# --- the tangent ---------------------------------------------------------------------------------------------------------------------


def consistency_net(mixture: GaussianMixture, x: Tensor, t: Tensor, tolerance: float) -> Tensor:
    """The F of the true consistency function, (cos t x_t − f)/(σ_d sin t)."""
    x_t, tb = SIGMA_DATA * x, t[:, None]
    return (torch.cos(tb) * x_t - mixture.pf_ode_map(x_t, t, tolerance)) / (SIGMA_DATA * torch.sin(tb))


def test_tangent_vanishes_along_the_exact_map(mixture: GaussianMixture) -> None:
    """g = cos t df/dt = 0 for the true f, differentiated by central differences of the reference; not for the diffusion model's F."""
    t = times(20, 0.05, 1.5)
    x_t = at_times(mixture, t, seed=20)
    dxdt = mixture.velocity(x_t, t)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return consistency_net(mixture, x, t, 1e-12)

    _, g = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, normalize="none", engine="finite_difference")
    assert g.abs().max() < 1e-6
    _, other = scm_tangent(mixture, x_t, t, dxdt, SIGMA_DATA, normalize="none")
    assert other.abs().max() > 0.1


def test_one_step_with_the_exact_map_samples_the_data(mixture: GaussianMixture) -> None:
    """Every mode gets its share, in one step and with a second one at t = 1.1."""
    count = 1000
    z = SIGMA_DATA * torch.randn(count, 2, generator=generator(9), dtype=F64)
    for steps in ((t_max(SIGMA_DATA),), (t_max(SIGMA_DATA), 1.1)):
        x = sample_consistency(lambda x, t: consistency_net(mixture, x, t, 1e-6), z, steps, SIGMA_DATA, generator(10))
        spread = 5 * ((1 / mixture.weights - 1) / count).sqrt()
        overlap = (mixture.mode_shares(mixture.sample(200_000, generator(11), F64)) - 1).abs()
        assert ((mixture.mode_shares(x) - 1).abs() < spread + overlap).all()


# --- misuse --------------------------------------------------------------------------------------------------------------------------


def test_misuse_is_named(mixture: GaussianMixture) -> None:
    t = torch.full((3,), 0.5, dtype=F64)
    x = torch.zeros(3, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"x_t: expected shape \(B, 2\), got \(3, 3\)"):
        mixture(torch.zeros(3, 3, dtype=F64), t)
    with pytest.raises(ValueError, match=r"t: expected shape \(3,\)"):
        mixture(x, t[:2])
    with pytest.raises(ValueError, match="labels: a mixture is unconditional"):
        mixture(x, t, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="guidance: a mixture is unconditional"):
        mixture(x, t, None, torch.ones(3))
    with pytest.raises(ValueError, match=r"x_t, t: expected float64, got torch\.float32"):
        mixture.pf_ode_map(x.float(), t)
    with pytest.raises(ValueError, match="std: expected positive numbers, got 0"):
        GaussianMixture(torch.zeros(2, 2), torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match=r"weights: expected one number or shape \(2,\), got \(3,\)"):
        GaussianMixture(torch.zeros(2, 2), 0.1, torch.ones(3))
    with pytest.raises(ValueError, match="sigma_data: expected a positive number, got 0"):
        GaussianMixture(torch.zeros(2, 2), 0.1, sigma_data=0.0)
    with pytest.raises(ValueError, match="x_t: expected the device cpu of the mixture, got meta"):
        mixture(x.to("meta"), t.to("meta"))
    with pytest.raises(ValueError, match="count: expected a number of samples >= 0, got -1"):
        mixture.sample(-1, generator(0))
    with pytest.raises(ValueError, match="x0: expected at least one point, got 0"):
        mixture.mode_shares(x[:0])
    with pytest.raises(ValueError, match="generator: expected the device meta of the mixture, got cpu"):
        GaussianMixture(torch.zeros(2, 2), 0.1).to("meta").sample(3, generator(0))
    with pytest.raises(ValueError, match=r"means: expected shape \(components, dimensions\), got \(2,\)"):
        GaussianMixture(torch.zeros(2), 0.1)


def test_empty_batches(mixture: GaussianMixture) -> None:
    """No points in, no points out, from every function of points."""
    x, t = mixture.sample(0, generator(0), F64), torch.zeros(0, dtype=F64)
    assert x.shape == (0, 2)
    assert x.dtype == F64
    for function in (mixture, mixture.score, mixture.velocity, mixture.posterior_mean, mixture.pf_ode_map):
        assert function(x, t).shape == (0, 2)
    assert mixture.log_density(x, t).shape == mixture.mode_of(x).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(mixture: GaussianMixture) -> None:
    """Samples and the PF-ODE where the mixture is."""
    gpu = GaussianMixture(mixture.means.cuda(), mixture.std.cuda(), mixture.weights.cuda(), SIGMA_DATA)
    x = gpu.sample(20, torch.Generator("cuda").manual_seed(0), F64)
    t = torch.full((20,), 0.7, dtype=F64)
    expected = mixture.pf_ode_map(x.cpu(), t)
    torch.testing.assert_close(gpu.pf_ode_map(x, t.cuda()).cpu(), expected, rtol=0, atol=1e-9)
