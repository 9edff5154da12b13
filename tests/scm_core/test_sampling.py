# SPDX-License-Identifier: Apache-2.0
"""Samplers with a real network: counted passes, independence of the batch, what they refuse. (Accuracy: tests/theory.)"""

import math

import pytest
import torch
from torch import Tensor

from scm_core.nn.small import SmallNet
from scm_core.sampling import Guided, diffusion_nfe, sample_consistency, sample_diffusion, sigma_grid
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
    ],
)
def test_number_of_evaluations(net: SmallNet, solver: str, steps: int, guidance: float | None, nfe: int) -> None:
    """Heun: 2n − 1 (35 for 18 steps, 63 for 32), DDIM: n, twice that with guidance; counted and predicted."""
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


def test_samplers_leave_no_graph(net: SmallNet) -> None:
    """Sampling tracks no gradients, though the network's parameters ask for them."""
    z = SIGMA_DATA * sample_noise([0], SHAPE)
    assert next(net.parameters()).requires_grad
    assert not sample_diffusion(net, z, 2, SIGMA_DATA).requires_grad
    assert not sample_consistency(net, z, (T_MAX,), SIGMA_DATA).requires_grad


def test_edm_grid() -> None:
    """From 80 down to 0.002, linear in σ^{1/7}; one step is σ = 80 alone."""
    grid = torch.tensor(sigma_grid(32), dtype=torch.float64)
    assert float(grid[0]) == pytest.approx(80)
    assert float(grid[-1]) == pytest.approx(0.002)
    root = grid ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(31), rtol=1e-9, atol=0)
    assert sigma_grid(1) == [80.0]


def test_misuse_is_named(net: SmallNet) -> None:
    """Solvers, steps and times that make no sense raise a sentence that names them."""
    z = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="solver: expected one of heun, ddim, got 'euler'"):
        sample_diffusion(net, z, 3, SIGMA_DATA, solver="euler")
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        sample_diffusion(net, z, 0, SIGMA_DATA)
    for times in ((), (1.1, 1.2), (1.1, 1.1), (1.1, 0.0), (2.0, 1.0), (0.0,), (-1.0,)):
        with pytest.raises(ValueError, match="times: expected descending"):
            sample_consistency(net, z, times, SIGMA_DATA)
    with pytest.raises(ValueError, match="noise: expected 1 tensors"):
        sample_consistency(net, z, (T_MAX, 1.1), SIGMA_DATA, noise=[z, z])
