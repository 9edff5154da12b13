# SPDX-License-Identifier: Apache-2.0
"""Samplers with a real network: counted passes, independence of the batch, what they refuse. (Accuracy: tests/theory.)"""

import math

import pytest
import torch
from torch import Tensor

from scm_core.nn.small import SmallNet
from scm_core.sampling import (
    SOLVERS,
    Guided,
    diffusion_nfe,
    sample_consistency,
    sample_diffusion,
    sample_multistep,
    segment_times,
    sigma_grid,
    time_grid,
)
from scm_core.seeds import sample_noise
from scm_core.trigflow import consistency_function, t_max

SIGMA_DATA = 0.5
T_MAX = t_max(SIGMA_DATA)
SHAPE = (2, 4, 4)


@pytest.fixture(scope="module")
def net() -> SmallNet:
    torch.manual_seed(0)
    result = SmallNet(2, 4, labels=3, width=8, blocks=1)
    torch.nn.init.ones_(result.out_gain)
    return result.eval()


@pytest.mark.parametrize(
    ("solver", "steps", "guidance", "nfe"),
    [
        ("heun", 18, None, 35),
        ("heun", 32, 1.5, 126),
        ("heun", 32, None, 63),
        ("heun", 1, None, 1),
        ("ddim", 10, 2.0, 20),
        ("dpm2m", 10, None, 10),
        ("dpm2m", 10, 2.0, 20),
        ("dpmpp2m", 1, None, 1),
        ("dpmpp2m", 7, 1.3, 14),
    ],
)
def test_number_of_evaluations(net: SmallNet, solver: str, steps: int, guidance: float | None, nfe: int) -> None:
    """Heun: 2n − 1 (35 for 18 steps, 63 for 32), the others n, twice that with guidance; counted and predicted."""
    bound = Guided(net, torch.tensor([1]), guidance)
    sample_diffusion(bound, SIGMA_DATA * sample_noise([0], SHAPE), steps, SIGMA_DATA, solver)
    assert bound.nfe == nfe == diffusion_nfe(solver, steps, guidance is not None)


@pytest.mark.parametrize("times", [(T_MAX,), (T_MAX, 1.1), (T_MAX, 1.3, 0.7, 0.1)])
def test_consistency_sampling_evaluates_once_for_each_time(net: SmallNet, times: tuple[float, ...]) -> None:
    """One pass a step, at exactly the given times."""
    seen: list[float] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return net(x, t)

    sample_consistency(spy, SIGMA_DATA * sample_noise([0], SHAPE), times, SIGMA_DATA)
    assert seen == pytest.approx(list(times))


def test_multistep_sampling_evaluates_once_for_each_segment(net: SmallNet) -> None:
    """One pass a segment, at its upper boundary, and no randomness."""
    seen: list[float] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return net(x, t)

    z = SIGMA_DATA * sample_noise([0], SHAPE)
    first = sample_multistep(spy, z, 4, SIGMA_DATA)
    assert seen == pytest.approx(segment_times(4, SIGMA_DATA)[:-1])
    assert torch.equal(first, sample_multistep(net, z, 4, SIGMA_DATA))
    bound = Guided(net, torch.tensor([1]), 1.5)
    sample_multistep(bound, z, 4, SIGMA_DATA)
    assert bound.nfe == 8


def test_multistep_sampling_is_its_formula(net: SmallNet) -> None:
    """x_s = cos(t−s) x_t − sin(t−s) σ_d F(x_t/σ_d, t) from boundary to boundary."""
    x = math.sin(T_MAX) * (z := SIGMA_DATA * sample_noise(range(3), SHAPE))
    with torch.no_grad():
        for t, s in [(T_MAX, T_MAX / 2), (T_MAX / 2, 0.0)]:
            F = net(x / SIGMA_DATA, torch.full((3,), t))
            x = math.cos(t - s) * x - math.sin(t - s) * SIGMA_DATA * F
    torch.testing.assert_close(sample_multistep(net, z, 2, SIGMA_DATA), x, rtol=1e-5, atol=1e-6)


def test_one_segment_is_one_step(net: SmallNet) -> None:
    """M = 1: the bits of one-step consistency sampling."""
    z = SIGMA_DATA * sample_noise(range(3), SHAPE)
    assert torch.equal(
        sample_multistep(net, z, 1, SIGMA_DATA), sample_consistency(net, z, (t_max(SIGMA_DATA),), SIGMA_DATA)
    )


def test_first_step_starts_at_sin_t_of_the_noise(net: SmallNet) -> None:
    """One step is f(sin(t_max) z, t_max) (§5.2)."""
    z = SIGMA_DATA * sample_noise(range(3), SHAPE)
    x, t = math.sin(T_MAX) * z, torch.full((3,), T_MAX)
    with torch.no_grad():
        expected = consistency_function(net(x / SIGMA_DATA, t), x, t, SIGMA_DATA)
    torch.testing.assert_close(sample_consistency(net, z, (T_MAX,), SIGMA_DATA), expected, rtol=1e-6, atol=1e-6)


def test_samples_do_not_depend_on_the_batch(net: SmallNet) -> None:
    """Noise comes by sample index: in one batch or in pieces, each sample is the same (to the kernels' rounding)."""

    def make(indices: range) -> Tensor:
        z, fresh = (SIGMA_DATA * sample_noise(indices, SHAPE, stream) for stream in ("z", "fresh"))
        return sample_consistency(net, z, (T_MAX, 1.1), SIGMA_DATA, noise=[fresh])

    whole = make(range(10))
    pieces = torch.cat([make(range(3)), make(range(3, 4)), make(range(4, 10))])
    torch.testing.assert_close(whole, pieces, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


def test_fresh_noise_comes_from_the_generator(net: SmallNet) -> None:
    """Two-step samples repeat with an equal generator and differ with another; the one-step sample needs none."""
    z = SIGMA_DATA * sample_noise(range(3), SHAPE)

    def make(seed: int) -> Tensor:
        return sample_consistency(net, z, (T_MAX, 1.1), SIGMA_DATA, torch.Generator().manual_seed(seed))

    assert torch.equal(make(0), make(0))
    assert not torch.allclose(make(0), make(1), atol=1e-2)


def test_times_and_noise_may_be_tensors(net: SmallNet) -> None:
    """A tensor of times and one of all noise give the bits of the sequences; float32's π/2, above the real one, is a time."""
    z, fresh = (SIGMA_DATA * sample_noise(range(3), SHAPE, stream) for stream in ("z", "fresh"))
    times = torch.tensor([T_MAX, 1.1], dtype=torch.float64)
    expected = sample_consistency(net, z, (T_MAX, 1.1), SIGMA_DATA, noise=[fresh])
    assert torch.equal(sample_consistency(net, z, times, SIGMA_DATA, noise=fresh[None]), expected)
    assert torch.equal(sample_consistency(net, z, tuple(times), SIGMA_DATA, noise=(fresh,)), expected)
    top = float(torch.tensor(math.pi / 2))
    assert top > math.pi / 2
    assert torch.isfinite(sample_consistency(net, z, (top, 1.1), SIGMA_DATA, noise=[fresh])).all()
    for solver in ("ddim", "dpm2m", "dpmpp2m"):
        assert torch.isfinite(SOLVERS[solver](net, z, [top, 1.0, 0.5, 0.0], SIGMA_DATA)).all()
    with pytest.raises(ValueError, match="times: expected to start below π/2 for Heun's method"):
        SOLVERS["heun"](net, z, [top, 0.0], SIGMA_DATA)


def test_networks_of_another_shape_are_named() -> None:
    """An F of one channel would be broadcast to all."""
    message = r"F: expected the shape \(2, 2, 4, 4\) of x_t, got \(2, 1, 4, 4\)"
    for sample in (
        *(lambda s=s: sample_diffusion(lambda x, t: x[:, :1], Z, 3, SIGMA_DATA, s) for s in SOLVERS),  # type: ignore[misc]
        lambda: sample_consistency(lambda x, t: x[:, :1], Z, (T_MAX,), SIGMA_DATA),
        lambda: sample_multistep(lambda x, t: x[:, :1], Z, 2, SIGMA_DATA),
    ):
        with pytest.raises(ValueError, match=message):
            sample()


def test_samplers_leave_no_graph(net: SmallNet) -> None:
    """Sampling tracks no gradients, though the network's parameters ask for them."""
    z = SIGMA_DATA * sample_noise([0], SHAPE)
    assert next(net.parameters()).requires_grad
    assert not any(sample_diffusion(net, z, 2, SIGMA_DATA, solver).requires_grad for solver in SOLVERS)
    assert not sample_multistep(net, z, 2, SIGMA_DATA).requires_grad
    assert not sample_consistency(net, z, (T_MAX,), SIGMA_DATA).requires_grad


def test_edm_grid() -> None:
    """From 80 down to 0.002, linear in σ^{1/7}; one step is σ = 80 alone."""
    grid = torch.tensor(sigma_grid(32), dtype=torch.float64)
    assert float(grid[0]) == pytest.approx(80)
    assert float(grid[-1]) == pytest.approx(0.002)
    root = grid ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(31), rtol=1e-9, atol=0)
    assert sigma_grid(1) == [80.0]


Z = torch.zeros(2, *SHAPE)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (Z.half(), "z: expected float32 or float64, got torch.float16"),
        (Z.long(), "z: expected float32 or float64, got torch.int64"),
        (torch.zeros(3), r"z: expected a batch of shape \(B, …\), got shape \(3,\)"),
    ],
)
def test_noise_that_does_not_fit_is_named(net: SmallNet, z: Tensor, message: str) -> None:
    """Every sampler takes a batch in full precision, in which its times are made."""
    for sample in (
        lambda: sample_diffusion(net, z, 3, SIGMA_DATA),
        lambda: sample_consistency(net, z, (T_MAX,), SIGMA_DATA),
        lambda: sample_multistep(net, z, 2, SIGMA_DATA),
    ):
        with pytest.raises(ValueError, match=message):
            sample()
    for solver in SOLVERS.values():
        with pytest.raises(ValueError, match=message.replace("z:", "x:")):
            solver(net, z, [1.0, 0.0], SIGMA_DATA)


@pytest.mark.parametrize("times", [(), (1.0, 1.0), (0.5, 1.0), (1.6,), (1.0, 0.0), (math.nan,), (1.0, math.nan)])
def test_times_that_do_not_descend_are_named(net: SmallNet, times: tuple[float, ...]) -> None:
    """Consistency sampling goes down within (0, π/2]."""
    with pytest.raises(ValueError, match="times: expected descending numbers"):
        sample_consistency(net, Z, times, SIGMA_DATA)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 1.0], [1.0, -0.1], [2.0, 0.0], [1.0, math.nan]])
def test_grids_that_do_not_descend_are_named(net: SmallNet, solver: str, times: list[float]) -> None:
    """Solvers go down within [0, π/2]."""
    with pytest.raises(ValueError, match="times: expected two or more descending numbers"):
        SOLVERS[solver](net, Z, times, SIGMA_DATA)


@pytest.mark.parametrize("sigma_data", [0.0, -0.5, math.nan])
def test_sigma_data_is_positive(net: SmallNet, sigma_data: float) -> None:
    """No sampler starts without a standard deviation of the data."""
    calls = [
        lambda: sample_diffusion(net, Z, 3, sigma_data),
        lambda: sample_consistency(net, Z, (1.0,), sigma_data),
        lambda: sample_multistep(net, Z, 2, sigma_data),
        lambda: time_grid(3, sigma_data),
        lambda: segment_times(3, sigma_data),
        *(lambda solver=solver: solver(net, Z, [1.0, 0.0], sigma_data) for solver in SOLVERS.values()),  # type: ignore[misc]
    ]
    for call in calls:
        with pytest.raises(ValueError, match="sigma_data: expected a positive number, got"):
            call()


def test_other_misuse_is_named(net: SmallNet) -> None:
    """Solvers, numbers of steps and segments, and noise that make no sense."""
    with pytest.raises(ValueError, match="solver: expected one of heun, ddim, dpm2m, dpmpp2m, got 'euler'"):
        sample_diffusion(net, Z, 3, SIGMA_DATA, solver="euler")
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        sample_diffusion(net, Z, 0, SIGMA_DATA)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        sigma_grid(0)
    with pytest.raises(ValueError, match="segments: expected at least 1, got 0"):
        sample_multistep(net, Z, 0, SIGMA_DATA)
    with pytest.raises(ValueError, match="noise: expected 1 tensors"):
        sample_consistency(net, Z, (T_MAX, 1.1), SIGMA_DATA, noise=[Z, Z])
    with pytest.raises(ValueError, match=r"noise\[0\]: expected the shape \(2, 2, 4, 4\) of z, got \(1, 2, 4, 4\)"):
        sample_consistency(net, Z, (T_MAX, 1.1), SIGMA_DATA, noise=[Z[:1]])
    with pytest.raises(ValueError, match=r"noise\[0\]: expected the type torch.float32 of z, got torch.float64"):
        sample_consistency(net, Z, (T_MAX, 1.1), SIGMA_DATA, noise=[Z.double()])
    with pytest.raises(ValueError, match="noise: expected 1 tensors, one for each time after the first, got 2"):
        sample_consistency(net, Z, (T_MAX, 1.1), SIGMA_DATA, noise=Z)
    with pytest.raises(ValueError, match=r"times: expected shape \(steps,\), got \(\)"):
        sample_consistency(net, Z, torch.tensor(T_MAX), SIGMA_DATA)
    with pytest.raises(ValueError, match="times: expected descending numbers"):
        sample_consistency(net, Z, torch.tensor([1.0, 1.1]), SIGMA_DATA)
