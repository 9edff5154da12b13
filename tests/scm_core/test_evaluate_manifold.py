# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, density, coverage and KID against brute force, torch-fidelity and cases whose answer is known."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from scm_core.compat import prepare_torchvision
from scm_core.evaluate import FeatureSet, Moments, kid, manifold, manifold_metrics, neighbours, pairs, precision_recall
from scm_core.evaluate import products as products_module
from scm_core.evaluate.points import Points

prepare_torchvision()

from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric  # noqa: E402


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, seed: int, top: int) -> torch.Tensor:
    return torch.randint(top, shape, generator=torch.Generator().manual_seed(seed)).float()


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


def in_float64(real: torch.Tensor, fake: torch.Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage from all differences, in float64."""
    real, fake = real.double(), fake.double()

    def squared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([(x - b).square().sum(dim=1) for x in a])

    def radii(points: torch.Tensor) -> torch.Tensor:
        return squared(points, points).sort(dim=1).values[:, k]  # [0] is the point itself

    between = squared(fake, real)
    in_real, in_fake = between <= radii(real), between <= radii(fake)[:, None]
    return (
        int(in_real.any(dim=1).sum()) / len(fake),
        int(in_fake.any(dim=0).sum()) / len(real),
        int(in_real.sum()) / (k * len(fake)),
        int(in_real.any(dim=0).sum()) / len(real),
    )


def without_groups(real: torch.Tensor, fake: torch.Tensor, k: int, groups: int) -> tuple[float, ...]:
    """Errors of precision and recall by the delete-a-group jackknife as it is defined: both again for every rest."""
    edges = [round(g * len(fake) / groups) for g in range(groups + 1)]
    rests = [torch.cat([fake[:start], fake[end:]]) for start, end in pairwise(edges)]
    table = torch.tensor([in_float64(real, rest, k)[:2] for rest in rests], dtype=torch.float64)
    variance = (groups - 1) / groups * (table - table.mean(dim=0)).square().sum(dim=0)
    return tuple(variance.sqrt().tolist())


def clusters(seed: int) -> torch.Tensor:
    """Four tight clusters far apart: float32 products have larger errors than the distances within one are."""
    centres = 100 * normal(4, 24, seed=99)
    return (centres[torch.arange(160) % 4] + 1e-2 * normal(160, 24, seed=seed)).float()


SETS: dict[str, Callable[[int], torch.Tensor]] = {
    "normal": lambda seed: normal(170, 12, seed=seed, dtype=torch.float32) * (1 + 0.1 * seed),
    "one dimension": lambda seed: normal(170, 1, seed=seed, dtype=torch.float32),
    "many dimensions": lambda seed: (normal(120, 5, seed=seed) @ normal(5, 700, seed=9)).relu().float(),
    "float64": lambda seed: normal(170, 6, seed=seed) + seed,
    "half": lambda seed: normal(170, 6, seed=seed, dtype=torch.float16) + 0.5 * seed,
    "lattice": lambda seed: integers(170, 3, seed=seed, top=5) + seed,
    "lattice with many duplicates": lambda seed: integers(200, 2, seed=seed, top=4),
    "lattice of tenths": lambda seed: integers(170, 4, seed=seed, top=4) * 0.1,
    "duplicates only": lambda seed: torch.ones(60, 4) * seed,
    "clusters": clusters,
    "far from zero": lambda seed: integers(170, 3, seed=seed, top=9) + 1e6,
    "one outlier": lambda seed: torch.cat([normal(150, 4, seed=seed, dtype=torch.float32), torch.full((1, 4), 1e12)]),
    "two outliers": lambda seed: torch.cat(
        [normal(150, 4, seed=seed, dtype=torch.float32), torch.full((1, 4), 1e22), torch.full((1, 4), -1e22)]
    ),  # beside which products of the others vanish in float32
    "tiny": lambda seed: 1e-25 * normal(170, 5, seed=seed, dtype=torch.float32),
    "huge": lambda seed: 1e25 * normal(170, 5, seed=seed, dtype=torch.float32),
}


@pytest.fixture(params=["split", "float32", "float64"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As for many pairs of float32 features, with bfloat16 or without, or as for the few that tests have."""
    if request.param != "float64":
        monkeypatch.setattr(products_module, "FEW", 0)
    monkeypatch.setattr(products_module, "split_pays", lambda a, b: request.param == "split")
    return request.param


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("k", [1, 3])
def test_every_decision_is_float64s(kind: str, k: int, products: str) -> None:
    real, fake = SETS[kind](0), SETS[kind](1)
    expected = in_float64(real, fake, k)
    assert manifold_metrics(real, fake, k)[:4] == expected
    assert manifold_metrics(real, fake, k, side=48)[:4] == expected
    assert manifold_metrics(fake, real[: len(real) // 2], k)[:4] == in_float64(fake, real[: len(real) // 2], k)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize(("k", "groups"), [(1, 2), (3, 7)])
def test_errors_are_those_of_leaving_groups_out(kind: str, k: int, groups: int, products: str) -> None:
    real, fake = SETS[kind](0), SETS[kind](1)
    expected = without_groups(real, fake, k, groups)
    plain, result = manifold_metrics(real, fake, k), manifold_metrics(real, fake, k, groups=groups)
    assert result[:4] == plain[:4]
    assert result[5:] == expected  # to the last bit
    assert plain[5:] == (None, None)
    assert manifold_metrics(real, fake, k, side=48, groups=groups)[5:] == expected


@pytest.mark.parametrize("spare", [8, 0])
def test_errors_where_a_group_has_most_neighbours(spare: int, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters one after the other, whose parts in different groups are each other's nearest; without spare neighbours kept, too."""
    monkeypatch.setattr(neighbours, "SPARE", spare)
    order = torch.arange(160).reshape(40, 4).T.flatten()
    real, fake = SETS["clusters"](0), SETS["clusters"](1)[order]
    expected = without_groups(real, fake, 3, 7)
    assert manifold_metrics(real, fake, 3, groups=7)[5:] == expected
    assert min(expected) > 0
    near = torch.cat([fake[:100], fake[:1] + 1e-3 * normal(60, 24, seed=2).float()])  # all of the last three groups
    assert manifold_metrics(real, near, 3, groups=8)[5:] == without_groups(real, near, 3, 8)


@pytest.mark.parametrize("wider", [0.0, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("kind", ["normal", "many dimensions", "clusters"])
def test_radii_without_groups(kind: str, wider: float, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider bounds hold as well, and leave more open: which of the kept are the nearest outside of a group, too."""
    init = products_module.Products.__init__

    def with_wider_bounds(self: products_module.Products, a: Points, b: Points) -> None:
        init(self, a, b)
        generator = torch.Generator().manual_seed(0)
        more = wider * torch.rand(a.count, generator=generator, dtype=torch.float64)
        self.slack = self.slack[0] + more, self.slack[1] + more

    monkeypatch.setattr(products_module.Products, "__init__", with_wider_bounds)
    points = SETS[kind](0)
    groups = [slice(0, 70), slice(70, 75), slice(75, len(points))]
    squared = torch.stack([(x - points.double()).square().sum(dim=1) for x in points.double()])
    squared.fill_diagonal_(torch.inf)
    expected = [squared.sort(dim=1).values[:, 2]]
    for group in groups:
        left = squared.clone()
        left[:, group] = torch.inf
        expected.append(left.sort(dim=1).values[:, 2])
        expected[-1][group] = -torch.inf
    torch.testing.assert_close(FeatureSet(points).radii(3, groups), torch.stack(expected, dim=1), rtol=1e-12, atol=0)


def test_errors_with_a_group_for_each_sample() -> None:
    real, fake = SETS["normal"](0), SETS["normal"](1)[:50]
    assert manifold_metrics(real, fake, 1, groups=50)[5:] == without_groups(real, fake, 1, 50)


def test_errors_take_no_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor more than a few candidates at a time, where a block has many."""
    reference, fake = FeatureSet(SETS["lattice"](0)), SETS["lattice"](1)
    expected = manifold_metrics(reference, fake, groups=10)
    passes: list[bool] = []
    blocks = manifold.blocks
    monkeypatch.setattr(manifold, "blocks", lambda a, b, side=None: passes.append(a is b) or blocks(a, b, side))
    monkeypatch.setattr(neighbours, "ALL_ELEMENTS", 50)
    assert manifold_metrics(reference, fake, groups=10) == expected
    assert passes == [True, False]  # the generated set with itself, and with the reference


def test_products_alone_would_decide_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `test_every_decision_is_float64s` says holds because of the second look."""
    real, fake = SETS["clusters"](0), SETS["clusters"](1)
    monkeypatch.setattr(products_module, "FEW", 0)
    monkeypatch.setattr(products_module, "relative_error", lambda dim, dtype: 0.0)
    assert manifold_metrics(real, fake)[:4] != in_float64(real, fake, 3)


@pytest.mark.parametrize("kind", ["normal", "many dimensions", "clusters", "tiny"])
def test_squared_distances_are_within_their_bounds(kind: str, products: str) -> None:
    a = Points(SETS[kind](0))
    b = Points(SETS[kind](1), beside=a)
    for block in pairs.blocks(a, b, side=64):
        assert block.gram.dtype == (torch.float64 if products == "float64" else torch.float32)
        assert block.products.split == (products == "split")
        x, y = (points.features[part].double() for points, part in ((a, block.rows), (b, block.columns)))
        exact = (x[:, None] - y).square().sum(dim=-1) * block.scale**2
        lower = block.lower().double()
        slack = block.products.slack
        margin = 2 * (slack[0][block.rows, None] + slack[1][block.columns])
        assert bool((lower <= exact).all())
        assert bool((exact <= lower + margin).all())
        middle = (exact - lower - margin / 2).abs() / margin  # 0: in the middle of the bounds, ½: at one of them
        assert 0 < float(middle.max()) < 0.25


@pytest.mark.parametrize(("width", "count"), [(512, 4), (512, 40), (510, 4), (3, 4)])
def test_the_smallest_of_each_row(width: int, count: int) -> None:
    matrix = normal(20, width, seed=0)
    values, index = neighbours.smallest(matrix, count)
    wanted = matrix.sort(dim=1)
    assert torch.equal(values, wanted.values[:, :count])
    assert torch.equal(index, wanted.indices[:, :count])


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(101, 5, seed=0), normal(83, 5, seed=1) + 0.3
    whole, distance = precision_recall(real, fake), kid(real, fake)
    monkeypatch.setitem(pairs.SIDE, "cpu", 30)
    assert precision_recall(real, fake) == whole
    assert kid(real, fake) == pytest.approx(distance, rel=1e-12)


def test_one_pass_gives_what_each_function_gives_and_gives_it_again() -> None:
    real, fake = SETS["many dimensions"](0), SETS["many dimensions"](1)
    result = manifold_metrics(real, fake, side=50)
    assert manifold_metrics(real, fake, side=50) == result  # to the last bit
    assert result[:2] == precision_recall(real, fake)
    assert result.kid == pytest.approx(kid(real, fake), rel=1e-8)


def test_a_reference_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fakes = SETS["normal"](0), [SETS["normal"](seed) for seed in (1, 2, 3)]
    expected = {k: [manifold_metrics(real, fake, k) for fake in fakes] for k in (1, 3)}
    reference = FeatureSet(real)
    reference.prepare(3)
    passes: list[bool] = []
    blocks = manifold.blocks
    monkeypatch.setattr(manifold, "blocks", lambda a, b, side=None: passes.append(a is b) or blocks(a, b, side))
    assert [manifold_metrics(reference, fake) for fake in fakes] == expected[3]
    assert [manifold_metrics(reference, fake, 1) for fake in fakes] == expected[1]
    assert passes == [True, False] * 6  # the generated set with itself, and with the reference
    known = FeatureSet.given(real, reference.shift, reference.nearest(3), reference.kernel_mean)
    assert manifold_metrics(known, fakes[0]) == expected[3][0]
    assert manifold_metrics(known.to("cpu"), fakes[0]) == expected[3][0]
    assert manifold_metrics(known, fakes[0], 5)[:4] == in_float64(real, fakes[0], 5)


def test_a_callers_low_precision_is_not_used_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "FEW", 0)
    real, fake = SETS["many dimensions"](0), SETS["many dimensions"](1)
    expected = manifold_metrics(real, fake)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert manifold_metrics(real, fake) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", SETS)
def test_a_gpu_decides_alike(kind: str) -> None:
    real, fake = SETS[kind](0), SETS[kind](1)
    there, here = (manifold_metrics(real, fake, device=device, groups=7) for device in ("cuda", "cpu"))
    assert there[:4] == here[:4]
    assert there[5:] == here[5:]
    assert there.kid == pytest.approx(here.kid, rel=1e-6)


def test_disjoint_sets_and_equal_sets() -> None:
    x = normal(50, 4, seed=0)
    assert precision_recall(x, x + 1000) == (0, 0)
    assert precision_recall(x, x) == (1, 1)
    assert manifold_metrics(x, x + 1000)[:4] == (0, 0, 0, 0)
    same = manifold_metrics(x, x, k=3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == (1 + 3) / 3  # a ball holds its own centre and three others


def test_a_collapsed_generator_has_precision_without_recall() -> None:
    real = normal(300, 4, seed=0)
    collapsed = real[:1].repeat(300, 1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1
    assert recall == 1 / 300  # balls of radius zero hold the one point only
    distances = (real - real[0]).norm(dim=1)
    radii = torch.cdist(real, real).sort(dim=1).values[:, 3]
    holders = int((distances <= radii).sum())  # of the one point
    result = manifold_metrics(real, collapsed)
    assert result[:2] == (precision, recall)
    assert (result.density, result.coverage) == (holders / 3, holders / 300)


def test_the_boundary_counts_on_a_lattice() -> None:
    """Points in line, one step apart, beyond the end of such a line of real ones: those on a ball's boundary are inside."""
    lattice = torch.arange(100, dtype=torch.float64)[:, None] * torch.tensor([[0.1, 0.3, 0.7]])
    # The end points have their second neighbour two steps away, so the outermost ball reaches two steps out.
    outside = lattice[-1] + lattice[1] * torch.arange(1, 5)[:, None]
    assert precision_recall(lattice, outside, k=2).precision == 2 / 4


def test_density_and_coverage_on_a_line() -> None:
    """Points one step apart, k = 1: balls of radius one step. Generated points halfway lie in two balls, at the end in one."""
    real = torch.stack([torch.arange(100.0), torch.zeros(100)], dim=1)
    halfway = manifold_metrics(real, real + torch.tensor([0.5, 0.0]), k=1)
    assert halfway[:4] == (1, 1, 199 / 100, 1)
    # One step beside the line each lies on the boundary of one ball, and is outside with the next number of float32.
    assert manifold_metrics(real, real + torch.tensor([0.0, 1.0]), k=1)[:4] == (1, 1, 1, 1)
    above_one = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    beyond = torch.stack([torch.arange(100.0), above_one.expand(100)], dim=1)
    assert manifold_metrics(real, beyond, k=1)[:4] == (0, 0, 0, 0)
    # A tenth of the line: its points lie in their own ball and both neighbours', the first one in its own and one more.
    part = manifold_metrics(real, real[:10], k=1)
    assert part[:4] == (1, 11 / 100, 29 / 10, 11 / 100)


def test_equal_distributions_have_the_expected_density_and_coverage() -> None:
    """Of n − 1 other real and m generated points, all exchangeable, a ball holds the k nearest real ones and what is
    nearer than the k-th. A generated point is among the k nearest of n with probability k/n: density has mean 1. None is
    there if the k nearest are all real: coverage has mean 1 − [(n − 1)…(n − k)]/[(n + m − 1)…(n + m − k)].
    """
    n, m, k, repeats = 50, 30, 3, 400
    results = torch.tensor(
        [manifold_metrics(normal(n, 3, seed=2 * s), normal(m, 3, seed=2 * s + 1), k)[:4] for s in range(repeats)]
    )
    none_of_them = torch.tensor([(n - i) / (n + m - i) for i in range(1, k + 1)]).prod()
    for values, expected in ((results[:, 2], 1.0), (results[:, 3], 1 - float(none_of_them))):
        error = float(values.std()) / repeats**0.5
        assert error < 0.05
        assert abs(float(values.mean()) - expected) < 4 * error


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.3])
def test_kid_of_float32_features_is_float64s(shift: float, products: str) -> None:
    mixing, count = normal(50, 256, seed=9) / 8, 1000
    real, fake = ((normal(count, 50, seed=seed) @ mixing).relu().float() for seed in (0, 1))
    fake = fake + shift
    exact = kid_features_to_metric(fake.double(), real.double(), kid_subsets=1, kid_subset_size=count, verbose=False)
    rounding = 1e-10 if products == "float64" else 1e-6
    small = 1e-9 if products == "split" else 0.0  # of a kernel near 1: all there is where the sets are alike
    assert kid(real, fake) == pytest.approx(exact[KEY_METRIC_KID_MEAN], rel=rounding, abs=small)


def test_kid_equals_torch_fidelity_with_one_subset_of_everything() -> None:
    real, fake = normal(200, 32, seed=0), 1.2 * normal(200, 32, seed=1) + 0.1
    theirs = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=200, verbose=False)[KEY_METRIC_KID_MEAN]
    assert kid(real, fake) == pytest.approx(theirs, rel=1e-6)
    assert manifold_metrics(real, fake).kid == pytest.approx(theirs, rel=1e-6)


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
    with pytest.raises(ValueError, match="generated features hold NaN or infinite values in 10 of 10 rows"):
        manifold_metrics(x, x * torch.inf)
    with pytest.raises(ValueError, match="more than k = 10"):
        manifold_metrics(x, x, k=10)
    with pytest.raises(ValueError, match="more than k = 5 samples of each, got 10 and 5 without one of 2 groups"):
        manifold_metrics(x, x, k=5, groups=2)
    with pytest.raises(ValueError, match=r"groups: expected 2 to 10, .* got 11"):
        manifold_metrics(x, x, groups=11)
    with pytest.raises(ValueError, match="too large to be squared"):
        manifold_metrics(x, x * 1e200)
    with pytest.raises(ValueError, match="need more than k = 10"):
        FeatureSet(x).nearest(10)


def test_many_wide_features_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where splitting pays by itself on a device that has bfloat16: correlated features with a decaying spectrum."""
    monkeypatch.setattr(products_module, "fast_bfloat16", lambda device: True)
    mixing = normal(200, 600, seed=9) * torch.arange(1, 201)[:, None] ** -0.7
    real, fake = ((normal(1200, 200, seed=seed) @ mixing + 0.02 * seed).relu().float() for seed in (0, 1))
    result, exact = manifold_metrics(real, fake), manifold_metrics(real.double(), fake.double())
    assert Points(real).split.error > 1e-3  # it is bfloat16
    assert result[:4] == exact[:4]
    assert result.kid == pytest.approx(exact.kid, rel=1e-5, abs=2e-8)
    known = manifold_metrics(FeatureSet(real, moments=Moments.of(real)), fake, moments=Moments.of(fake))
    assert known[:4] == exact[:4]
    assert known.kid == pytest.approx(exact.kid, rel=1e-5, abs=2e-8)
    with pytest.raises(ValueError, match="moments of 1200 samples are not those of 1100"):
        manifold_metrics(real, fake[:1100], moments=Moments.of(fake))


def test_sets_that_are_compared_share_shift_and_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "FEW", 0)
    a = FeatureSet(SETS["normal"](0))
    with pytest.raises(ValueError, match="one `beside` the other"):
        next(pairs.blocks(a, FeatureSet(SETS["normal"](1))))
    monkeypatch.setattr(products_module, "split_pays", lambda a, b: True)
    with pytest.raises(ValueError, match="one `beside` the other"):
        next(pairs.blocks(a, FeatureSet(SETS["normal"](1), a.shift)))
