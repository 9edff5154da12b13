# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance, its error, its bias and the moments, against closed forms, torch-fidelity and Monte Carlo."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from scm_core.compat import prepare_torchvision
from scm_core.evaluate import Moments, frechet_distance, frechet_with_error
from scm_core.evaluate import moments as moments_module
from scm_core.evaluate.frechet import FidResult, trace_term, transport_map, triangular_root

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
    result = frechet_with_error(a, Moments.of(b))
    assert result.value == pytest.approx(expected, rel=1e-8)
    assert (result.bias, result.corrected) == (None, None)


@pytest.mark.parametrize("rank", [None, 10])
def test_few_samples_give_what_the_covariances_give(rank: int | None) -> None:
    """The N×N matrix and the D×D product agree, in the distance and in what each sample adds to it."""
    reference = Moments.given(normal(48, seed=5), random_cov(48, 6, rank), 1000)
    features = normal(30, 48, seed=7) @ random_cov(48, 8)
    moments = Moments.of(features)
    mean, cov = moments.mean, moments.cov
    few = frechet_with_error(features, reference)
    many = frechet_distance(mean, cov, reference.mean, reference.cov)
    assert few.value == pytest.approx(many, rel=1e-6)
    x = features - mean
    influence = 2 * x @ (mean - reference.mean) + (x * (x - x @ transport_map(cov, reference.cov))).sum(dim=1)
    assert few.se == pytest.approx(float(influence.std()) / 30**0.5, rel=1e-6)


def test_the_roots_of_a_reference_are_used() -> None:
    one, two, features = random_cov(12, 0), random_cov(12, 1), normal(100, 12, seed=2)
    root = triangular_root(two)
    torch.testing.assert_close(root.T @ root, two, rtol=1e-12, atol=1e-13)
    assert torch.equal(root, root.triu())
    eigenvalues = torch.linalg.eigvals(one @ two)
    assert trace_term(one, root) == pytest.approx(float(eigenvalues.real.sqrt().sum()), rel=1e-12)
    reference = Moments.given(torch.zeros(12).double(), two, 1000)
    assert frechet_with_error(features, reference, root) == frechet_with_error(features, reference)
    wrong = frechet_with_error(features, reference, 2 * root)
    assert wrong.value != pytest.approx(frechet_with_error(features, reference).value)


def test_finite_sample_bias_of_equal_gaussians() -> None:
    """E[FID] of N samples of the reference itself is D/N + D(D + 1)/(4N) to leading order."""
    dim, count, repeats = 8, 2000, 60
    reference = Moments.given(torch.zeros(dim), torch.eye(dim), count=10**9)
    values = torch.tensor([frechet_with_error(normal(count, dim, seed=s), reference).value for s in range(repeats)])
    expected = dim / count + dim * (dim + 1) / (4 * count)
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / repeats**0.5 + 0.02 * expected


def test_the_bias_of_a_full_factorial_design() -> None:
    """All of {−1, 1}^D: u_i² = 1, so that h_ij² is 1 off the diagonal and 0 on it, and every eigenvalue is N/(N − 1)."""
    dim, count = 5, 32
    features = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)), dtype=torch.float64)
    a = count / (count - 1)
    expected = dim * a / count + dim * (dim - 1) / (2 * a**1.5) / (2 * count)
    reference = Moments.given(torch.zeros(dim).double(), torch.eye(dim).double(), 10**9)
    assert frechet_with_error(features, reference).bias == pytest.approx(expected, rel=1e-12)


def test_the_bias_of_equal_gaussians() -> None:
    """D/N + D(D + 1)/(4N), from the samples' own fourth moments."""
    dim, count = 6, 40_000
    reference = Moments.given(torch.zeros(dim).double(), torch.eye(dim).double(), 10**9)
    result = frechet_with_error(normal(count, dim, seed=0), reference)
    assert result.bias == pytest.approx(dim / count + dim * (dim + 1) / (4 * count), rel=0.02)
    assert result.corrected == result.value - result.bias


@pytest.mark.parametrize("rank", [None, 3])
def test_the_bias_is_the_mean_second_derivative(rank: int | None) -> None:
    """Towards sample n the covariance moves by x̃x̃ᵀ − Σ: second differences of d². What the mean adds is tr Σ/N."""
    features = (normal(40, 4, seed=0) / 2).exp() @ random_cov(4, 1)
    reference = Moments.given(normal(4, seed=2), random_cov(4, 3, rank), 10**9)
    moments = Moments.of(features)
    mean, cov = moments.mean, moments.cov
    x = features - mean
    biased = x.T @ x / 40

    def towards(n: int, step: float) -> float:
        return frechet_distance(mean, cov + step * (torch.outer(x[n], x[n]) - biased), reference.mean, reference.cov)

    step = 2e-3  # a zero eigenvalue comes as the root of a rounding error, 1e-8, into differences of step²
    second = [(towards(n, step) - 2 * towards(n, 0) + towards(n, -step)) / step**2 for n in range(40)]
    expected = float(cov.trace()) / 40 + sum(second) / 40 / (2 * 40)
    assert frechet_with_error(features, reference).bias == pytest.approx(expected, rel=1e-3)


def test_the_bias_approaches_the_delete_one_jackknifes() -> None:
    """(N − 1)(mean of d² without sample i − d²), from which it differs by a term of the next order in 1/N."""
    reference = Moments.given(normal(3, seed=2), random_cov(3, 3), 10**9)
    errors = []
    for count in (100, 400, 1600):
        features = normal(count, 3, seed=0) @ random_cov(3, 1)
        whole = frechet_with_error(features, reference)
        left = Moments.of(features)
        without = []
        for x in features - left.mean:  # leaving one out is a change of rank one
            cov = (left.cov * (count - 1) - torch.outer(x, x) * count / (count - 1)) / (count - 2)
            without.append(frechet_distance(left.mean - x / (count - 1), cov, reference.mean, reference.cov))
        jackknife = (count - 1) * (sum(without) / count - whole.value)
        errors.append(abs(whole.bias / jackknife - 1))
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2


KINDS = ["normal", "skewed", "distant mean", "singular reference", "singular samples"]


class Repetitions(NamedTuple):
    """Results of many sets of samples of one distribution, and how far each is off beside the first-order fluctuation."""

    results: list[FidResult]
    excess: torch.Tensor


@pytest.fixture(scope="module")
def repetitions() -> Callable[[str], Repetitions]:
    """The repetitions (N/D = 40) of a kind. Their first-order fluctuation, the mean of the true influence, is known."""
    dim, count, repeats = 6, 240, 1500
    kept: dict[str, Repetitions] = {}

    def of(kind: str) -> Repetitions:
        if kind in kept:
            return kept[kind]
        mixing = random_cov(dim, 7, rank=3 if kind == "singular samples" else None)
        mean = torch.full((dim,), 3.0 if kind == "distant mean" else 0.3, dtype=torch.float64)
        reference = Moments.given(mean, random_cov(dim, 8, rank=3 if "reference" in kind else None), 10**9)
        root = triangular_root(reference.cov)
        z = normal(repeats, count, dim, seed=0)
        if kind == "skewed":  # log-normal, standardised
            z = ((z / 2).exp() - math.exp(1 / 8)) / (math.exp(1 / 4) * (math.exp(1 / 4) - 1)) ** 0.5
        x, cov = z @ mixing, mixing.T @ mixing
        slope = torch.eye(dim).double() - transport_map(cov, reference.cov)
        influence = -2 * x @ mean + (x @ slope * x).sum(dim=-1) - (slope @ cov).trace()
        results = [frechet_with_error(samples, reference, root) for samples in x]
        values = torch.tensor([result.value for result in results], dtype=torch.float64)
        truth = frechet_distance(torch.zeros(dim), cov, reference.mean, reference.cov)
        kept[kind] = Repetitions(results, values - truth - influence.mean(dim=1))
        return kept[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_standard_error_is_the_spread_over_repetitions(kind: str, repetitions: Callable[[str], Repetitions]) -> None:
    results = repetitions(kind).results
    truth = float(torch.tensor([r.value for r in results]).std())  # itself known to 1/√3000 = 2%
    claimed = float(torch.tensor([r.se for r in results]).square().mean().sqrt())
    assert claimed == pytest.approx(truth, rel=0.10)


@pytest.mark.parametrize("kind", KINDS)
def test_bias_is_what_the_mean_over_repetitions_is_too_high(
    kind: str, repetitions: Callable[[str], Repetitions]
) -> None:
    results, excess = repetitions(kind)
    bias = float(torch.tensor([r.bias for r in results]).mean())
    error = float(excess.std()) / len(results) ** 0.5
    assert error < 0.05 * bias  # so that the next line says something
    assert abs(float(excess.mean()) - bias) < 3 * error + 0.04 * bias  # N/D = 40: the next order is left


@pytest.mark.parametrize(
    ("dim", "count", "skewed", "high"), [(8, 400, False, 1.1), (40, 800, False, 1.1), (40, 800, True, 1.2)]
)
def test_the_error_of_samples_of_the_reference_itself(dim: int, count: int, skewed: bool, high: float) -> None:
    """There d² is quadratic in the fluctuations: for a Gaussian of covariance I its variance is (2D + D(D + 1)/4)/N²."""
    repeats = 600
    reference = Moments.given(torch.zeros(dim).double(), torch.eye(dim).double(), 10**9)
    z = normal(repeats, count, dim, seed=0)
    if skewed:  # log-normal, standardised
        z = ((z / 3).exp() - math.exp(1 / 18)) / (math.exp(1 / 9) * (math.exp(1 / 9) - 1)) ** 0.5
    results = [frechet_with_error(x, reference) for x in z]
    spread = float(torch.tensor([r.value for r in results]).std())  # itself known to 1/√1200 = 3 %
    claimed = float(torch.tensor([r.se for r in results]).square().mean().sqrt())
    if not skewed:
        assert spread == pytest.approx((2 * dim + dim * (dim + 1) / 4) ** 0.5 / count, rel=0.1)
    assert 0.95 < claimed / spread < high


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


def test_the_same_chunks_give_the_same_bits() -> None:
    """Whoever made a chunk's moments, and in whichever order they were made: combined in one order, they are the same."""
    x = normal(5000, 16, seed=0, dtype=torch.float32) @ random_cov(16, 1).float() + 3
    chunks = x.split(moments_module.CHUNK)
    assert len(chunks) == 5
    backwards = [Moments.of(chunk) for chunk in reversed(chunks)][::-1]
    whole = Moments.of(x)
    for same in (Moments.of_chunks(iter(chunks)), Moments.merged(backwards)):
        assert same.count == 5000
        assert torch.equal(same.mean, whole.mean)
        assert torch.equal(same.cov, whole.cov)
    other = Moments.merged(reversed(backwards))
    assert float((other.cov - whole.cov).abs().max() / whole.cov.abs().max()) < 1e-13
    for nothing in (Moments.of_chunks, Moments.merged):
        with pytest.raises(ValueError, match="no "):
            nothing([])


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


def test_float32_features_have_float64s_distance_and_nearly_its_error_and_bias() -> None:
    """Also where the spectrum falls to where float32 has no digits left beside the largest eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -5, 40, dtype=torch.float64)  # standard deviations
    x, y = (torch.randn(900, 40, generator=generator, dtype=torch.float64) * decay for _ in range(2))
    features = (1.1 * x + 0.1).float()
    single, double = (frechet_with_error(given, Moments.of(y)) for given in (features, features.double()))
    assert single.value == double.value
    assert single.se == pytest.approx(double.se, rel=1e-5)
    assert single.bias == pytest.approx(double.bias, rel=1e-5)
    assert frechet_with_error(features, Moments.of(y), moments=Moments.of(features)) == single
