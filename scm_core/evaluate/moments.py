# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of features that arrive in batches or shards."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

CHUNK = 1024  # rows that are converted to float64 at a time


def check_features(features: Tensor, dim: int | None = None, what: str = "features") -> None:
    """Raise `ValueError` unless `features` are finite, floating point and of shape (N, D), D = `dim` if given."""
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"{what} must be floating point of shape (N, D), got {features.dtype} of shape {tuple(features.shape)}"
        )
    if dim is not None and features.shape[1] != dim:
        raise ValueError(f"{what} must have {dim} dimensions, got {features.shape[1]}")
    if features.numel() == 0:
        return
    low, high = torch.aminmax(features.detach())  # NaN if there is one; no copy of the features, as isfinite makes
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~torch.isfinite(features)).any(dim=1).sum())
        raise ValueError(f"{what} hold NaN or infinite values in {bad} of {len(features)} rows")


def gram(x: Tensor) -> Tensor:
    """Return xᵀx (D, D) of x (N, D), in its type and on its device."""
    if x.device.type != "cpu":
        return x.T @ x
    rows = x.numpy()
    return torch.from_numpy(rows.T @ rows)  # NumPy sees that the result is symmetric, and computes half of it


def checked_features(features: Tensor, dim: int | None = None, what: str = "features") -> Tensor:
    """Return `features` (N, D) as float64; errors as `check_features`."""
    check_features(features, dim, what)
    return features.detach().double()


class Moments:
    """Running mean and unbiased covariance in float64, of features (N, dim).

    Keeps count, mean and the scatter matrix around the mean, combined pairwise (Chan, Golub & LeVeque 1983), so that
    batches or shards merge without cancellation, in any order, to rounding. The same chunks combined in the same order
    (`of`, `of_chunks`, `merged`) give the same bits, whichever process made which.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"Moments: dim must be ≥ 1, got {dim}")
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of features (N, D), which are taken in chunks of `CHUNK` rows."""
        if features.ndim != 2:
            raise ValueError(f"features must be floating point of shape (N, D), got shape {tuple(features.shape)}")
        return cls.of_chunks(features.split(CHUNK))

    @classmethod
    def of_chunks(cls, chunks: Iterable[Tensor]) -> Moments:
        """Return the moments of all features of `chunks`, each (N_i, D), combined in their order.

        Bitwise equal to `merged` of each chunk's `of`, if no chunk has more than `CHUNK` rows. `ValueError` for no chunks.
        """
        moments: Moments | None = None
        for chunk in chunks:
            if moments is None:
                moments = cls(chunk.shape[-1])
            moments.update(chunk)
        if moments is None:
            raise ValueError("Moments: no chunks to take moments of")
        return moments

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """Return the moments of all `parts` together, combined in their order; `ValueError` for none."""
        parts = list(parts)
        if not parts:
            raise ValueError("Moments: no parts to merge")
        return reduce(cls.merge, parts, cls(parts[0].dim))

    @classmethod
    def given(cls, mean: Tensor, cov: Tensor, count: int) -> Moments:
        """Return moments with known `mean` (D,), unbiased `cov` (D, D) and `count` ≥ 2 samples behind them."""
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"Moments: mean (D,) and cov (D, D) disagree: {tuple(mean.shape)}, {tuple(cov.shape)}")
        if count < 2:
            raise ValueError(f"Moments: count must be ≥ 2, got {count}")
        moments = cls(len(mean))
        moments.count, moments._mean = count, mean.double().clone()
        moments._scatter = cov.double() * (count - 1)
        return moments

    def update(self, features: Tensor) -> None:
        """Add features (N, dim); N may be 0. `ValueError` for another width or values that are not finite."""
        batch = checked_features(features, self.dim).cpu()
        if len(batch) == 0:
            return
        mean = batch.mean(dim=0)
        self._combine(len(batch), mean, gram(batch - mean))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together; neither operand changes."""
        if other.dim != self.dim:
            raise ValueError(f"Moments: cannot merge {other.dim} dimensions into {self.dim}")
        merged = Moments(self.dim)
        for part in (self, other):
            merged._combine(part.count, part._mean, part._scatter)
        return merged

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._scatter.add_(scatter).addr_(delta, delta, alpha=self.count * count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean (dim,), float64; `ValueError` without samples."""
        if self.count < 1:
            raise ValueError("Moments: no samples yet, there is no mean")
        return self._mean.clone()

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance (dim, dim), float64, scatter/(count − 1); `ValueError` below two samples."""
        if self.count < 2:
            raise ValueError(f"Moments: a covariance needs two samples, got {self.count}")
        return self._scatter / (self.count - 1)
