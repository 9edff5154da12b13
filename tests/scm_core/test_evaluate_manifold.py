# SPDX-License-Identifier: Apache-2.0
"""Precision, recall and KID against brute force, torch-fidelity and cases whose answer is known."""

import pytest
import torch

from scm_core.compat import prepare_torchvision
from scm_core.evaluate import kid, manifold, precision_recall

prepare_torchvision()

from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric  # noqa: E402


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(real: torch.Tensor, fake: torch.Tensor, k: int) -> tuple[float, float]:
    def inside(points: torch.Tensor, manifold: torch.Tensor) -> float:
        count = 0
        radii = [sorted(float((m - other).norm()) for other in manifold)[k] for m in manifold]  # [0] is itself
        for point in points:
            count += any(float((point - m).norm()) <= r for m, r in zip(manifold, radii, strict=True))
        return count / len(points)

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_equal_brute_force(k: int) -> None:
    real, fake = normal(60, 3, seed=0), 0.7 * normal(45, 3, seed=1) + 0.8
    expected = brute_force(real, fake, k)
    assert 0 < expected[0] < 1
    assert 0 < expected[1] < 1
    assert precision_recall(real, fake, k) == expected


def test_precision_recall_agree_with_torch_fidelity() -> None:
    real, fake = normal(500, 16, seed=0), 0.9 * normal(400, 16, seed=1) + 0.1
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    ours = precision_recall(real, fake)
    assert ours.precision == pytest.approx(theirs[KEY_METRIC_PRECISION], abs=1e-7)  # theirs is a float32 mean
    assert ours.recall == pytest.approx(theirs[KEY_METRIC_RECALL], abs=1e-7)
    assert ours.precision != ours.recall


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(101, 5, seed=0), normal(83, 5, seed=1) + 0.3
    whole, distance = precision_recall(real, fake), kid(real, fake)
    monkeypatch.setattr(manifold, "BLOCK_ELEMENTS", 700)
    assert precision_recall(real, fake) == whole
    assert kid(real, fake) == pytest.approx(distance, rel=1e-12)


def test_disjoint_sets_and_equal_sets() -> None:
    x = normal(50, 4, seed=0)
    assert precision_recall(x, x + 1000) == (0, 0)
    assert precision_recall(x, x) == (1, 1)


def test_a_collapsed_generator_has_precision_without_recall() -> None:
    real = normal(300, 4, seed=0)
    collapsed = real[:1].repeat(300, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall == 1 / 300  # balls of radius zero hold the one point only


def test_the_boundary_counts_on_a_lattice() -> None:
    """Points in line, one step apart, beyond the end of such a line of real ones: those on a ball's boundary are inside."""
    lattice = torch.arange(100, dtype=torch.float64)[:, None] * torch.tensor([[0.1, 0.3, 0.7]])
    # The end points have their second neighbour two steps away, so the outermost ball reaches two steps out.
    outside = lattice[-1] + lattice[1] * torch.arange(1, 5)[:, None]
    assert precision_recall(lattice, outside, k=2).precision == 2 / 4


def test_kid_equals_torch_fidelity_with_one_subset_of_everything() -> None:
    real, fake = normal(200, 32, seed=0), 1.2 * normal(200, 32, seed=1) + 0.1
    theirs = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=200, verbose=False)[KEY_METRIC_KID_MEAN]
    assert kid(real, fake) == pytest.approx(theirs, rel=1e-6)


def test_kid_is_the_u_statistic() -> None:
    real, fake = normal(7, 3, seed=0), normal(5, 3, seed=1)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / 3 + 1) ** 3

    def off_diagonal(x: torch.Tensor) -> float:
        n = len(x)
        return sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    cross = sum(kernel(a, b) for a in real for b in fake) / 35
    assert kid(real, fake) == pytest.approx(off_diagonal(real) + off_diagonal(fake) - 2 * cross, rel=1e-12)


def test_kid_is_unbiased() -> None:
    values = torch.tensor([kid(normal(50, 4, seed=2 * s), normal(50, 4, seed=2 * s + 1)) for s in range(300)])
    assert float(values.mean().abs()) < 4 * float(values.std()) / 300**0.5
    assert float(values.min()) < 0 < float(values.max())


def test_bad_input_is_refused() -> None:
    x = normal(10, 3, seed=0)
    with pytest.raises(ValueError, match="more than k = 3"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="k must be"):
        precision_recall(x, x, k=0)
    with pytest.raises(ValueError, match="must have 3 dimensions"):
        precision_recall(x, normal(10, 4, seed=0))
    with pytest.raises(ValueError, match="NaN"):
        kid(x, x * torch.nan)
    with pytest.raises(ValueError, match="at least 2"):
        kid(x, x[:1])
