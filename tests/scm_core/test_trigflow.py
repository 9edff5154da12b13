# SPDX-License-Identifier: Apache-2.0
"""TrigFlow: times, process, what a network predicts, and the proposal distribution (paper §3, App. B)."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from scm_core import trigflow

SIGMA_DATA = 0.5
F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def times(count: int) -> Tensor:
    return torch.linspace(0.01, math.pi / 2 - 0.01, count, dtype=F64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.3])
def test_times_and_noise_levels_are_inverse(sigma_data: float) -> None:
    """σ = σ_d tan t and t = arctan(σ/σ_d) undo each other over the whole range of the samplers."""
    sigma = torch.logspace(-4, math.log10(80), 50, dtype=F64)
    t = trigflow.sigma_to_t(sigma, sigma_data)
    torch.testing.assert_close(trigflow.t_to_sigma(t, sigma_data), sigma, rtol=1e-11, atol=0)
    assert (t.diff() > 0).all()
    assert 0 < t.min() < t.max() < math.pi / 2
    torch.testing.assert_close(torch.tan(t) * sigma_data, sigma, rtol=1e-11, atol=0)


def test_known_times() -> None:
    """σ = 0 is t = 0, σ = σ_d is π/4, and the first time of every sampler is arctan(160) for σ_d = 0.5 (§5.2)."""
    assert float(trigflow.sigma_to_t(0.0, 0.5)) == 0
    assert float(trigflow.sigma_to_t(0.5, 0.5)) == pytest.approx(math.pi / 4)
    assert trigflow.t_max(0.5) == math.atan(160)
    assert math.sin(trigflow.t_max(0.5)) == pytest.approx(1, abs=2.1e-5)  # what "x_{t_max} = z" neglects


def test_velocity_is_the_time_derivative_of_the_process() -> None:
    """v_t = dx_t/dt, by automatic differentiation."""
    x0, z, t = normal(5, 2, 3, 3, seed=0), normal(5, 2, 3, 3, seed=1), times(5)
    x_t, dxdt = torch.func.jvp(lambda s: trigflow.diffuse(x0, z, s), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(trigflow.velocity(x0, z, t), dxdt, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x_t[2], math.cos(t[2]) * x0[2] + math.sin(t[2]) * z[2])


def test_process_keeps_the_standard_deviation() -> None:
    """With data and noise of standard deviation σ_d, x_t and v_t have it at every t and are uncorrelated."""
    x0, z = SIGMA_DATA * normal(4, 200_000, seed=0), SIGMA_DATA * normal(4, 200_000, seed=1)
    t = torch.tensor([0.0, 0.4, 1.1, math.pi / 2], dtype=F64)
    x_t, v_t = trigflow.diffuse(x0, z, t), trigflow.velocity(x0, z, t)
    torch.testing.assert_close(x_t.std(dim=1), torch.full((4,), SIGMA_DATA, dtype=F64), rtol=0.01, atol=0)
    torch.testing.assert_close(v_t.std(dim=1), torch.full((4,), SIGMA_DATA, dtype=F64), rtol=0.01, atol=0)
    assert (x_t * v_t).mean(dim=1).abs().max() < 5 * SIGMA_DATA**2 / 200_000**0.5


def test_boundary_condition() -> None:
    """f(x, 0) = x whatever the network says (§4)."""
    x, F = normal(3, 1, 2, 2, seed=0), 1e6 * normal(3, 1, 2, 2, seed=1)
    assert torch.equal(trigflow.consistency_function(F, x, torch.zeros(3, dtype=F64), SIGMA_DATA), x)


def test_the_exact_velocity_gives_exact_data_and_noise() -> None:
    """F = v_t/σ_d: then D = x0 and ε = z; the four predictions are rotations of one another."""
    x0, z, t = normal(6, 1, 2, 2, seed=0), normal(6, 1, 2, 2, seed=1), times(6)
    x_t = trigflow.diffuse(x0, z, t)
    F = trigflow.velocity(x0, z, t) / SIGMA_DATA
    torch.testing.assert_close(trigflow.denoiser(F, x_t, t, SIGMA_DATA), x0, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(trigflow.consistency_function(F, x_t, t, SIGMA_DATA), x0, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(trigflow.noise_prediction(F, x_t, t, SIGMA_DATA), z, rtol=1e-12, atol=1e-14)


def test_predictions_are_consistent_for_any_network() -> None:
    """cos t D + sin t ε = x_t and cos t ε − sin t D = σ_d F for an arbitrary F."""
    x_t, F, t = normal(6, 1, 2, 2, seed=0), normal(6, 1, 2, 2, seed=1), times(6)
    D, eps = trigflow.denoiser(F, x_t, t, SIGMA_DATA), trigflow.noise_prediction(F, x_t, t, SIGMA_DATA)
    torch.testing.assert_close(trigflow.diffuse(D, eps, t), x_t, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(trigflow.velocity(D, eps, t), SIGMA_DATA * F, rtol=1e-12, atol=1e-14)


def test_denoiser_is_edms_preconditioning() -> None:
    """D in EDM's variables x_σ = x_t/cos t has c_skip = σ_d²/(σ²+σ_d²), |c_out| = σσ_d/√(σ²+σ_d²), c_in = 1/√(σ²+σ_d²)."""
    x_sigma, F = normal(6, 1, 2, 2, seed=0), normal(6, 1, 2, 2, seed=1)
    sigma = torch.logspace(-3, 1.9, 6, dtype=F64)
    t = trigflow.sigma_to_t(sigma, SIGMA_DATA)
    x_t = torch.cos(t)[:, None, None, None] * x_sigma
    s = sigma[:, None, None, None]
    root = (s**2 + SIGMA_DATA**2).sqrt()
    expected = SIGMA_DATA**2 / root**2 * x_sigma - s * SIGMA_DATA / root * F
    torch.testing.assert_close(trigflow.denoiser(F, x_t, t, SIGMA_DATA), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x_t / SIGMA_DATA, x_sigma / root, rtol=1e-11, atol=1e-12)  # c_in x_σ


@pytest.mark.parametrize(("P_mean", "P_std"), [(-0.4, 1.2), (-1.0, 1.4)])
def test_proposal_is_log_normal(P_mean: float, P_std: float) -> None:
    """ln(σ_d tan t) ~ N(P_mean, P_std²) for the times of training (§4.2)."""
    t = trigflow.sample_times(20_000, P_mean, P_std, SIGMA_DATA, torch.Generator().manual_seed(3))
    assert t.shape == (20_000,)
    assert ((t > 0) & (t < math.pi / 2)).all()
    tau = torch.log(trigflow.t_to_sigma(t.double(), SIGMA_DATA)).numpy()
    assert stats.kstest(tau, "norm", args=(P_mean, P_std)).pvalue > 0.01
    assert stats.kstest(tau, "norm", args=(P_mean + 0.1, P_std)).pvalue < 1e-3  # the test can tell


def test_times_depend_on_the_generator_alone() -> None:
    """Equal generators give equal times, whatever the global one has done."""
    first = trigflow.sample_times(8, -1.0, 1.4, SIGMA_DATA, torch.Generator().manual_seed(3))
    torch.randn(5)
    assert torch.equal(first, trigflow.sample_times(8, -1.0, 1.4, SIGMA_DATA, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, trigflow.sample_times(8, -1.0, 1.4, SIGMA_DATA, torch.Generator().manual_seed(4)))


X = torch.zeros(3, 1, 2, 2)
T = torch.zeros(3)
BAD_TIMES = [
    (torch.zeros(3, 1), r"t: expected shape \(3,\) to match x of shape \(3, 1, 2, 2\), got \(3, 1\)"),
    (torch.zeros(2), r"t: expected shape \(3,\) .* got \(2,\)"),
    (torch.zeros(()), r"t: expected shape \(3,\) .* got \(\)"),
    (torch.zeros(3, dtype=torch.float16), "t: expected float32 or float64, got torch.float16"),
    (torch.zeros(3, dtype=torch.bfloat16), "t: expected float32 or float64, got torch.bfloat16"),
    (torch.zeros(3, dtype=torch.int64), "t: expected float32 or float64, got torch.int64"),
    (torch.zeros(3, device="meta"), "t: expected the device cpu of x, got meta"),
]
PREDICTIONS = [trigflow.consistency_function, trigflow.denoiser, trigflow.noise_prediction]


@pytest.mark.parametrize(("t", "message"), BAD_TIMES, ids=[message for _, message in BAD_TIMES])
def test_times_that_do_not_fit_are_named(t: Tensor, message: str) -> None:
    """t has one entry for each sample (silent broadcasting would mix samples), in full precision, on the device of x."""
    calls = [lambda: trigflow.diffuse(X, X, t), lambda: trigflow.velocity(X, X, t)]
    calls += [lambda f=f: f(X, X, t, SIGMA_DATA) for f in PREDICTIONS]  # type: ignore[misc]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("wrong", [torch.zeros(3, 1, 2, 1), torch.zeros(1, 1, 2, 2), X.to("meta")])
def test_tensors_that_do_not_fit_are_named(wrong: Tensor) -> None:
    """Noise and network output have the shape and the device of the sample."""
    what = "the device cpu" if wrong.device.type == "meta" else r"the shape \(3, 1, 2, 2\)"
    for call in (trigflow.diffuse, trigflow.velocity):
        with pytest.raises(ValueError, match=f"z: expected {what} of x0, got"):
            call(X, wrong, T)
    for predict in PREDICTIONS:
        with pytest.raises(ValueError, match=f"F: expected {what} of x_t, got"):
            predict(wrong, X, T, SIGMA_DATA)


@pytest.mark.parametrize("sigma_data", [0.0, -0.5, math.nan])
def test_sigma_data_is_positive(sigma_data: float) -> None:
    """Without a standard deviation of the data there is no time."""
    for call in (lambda s: trigflow.sigma_to_t(1.0, s), lambda s: trigflow.t_to_sigma(1.0, s), trigflow.t_max):
        with pytest.raises(ValueError, match="sigma_data: expected a positive number, got"):
            call(sigma_data)


def test_checks_look_at_no_values() -> None:
    """The functions of a training step run where tensors have no values: nothing in them can wait for a device."""
    x, t = X.to("meta"), T.to("meta")
    for result in (trigflow.diffuse(x, x, t), trigflow.velocity(x, x, t), *(f(x, x, t, 0.5) for f in PREDICTIONS)):
        assert result.shape == x.shape


def test_python_numbers_are_computed_in_float64() -> None:
    """A number gives float64, exact to its rounding; a tensor keeps its type and shape."""
    for sigma in (0.002, 0.7, 80, math.inf):
        t = trigflow.sigma_to_t(sigma, SIGMA_DATA)
        assert t.dtype == F64
        assert float(t) == math.atan(sigma / SIGMA_DATA)
    assert trigflow.t_to_sigma(1.1, SIGMA_DATA).dtype == F64
    assert float(trigflow.t_to_sigma(1.1, SIGMA_DATA)) == SIGMA_DATA * math.tan(1.1)
    for dtype in (torch.float32, F64):
        for convert in (trigflow.sigma_to_t, trigflow.t_to_sigma):
            result = convert(torch.rand(2, 3, dtype=dtype), SIGMA_DATA)
            assert result.dtype == dtype
            assert result.shape == (2, 3)


@pytest.mark.parametrize("sigma", [-0.1, -math.inf, math.nan])
def test_noise_levels_out_of_range_are_named(sigma: float) -> None:
    """σ ≥ 0."""
    with pytest.raises(ValueError, match=f"sigma: expected a noise level >= 0, got {sigma}"):
        trigflow.sigma_to_t(sigma, SIGMA_DATA)


@pytest.mark.parametrize("t", [-0.1, math.pi / 2, 1.6, math.nan])
def test_times_without_a_noise_level_are_named(t: float) -> None:
    """0 ≤ t < π/2: σ is infinite at π/2 and would be negative beyond."""
    with pytest.raises(ValueError, match=rf"t: expected a time in \[0, π/2\) radians, where σ is finite, got {t}"):
        trigflow.t_to_sigma(t, SIGMA_DATA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_maps_of_times_take_no_half_precision(dtype: torch.dtype) -> None:
    """bfloat16 turns σ = 80 into t = 1.5625, which is σ = 60."""
    for name, convert in (("sigma", trigflow.sigma_to_t), ("t", trigflow.t_to_sigma)):
        with pytest.raises(ValueError, match=f"{name}: expected float32 or float64, got {dtype}"):
            convert(torch.ones(3, dtype=dtype), SIGMA_DATA)


def test_times_in_double_precision() -> None:
    """The type asked for, without float32's rounding in between."""
    t = trigflow.sample_times(50, -1.0, 1.4, SIGMA_DATA, torch.Generator().manual_seed(3), F64)
    assert t.dtype == F64
    assert not torch.equal(t, t.float().double())
