# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, density, coverage and KID: exact, in one pass over blocks of pairs, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.evaluate.moments import Moments
from scm_core.evaluate.neighbours import Balls, Nearest
from scm_core.evaluate.pairs import Block, blocks
from scm_core.evaluate.points import Points
from scm_core.evaluate.resampling import consecutive_groups, jackknife_errors

KERNEL_ROWS = {"cpu": 128, "cuda": 2048}  # rows of a block that are worked on at a time: they stay in the cache


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]: generated samples inside the real manifold, real samples inside the generated one."""

    precision: float
    recall: float


class ManifoldMetrics(NamedTuple):
    """`PrecisionRecall`, density (≥ 0, 1 for equal distributions), coverage (in [0, 1]) and the squared kernel distance;
    standard errors of precision and recall, if asked for.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    kid: float
    precision_se: float | None = None
    recall_se: float | None = None


class FeatureSet(Points):
    """Features (N, D) with what the metrics need of this set alone, each computed once: keep a reference as one.

    Arguments and errors are those of `Points`.
    """

    _nearest: Tensor | None = None
    _kernel_mean: float | None = None

    @classmethod
    def given(
        cls,
        features: Tensor,
        shift: Tensor,
        nearest: Tensor,
        kernel_mean: float,
        moments: Moments | None = None,
    ) -> FeatureSet:
        """Return the set of features (N, D) whose `nearest` (N, K) and, for this shift, `kernel_mean` are known."""
        points = cls(features, shift, moments=moments)
        points._nearest, points._kernel_mean = nearest.to(features.device), kernel_mean
        return points

    def to(self, device: torch.device | str) -> FeatureSet:
        """Return the set with its features on `device`, and what is known of it."""
        moved = FeatureSet(self.features.to(device), self.shift, moments=self.moments)
        moved._nearest = None if self._nearest is None else self._nearest.to(device)
        moved._kernel_mean = self._kernel_mean
        return moved

    def prepare(self, neighbours: int, kernel: bool = True, side: int | None = None) -> None:
        """Compute `nearest(neighbours)` and, with `kernel`, `kernel_mean` in one pass over all pairs, unless known."""
        known = 0 if self._nearest is None else self._nearest.shape[1]
        nearest = Nearest(self, neighbours) if neighbours > known else None
        self._add_pairs(nearest, kernel, side)
        if nearest is not None:
            self._nearest, _ = nearest.result()

    def radii(self, k: int, groups: Sequence[slice], side: int | None = None) -> Tensor:
        """Return the squared distances (N, 1 + G) to the k-th nearest other, of all and without each group, in float64.

        −∞ for what is in the group itself. Computes `kernel_mean` in the same pass, unless known.
        """
        nearest = Nearest(self, k)
        self._add_pairs(nearest, True, side)
        found, without = nearest.result(groups)
        return torch.cat([found[:, -1:], without], dim=1)

    def _add_pairs(self, nearest: Nearest | None, kernel: bool, side: int | None) -> None:
        mean = KernelMean(self, self) if kernel and self._kernel_mean is None else None
        if nearest is None and mean is None:
            return
        for block in blocks(self, self, side):
            if mean is not None:
                mean.add(block)
            if nearest is not None:
                nearest.add(block)
        if mean is not None:
            self._kernel_mean = mean.value()

    def nearest(self, count: int) -> Tensor:
        """Return the squared distances (N, count) to the nearest others, ascending, in float64; `ValueError` for
        N ≤ count.
        """
        self.prepare(count, kernel=False)
        assert self._nearest is not None
        return self._nearest[:, :count]

    @property
    def kernel_mean(self) -> float:
        """Mean of KID's kernel over pairs of different features, as `KernelMean` counts it."""
        self.prepare(0)
        assert self._kernel_mean is not None
        return self._kernel_mean


class KernelMean:
    """The mean of KID's kernel k(x, y) = (x·y/D + 1)³ over pairs, less a constant that cancels in KID.

    x·y/D + 1 is c + δ with c = 1 + |shift|²/D and δ = α + β + q: q = x̃·ỹ/D of shifted features, α and β their products
    with the shift over D. In k − c³ = 3c²δ + 3cδ² + δ³ all but q²(3(c + α + β) + q) is a product of sums over one set each,
    and so is 3cq², as Σq² = ⟨Σx̃x̃ᵀ, Σỹỹᵀ⟩/D². That is taken out, too, where there are more features than dimensions:
    what is left for pairs is small, and what rounding does to it smaller. For fewer, pairs are in float64.
    Of a set with itself, pairs of different features count.
    """

    def __init__(self, a: Points, b: Points) -> None:
        self.dim, self.pairwise = a.dim, 0.0
        self.apart = min(a.count, b.count) > a.dim
        self.pairs = a.count * (b.count - (a is b))
        self.constant = constant = 1 + float(a.shift @ a.shift) / a.dim
        # Sums of αⁿ and βⁿ, of αⁿx̃ and βⁿỹ, and from them of what does not need both at once.
        m, n = ([float(points.alpha.pow(power).sum()) for power in range(4)] for points in (a, b))
        v, w = a.sums, b.sums
        total = m[1] * n[0] + m[0] * n[1] + float(v[0] @ w[0]) / a.dim  # of δ
        square = m[2] * n[0] + 2 * m[1] * n[1] + m[0] * n[2]  # of (α + β)²
        cube = m[3] * n[0] + 3 * m[2] * n[1] + 3 * m[1] * n[2] + m[0] * n[3]
        once = float(v[1] @ w[0] + v[0] @ w[1]) / a.dim  # of (α + β)q
        twice = float(v[2] @ w[0] + 2 * (v[1] @ w[1]) + v[0] @ w[2]) / a.dim  # of (α + β)²q
        second = float((a.second * b.second).sum()) / a.dim**2 if self.apart else 0.0  # of q²
        self.sums = 3 * constant**2 * total + 3 * constant * (square + 2 * once + second) + cube + 3 * twice
        if a is b:  # less the pairs of a feature with itself, of which `add` leaves out the rest
            both, q = 2 * a.alpha, a.norms / a.dim
            own = (
                3 * constant**2 * (both + q)
                + 3 * constant * both * (both + 2 * q)
                + both.pow(3)
                + 3 * both.square() * q
            )
            self.sums -= float(own.sum()) + (3 * constant * float(q.square().sum()) if self.apart else 0.0)

    def add(self, block: Block) -> None:
        """Take the pairs of a block."""
        dtype = block.gram.dtype if self.apart else torch.float64
        factor = 1 / (self.dim * block.scale**2)  # q over the product: taken out, as q³ may be out of float32's range
        row = ((3 * block.a.alpha[block.rows] + (0.0 if self.apart else 3 * self.constant)) / factor).to(dtype)
        column = (3 * block.b.alpha[block.columns] / factor).to(dtype)
        found = torch.zeros((), dtype=torch.float64, device=row.device)
        height = KERNEL_ROWS[block.a.kind]
        for start in range(0, len(row), height):
            part = slice(start, start + height)
            gram = block.gram[part].to(dtype, copy=block.diagonal)
            if block.diagonal:
                gram.diagonal(start).zero_()
            weight = (gram + column).add_(row[part, None]).mul_(gram)
            found += torch.linalg.vecdot(weight, gram).double().sum()
        self.pairwise += float(found) * factor**3 * (2 if block.within and not block.diagonal else 1)

    def value(self) -> float:
        """The mean over all pairs."""
        return (self.sums + self.pairwise) / self.pairs


def manifold_metrics(
    real: Tensor | FeatureSet,
    fake: Tensor,
    k: int = 3,
    device: torch.device | str | None = None,
    side: int | None = None,
    moments: Moments | None = None,
    groups: int = 0,
) -> ManifoldMetrics:
    """Return precision, recall, density, coverage and KID of features real (M, D) and fake (N, D).

    Precision and recall: Kynkäänniemi et al. 2019, Eq. 1–2. Density and coverage: Naeem et al. 2020, Eq. 4–5. KID: see
    `kid`. Balls reach to the k-th nearest other point of the own set, boundary included. With `groups`, precision and
    recall have standard errors, from what they are without each of so many groups of consecutive generated samples
    (`jackknife_errors`), of the same pass and as exact. Decisions are those of float64, KID is as exact as `KernelMean`.
    A `FeatureSet` as `real` keeps what depends on it alone; `moments` of fake, if known, save work. Runs on `device`, by
    default that of the real features; beside the features, memory holds a few blocks of `side`² pairs and O(N + M)
    numbers for each group. Raises `ValueError` for k < 1, sets of ≤ k points (or that groups leave so few of), one group
    or more than samples, unequal D or features that are not finite.
    """
    real, other = _pair(real, fake, device, moments)
    parts = consecutive_groups(other.count, groups) if groups else []
    least = other.count - max((part.stop - part.start for part in parts), default=0)
    _require_neighbours(real.count, least, k, f" without one of {groups} groups" if groups else "")
    real.prepare(k, side=side)
    balls = Balls(other, real, other.radii(k, parts, side), real.nearest(k)[:, -1])
    cross = KernelMean(other, real)
    for block in blocks(other, real, side):
        cross.add(block)
        balls.add(block)
    errors = _errors(balls, parts)
    return ManifoldMetrics(
        precision=int((balls.holders > 0).sum()) / other.count,
        recall=int(balls.recalled[:, 0].sum()) / real.count,
        density=int(balls.holders.sum()) / (k * other.count),
        coverage=int(balls.covered.sum()) / real.count,
        kid=real.kernel_mean + other.kernel_mean - 2 * cross.value(),
        precision_se=errors.precision if errors else None,
        recall_se=errors.recall if errors else None,
    )


def precision_recall(real: Tensor | FeatureSet, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Return improved precision and recall alone, where the real features are; see `manifold_metrics`."""
    known, other = _pair(real, fake)
    _require_neighbours(known.count, other.count, k)
    balls = Balls(other, known, other.nearest(k)[:, -1:], known.nearest(k)[:, -1])
    for block in blocks(other, known):
        balls.add(block)
    return PrecisionRecall(int((balls.holders > 0).sum()) / other.count, int(balls.recalled.sum()) / known.count)


def kid(real: Tensor, fake: Tensor) -> float:
    """Return the kernel inception distance (Bińkowski et al. 2018): the unbiased MMD² with the kernel (x·y/D + 1)³.

    The full U-statistic over features real (M, D) and fake (N, D), without subsets; it can be slightly negative.
    Raises `ValueError` for sets of less than two samples, unequal D or features that are not finite.
    """
    known, other = _pair(real, fake)
    cross = KernelMean(other, known)
    for block in blocks(other, known):
        cross.add(block)
    return known.kernel_mean + other.kernel_mean - 2 * cross.value()


def _pair(
    real: Tensor | FeatureSet,
    fake: Tensor,
    device: torch.device | str | None = None,
    moments: Moments | None = None,
) -> tuple[FeatureSet, FeatureSet]:
    if not isinstance(real, FeatureSet):
        real = FeatureSet(real if device is None else real.to(device), what="real features")
    elif device is not None and torch.device(device) != real.features.device:
        real = real.to(device)
    return real, FeatureSet(fake.to(real.features.device), what="generated features", beside=real, moments=moments)


def _errors(balls: Balls, groups: Sequence[slice]) -> PrecisionRecall | None:
    """Standard errors of precision and recall; None without groups. The balls of real features stay as they are."""
    if not groups:
        return None
    inside = balls.holders > 0
    rest = [torch.cat([inside[: group.start], inside[group.stop :]]) for group in groups]
    recalled = balls.recalled.sum(dim=0).tolist()[1:]
    without = [
        (int(held.sum()) / len(held), count / balls.real.count) for held, count in zip(rest, recalled, strict=True)
    ]
    return PrecisionRecall(*jackknife_errors(torch.tensor(without, dtype=torch.float64)))


def _require_neighbours(real: int, fake: int, k: int, left: str = "") -> None:
    if k < 1:
        raise ValueError(f"k must be ≥ 1, got {k}")
    if min(real, fake) <= k:
        raise ValueError(f"k-th neighbours need more than k = {k} samples of each, got {real} and {fake}{left}")
