# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance, its error and the moments, against closed forms, torch-fidelity and Monte Carlo."""

import pytest
import torch

from scm_core.compat import prepare_torchvision
from scm_core.evaluate import Moments, frechet_distance, frechet_with_error
from scm_core.evaluate.frechet import FidResult, transport_map

prepare_torchvision()

from torch_fidelity.metric_fid import (  # noqa: E402
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_cov(dim: int, seed: int, rank: int | None = None) -> torch.Tensor:
    root = normal(dim, rank or 2 * dim, seed=seed)
    return root @ root.T / root.shape[1]


def torch_fidelity_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    return fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)[KEY_METRIC_FID]


def test_isotropic_gaussians() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    distance = frechet_distance(torch.zeros(8), 4 * eye, torch.full((8,), 0.5), eye)
    assert distance == pytest.approx(8 * 0.25 + 8 * (2 - 1) ** 2, rel=1e-13)  # 10


@pytest.mark.parametrize("seed", [0, 1])
def test_symmetric_linear_map(seed: int) -> None:
    """Whitened X against XM + b with M symmetric positive definite: the map is the optimal transport, d² = D·b² + ‖M −
    I‖².
    """
    matrix, shift = random_cov(8, seed) + torch.eye(8), 0.3
    raw = normal(500, 8, seed=seed + 10)
    moments = Moments.of(raw)
    x = (raw - moments.mean) @ torch.linalg.inv(torch.linalg.cholesky(moments.cov).T)
    y = Moments.of(x @ matrix + shift)
    expected = 8 * shift**2 + float((matrix - torch.eye(8)).square().sum())
    assert frechet_distance(Moments.of(x).mean, Moments.of(x).cov, y.mean, y.cov) == pytest.approx(expected, rel=1e-10)


def test_commuting_singular_covariances() -> None:
    one, two = torch.tensor([4.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 9.0, 0.0])
    distance = frechet_distance(torch.zeros(4), torch.diag(one), torch.zeros(4), torch.diag(two))
    assert distance == pytest.approx(float((one.sqrt() - two.sqrt()).square().sum()), abs=1e-12)


def test_distance_is_symmetric_and_zero_on_itself() -> None:
    a, b, mean = random_cov(16, 0), random_cov(16, 1), normal(16, seed=2)
    assert frechet_distance(mean, a, -mean, b) == pytest.approx(frechet_distance(-mean, b, mean, a), rel=1e-12)
    assert abs(frechet_distance(mean, a, mean, a)) < 1e-12 * float(a.trace())


def test_agrees_with_torch_fidelity() -> None:
    a, b = normal(700, 64, seed=0) @ random_cov(64, 5) + 0.1, normal(900, 64, seed=1)
    ours = frechet_with_error(a, Moments.of(b)).value
    assert ours == pytest.approx(torch_fidelity_fid(a, b), rel=1e-6)


def test_fewer_samples_than_dimensions() -> None:
    """tr (Σ₁Σ₂)^½ is the nuclear norm of the N×M matrix of inner products of the centred samples, which has no D×D root
    in it.
    """
    a, b = normal(20, 64, seed=3), normal(40, 64, seed=4) + 0.2
    one, two = (x - x.mean(0) for x in (a, b))
    nuclear = torch.linalg.svdvals(one @ two.T / (19 * 39) ** 0.5).sum()
    traces = one.square().sum() / 19 + two.square().sum() / 39
    expected = float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * nuclear)
    assert frechet_with_error(a, Moments.of(b)).value == pytest.approx(expected, rel=1e-6)


def test_finite_sample_bias_of_equal_gaussians() -> None:
    """E[FID] of N samples of the reference itself is D/N + D(D + 1)/(4N) to leading order."""
    dim, count, repeats = 8, 2000, 60
    reference = Moments.given(torch.zeros(dim), torch.eye(dim), count=10**9)
    values = torch.tensor([frechet_with_error(normal(count, dim, seed=s), reference).value for s in range(repeats)])
    expected = dim / count + dim * (dim + 1) / (4 * count)
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / repeats**0.5 + 0.02 * expected


@pytest.mark.parametrize("kind", ["normal", "skewed", "distant mean", "singular reference", "singular samples"])
def test_standard_error_is_the_spread_over_repetitions(kind: str) -> None:
    dim, count, repeats = 6, 400, 400
    mixing = random_cov(dim, 7, rank=3 if kind == "singular samples" else None)
    mean = torch.full((dim,), 3.0 if kind == "distant mean" else 0.3)
    reference = Moments.given(mean, random_cov(dim, 8, rank=3 if "reference" in kind else None), 10**9)
    results = []
    for seed in range(repeats):
        z = normal(count, dim, seed=seed)
        results.append(frechet_with_error((z.exp() if kind == "skewed" else z) @ mixing, reference))
    truth = float(torch.tensor([r.value for r in results]).std())  # itself known to 1/√(2·400) = 3.5%
    claimed = float(torch.tensor([r.se for r in results]).square().mean().sqrt())
    assert claimed == pytest.approx(truth, rel=0.15)


def test_transport_map_moves_the_covariance() -> None:
    one, two = random_cov(10, 0), random_cov(10, 1)
    transport = transport_map(one, two)
    torch.testing.assert_close(transport @ one @ transport, two, rtol=1e-9, atol=1e-11)
    assert float(torch.linalg.eigvalsh(transport).min()) > 0


def test_influence_is_the_derivative() -> None:
    """I − T is the derivative of d² by Σ₁: compare with a central difference along a random symmetric direction."""
    one, two, zero = random_cov(6, 0), random_cov(6, 1), torch.zeros(6)
    direction = random_cov(6, 2)
    h = 1e-5
    plus, minus = (frechet_distance(zero, one + s * h * direction, zero, two) for s in (1, -1))
    gradient = torch.eye(6, dtype=torch.float64) - transport_map(one, two)
    assert float((gradient * direction).sum()) == pytest.approx((plus - minus) / (2 * h), rel=1e-6)


def test_moments_equal_the_direct_formulae() -> None:
    x = normal(300, 12, seed=0) @ random_cov(12, 1) + 5
    moments = Moments(12)
    for chunk in x.split([1, 100, 0, 199]):
        moments.update(chunk)
    assert moments.count == 300
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.cov, torch.cov(x.T), rtol=1e-12, atol=1e-14)


def test_any_sharding_and_order_gives_the_same_covariance() -> None:
    x = normal(1000, 16, seed=0)
    whole = Moments.of(x).cov
    shards = [
        Moments.of(chunk) for chunk in x[torch.randperm(1000, generator=torch.Generator().manual_seed(1))].split(37)
    ]
    merged = Moments(16)
    for shard in reversed(shards):
        merged = merged.merge(shard)
    assert float((merged.cov - whole).abs().max() / whole.abs().max()) < 1e-13


def test_a_large_offset_does_not_cancel() -> None:
    x = normal(1000, 4, seed=0)
    shifted = Moments(4)
    for chunk in (x + 1e6).split(100):
        shifted.update(chunk)
    torch.testing.assert_close(shifted.cov, Moments.of(x).cov, rtol=1e-7, atol=1e-9)


def test_merging_leaves_the_operands_alone() -> None:
    a, b = Moments.of(normal(10, 3, seed=0)), Moments.of(normal(10, 3, seed=1))
    before = a.cov
    a.merge(b)
    assert a.count == 10
    torch.testing.assert_close(a.cov, before, rtol=0, atol=0)


def test_bad_input_is_refused() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(ValueError, match="dimensions"):
        frechet_distance(zero, eye, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(zero, torch.diag(torch.tensor([1.0, 1.0, -1.0])), zero, eye)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_distance(zero, eye, zero, -eye)
    with pytest.raises(ValueError, match="symmetric"):
        frechet_distance(zero, torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]]), zero, eye)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(zero * torch.nan, eye, zero, eye)
    with pytest.raises(ValueError, match="NaN"):
        Moments.of(torch.full((4, 3), torch.nan))
    with pytest.raises(ValueError, match="must have 3 dimensions"):
        Moments(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="floating point"):
        Moments.of(torch.zeros(2, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="two samples"):
        _ = Moments.of(torch.zeros(1, 3)).cov
    with pytest.raises(ValueError, match="at least 2"):
        frechet_with_error(torch.zeros(1, 3), Moments.given(zero, eye, 5))


def test_the_error_is_an_upper_estimate_for_class_balanced_samples() -> None:
    """Half of the samples of each class: the spread over repetitions is below the error; for independent draws it is the error."""
    generator = torch.Generator().manual_seed(0)
    reference = Moments.given(torch.zeros(2).double(), torch.eye(2).double(), 10_000)
    n, repetitions = 200, 300

    def draw(labels: torch.Tensor) -> FidResult:
        centres = torch.tensor([[2.0, 0.0], [-0.5, 0.5]])[labels]
        return frechet_with_error(centres + 0.5 * torch.randn(n, 2, generator=generator), reference)

    balanced = [draw(torch.arange(n) % 2) for _ in range(repetitions)]
    independent = [draw(torch.randint(2, (n,), generator=generator)) for _ in range(repetitions)]
    for results, low, high in ((balanced, 0.3, 0.75), (independent, 0.85, 1.15)):
        spread = torch.tensor([result.value for result in results]).std()
        error = torch.tensor([result.se for result in results]).mean()
        assert low < float(spread / error) < high
