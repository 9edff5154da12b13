# SPDX-License-Identifier: Apache-2.0
"""Precision and recall of the k-nearest-neighbour manifolds, and the kernel distance (KID): exact, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.evaluate.moments import checked_features

BLOCK_ELEMENTS = 2**23  # entries of one block of a distance or kernel matrix: 64 MiB in float64


class PrecisionRecall(NamedTuple):
    """Fractions in [0, 1]: generated samples inside the real manifold, real samples inside the generated one."""

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, Eq. 1–2) of features real (M, D) and fake (N, D).

    A set's manifold is the union of balls around its points, each reaching to the k-th nearest other point of the set,
    boundary included. Raises `ValueError` for k < 1, sets of ≤ k points, unequal D or features that are not finite.
    """
    real, fake = _pair(real, fake)
    if k < 1:
        raise ValueError(f"k must be ≥ 1, got {k}")
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than k = {k} samples, got {len(real)} and {len(fake)}")
    precision = _fraction_inside(fake, real, _squared_radii(real, k))
    recall = _fraction_inside(real, fake, _squared_radii(fake, k))
    return PrecisionRecall(precision, recall)


def kid(real: Tensor, fake: Tensor) -> float:
    """Return the kernel inception distance (Bińkowski et al. 2018): the unbiased MMD² with the kernel (x·y/D + 1)³.

    The full U-statistic over features real (M, D) and fake (N, D), without subsets; it can be slightly negative.
    Raises `ValueError` for sets of less than two samples, unequal D or features that are not finite.
    """
    real, fake = _pair(real, fake)
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"KID needs at least 2 samples of each, got {len(real)} and {len(fake)}")
    cross = _kernel_sum(real, fake) / (len(real) * len(fake))
    return _mean_off_diagonal(real) + _mean_off_diagonal(fake) - 2 * cross


def _pair(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    real = checked_features(real, what="real features")
    return real, checked_features(fake, real.shape[1], "generated features")


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Chunks of `rows`, each with its first index, whose matrix against all columns has at most BLOCK_ELEMENTS entries."""
    size = max(1, BLOCK_ELEMENTS // len(columns))
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return torch.addmm(squares, rows, columns.T, alpha=-2)


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each point to its k-th nearest other point."""
    radii = []
    for start, rows in _blocks(points, points):
        distances = _squared_distances(rows, points)
        index = torch.arange(len(rows), device=points.device)
        distances[index, index + start] = torch.inf
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def _fraction_inside(queries: Tensor, centres: Tensor, squared_radii: Tensor) -> float:
    # |a|² + |b|² − 2a·b is off by at most this much, so equal distances (duplicates, lattices) count as inside, as ≤
    # says.
    norms = max(float(queries.square().sum(dim=1).max()), float(centres.square().sum(dim=1).max()))
    slack = 8 * queries.shape[1] * torch.finfo(queries.dtype).eps * norms
    inside = 0
    for _, rows in _blocks(queries, centres):
        inside += int((_squared_distances(rows, centres) <= squared_radii + slack).any(dim=1).sum())
    return inside / len(queries)


def _kernel(rows: Tensor, columns: Tensor) -> Tensor:
    base = (rows @ columns.T).div_(rows.shape[1]).add_(1)
    return base * base * base


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    return sum(float(_kernel(rows, b).sum()) for _, rows in _blocks(a, b))


def _mean_off_diagonal(points: Tensor) -> float:
    diagonal = (points.square().sum(dim=1) / points.shape[1] + 1) ** 3
    return (_kernel_sum(points, points) - float(diagonal.sum())) / (len(points) * (len(points) - 1))
