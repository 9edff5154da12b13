# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance of Gaussians (FID: Heusel et al. 2017), its standard error and its bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.evaluate.moments import CHUNK, Moments, check_features, gram

PAIRS = 2048  # of samples, that the fluctuation of second order is taken from: known to a few percent


class FidResult(NamedTuple):
    """A Fréchet distance with the standard error and the bias that the finite number of generated samples gives it.

    `bias` is None where it is not known, see `frechet_with_error`.
    """

    value: float
    se: float
    bias: float | None

    @property
    def corrected(self) -> float | None:
        """value − bias; for samples of the reference's own distribution it is as often below zero as above."""
        return None if self.bias is None else self.value - self.bias


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Return d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₂^½ Σ₁ Σ₂^½)^½) for means (D,) and covariances (D, D), in float64.

    Singular covariances are fine. Raises `ValueError` for disagreeing shapes, values that are not finite, or a matrix
    that is not symmetric positive semi-definite.
    """
    mu1, cov1 = _gaussian(mu1, cov1, "first")
    mu2, cov2 = _gaussian(mu2, cov2, "second")
    if mu1.shape != mu2.shape:
        raise ValueError(f"the two Gaussians have {len(mu1)} and {len(mu2)} dimensions")
    return _distance(mu1, cov1, mu2, cov2, trace_term(cov1, triangular_root(cov2)))


def triangular_root(cov: Tensor) -> Tensor:
    """Return the upper triangular R (D, D) with RᵀR = Σ, float64; `ValueError` unless Σ is positive semi-definite.

    What a reference needs once: `trace_term` and `frechet_with_error` take it. Σ may be singular.
    """
    cov = cov.double()
    eigenvalues, vectors = torch.linalg.eigh(cov)
    _require_psd(eigenvalues, float(cov.norm()), "second")
    root = torch.linalg.qr((vectors * eigenvalues.clamp(min=0).sqrt()).T, mode="r").R
    return root.contiguous()  # as from a file: products of another layout differ in their last bits


def trace_term(cov1: Tensor, root2: Tensor) -> float:
    """Return tr (Σ₂^½ Σ₁ Σ₂^½)^½ of a covariance and the other one's `triangular_root` R.

    The sum of the roots of the eigenvalues of RΣ₁Rᵀ, which are those of Σ₁Σ₂ without its loss of symmetry.
    """
    eigenvalues = torch.linalg.eigvalsh(_lower_product(cov1, root2))
    _require_psd(eigenvalues, float(cov1.norm() * root2.norm() ** 2), "first")
    return float(eigenvalues.clamp(min=0).sqrt().sum())  # below zero is rounding of a zero


def transport_map(cov1: Tensor, cov2: Tensor) -> Tensor:
    """Return T (D, D) of the optimal transport x ↦ μ₂ + T(x − μ₁) from N(μ₁, Σ₁) to N(μ₂, Σ₂), float64.

    T = Rᵀ (RΣ₁Rᵀ)^{−½} R, Σ₂ = RᵀR, with the pseudo-inverse: I − T is then the derivative of d² by Σ₁ also where a
    covariance is singular, since samples of the first Gaussian never leave Σ₁'s range.
    """
    root2 = triangular_root(cov2)
    eigenvalues, vectors = torch.linalg.eigh(_lower_product(cov1.double(), root2))
    roots, positive = _positive_roots(eigenvalues)
    half = root2.T @ (vectors[:, positive] * roots.rsqrt())
    return half @ half.T


def frechet_with_error(
    features_fake: Tensor, ref_moments: Moments, ref_root: Tensor | None = None, moments: Moments | None = None
) -> FidResult:
    """Return the Fréchet distance of features (N, D) to a reference, with its standard error and bias.

    Both follow from the derivatives of d² towards single samples (infinitesimal jackknife). With x̃_i = x_i − μ and T
    the transport map from the samples' Gaussian to the reference's, the first is IF_i = 2(μ − μ_ref)·x̃_i + x̃_iᵀ(I − T)x̃_i
    up to a constant, and se² = sd(IF)²/N but for a term of second order (below). The mean of the second over 2N is the
    bias. For the mean it is tr Σ₁/N. For the covariance, with Σ₂ = RᵀR, RΣ₁Rᵀ = V diag(a) Vᵀ, u = diag(a)^{−½} VᵀRx̃ (of
    unit covariance) and h = uuᵀ − I, it is

        (1/2N) Σ_ij E[h_ij²] √a_i √a_j / (√a_i + √a_j),

    over positive a (a sample has no part in the others). The first derivative brings no bias: Σ₁ is the unbiased
    covariance. Equal Gaussians of covariance I have D/N + D(D + 1)/4N. Terms of order (D/N)² are left out: for those
    the estimate is 2 % too low at N/D = 20, 8 % at 5.

    The second derivative φ also makes d² fluctuate, with the variance v = E[φ²]/2N². For two samples

        φ(x, x') = 2x̃·x̃' + Σ_ij w_ij h_ij h'_ij,   w_ij = √a_i √a_j / (√a_i + √a_j),

    whose square is averaged over some pairs. sd(IF)²/N holds v twice, as IF itself fluctuates: se² = sd(IF)²/N − v, at least
    v/2. v matters for samples close to the reference, where it is all there is; there se of skewed features is up to 20 %
    too high, as their fourth moments take more samples to be known.

    The samples count as independent and the reference as exact. For class-balanced samples se is an upper estimate: sd(IF)
    holds the spread between classes, which a fixed number of each leaves no room to vary; the bias does likewise.
    For N ≤ D the samples' covariance is singular, the expansion does not hold, the bias is None and v left out; value and error
    then come from the N×N matrix X̃Σ₂X̃ᵀ/(N − 1), which has the same positive eigenvalues. Otherwise the reference's root is
    taken from `ref_root` (`triangular_root`), if given; what goes over samples (u, h) is in float32, if they are, the
    distance itself in float64. `moments` of the features, if known, save work. Raises `ValueError` for N < 2, another D or
    features that are not finite.
    """
    check_features(features_fake, ref_moments.dim, "generated features")
    features, count = features_fake.detach().cpu(), len(features_fake)
    if count < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples, got {count}")
    mean2, cov2 = ref_moments.mean, ref_moments.cov
    known = Moments.of(features) if moments is None else moments
    mean1, cov1 = known.mean, known.cov
    if count <= ref_moments.dim:
        coupling = _coupling_of_few(features, mean1, cov2)
    else:
        coupling = _coupling_of_many(features, mean1, cov1, triangular_root(cov2) if ref_root is None else ref_root)
    own = [x.square().sum(dim=1) + 2 * x @ (mean1 - mean2) for x in _centred(features, mean1)]
    variance, bias = float((torch.cat(own) - coupling.transported).var()) / count, None
    if coupling.second is not None:
        bias = (float(cov1.trace()) + coupling.second.mean / 2) / count
        v = coupling.second.square / (2 * count**2)
        variance = max(variance - v, v / 2)
    return FidResult(_distance(mean1, cov1, mean2, cov2, coupling.trace), variance**0.5, bias)


class _Second(NamedTuple):
    """Of the second derivative: Σ_ij w_ij E[h_ij²], and its mean square for two samples."""

    mean: float
    square: float


class _Coupling(NamedTuple):
    """What the term 2 tr (Σ₂^½ Σ₁ Σ₂^½)^½ needs: half of it, x̃ᵀTx̃ (N,), and the second derivative."""

    trace: float
    transported: Tensor
    second: _Second | None


def _coupling_of_many(features: Tensor, mean: Tensor, cov1: Tensor, root2: Tensor) -> _Coupling:
    eigenvalues, vectors = torch.linalg.eigh(_lower_product(cov1, root2))
    _require_psd(eigenvalues, float(cov1.norm() * root2.norm() ** 2), "first")
    roots, positive = _positive_roots(eigenvalues)
    to_u = (root2.T @ (vectors[:, positive] / roots)).to(torch.promote_types(features.dtype, torch.float32))
    del vectors  # as large as a covariance
    transported, fourth = [], torch.zeros(len(roots), len(roots), dtype=torch.float64)
    some: list[tuple[Tensor, Tensor]] = []  # of as many samples as make PAIRS pairs
    for x in _centred(features, mean):
        u = x.to(to_u.dtype) @ to_u
        if len(some) * CHUNK < PAIRS:
            some.append((x.to(u.dtype), u))
        squares = u.square()
        transported.append(squares.double() @ roots)
        fourth += gram(squares)
    weights = torch.outer(roots, roots).div_(roots[:, None] + roots)
    fourth.div_(len(features)).diagonal().sub_(
        (1 - 1 / len(features)) ** 2
    )  # less ũ²'s mean: covariances divide by N − 1
    x, u = (torch.cat(parts) for parts in zip(*some, strict=True))
    second = _Second(float((fourth * weights).sum()), _mean_square(x, u, weights.to(u.dtype)))
    return _Coupling(float(eigenvalues.clamp(min=0).sqrt().sum()), torch.cat(transported), second)


def _mean_square(x: Tensor, u: Tensor, weights: Tensor) -> float:
    """E[φ²] over pairs of different samples: each with those that come 1, 2, … after it, until there are PAIRS."""
    diagonal, squares = weights.diagonal(), []
    for shift in range(1, 1 + min(len(u) - 1, -(-PAIRS // len(u)))):
        both = u * u.roll(shift, 0)
        own = u.square() @ diagonal
        phi = torch.linalg.vecdot(both @ weights, both) - own - own.roll(shift) + diagonal.sum()
        squares.append((phi + 2 * torch.linalg.vecdot(x, x.roll(shift, 0))).double().square().mean())
    return float(torch.stack(squares).mean())


def _coupling_of_few(features: Tensor, mean: Tensor, cov2: Tensor) -> _Coupling:
    x = torch.cat(list(_centred(features, mean)))
    product = x @ cov2 @ x.T / (len(x) - 1)
    eigenvalues, vectors = torch.linalg.eigh((product + product.T) / 2)
    _require_psd(eigenvalues, float(cov2.norm() * x.norm() ** 2) / (len(x) - 1), "second")
    roots, positive = _positive_roots(eigenvalues)  # at least one is a zero, as the rows of x add up to it
    vectors = vectors[:, positive]
    return _Coupling(float(roots.sum()), (len(x) - 1) * (vectors.square() @ roots), None)


def _centred(features: Tensor, mean: Tensor) -> Iterator[Tensor]:
    return (chunk.double() - mean for chunk in features.split(CHUNK))


def _distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, trace: float) -> float:
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()) - 2 * trace


def _lower_product(cov1: Tensor, root2: Tensor) -> Tensor:
    """RΣ₁Rᵀ on and below its diagonal, which is all that eigh and eigvalsh read, without R's zeros: half of the work."""
    half, product = torch.empty_like(root2), torch.zeros_like(root2)
    starts = range(0, len(root2), 256)
    for i in starts:
        half[i : i + 256] = root2[i : i + 256, i:] @ cov1[i:]
    for i in starts:
        product[i:, i : i + 256] = half[i:, i:] @ root2[i : i + 256, i:].T
    return product


def _positive_roots(eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of the positive eigenvalues, and which these are.

    Numerical rank as in torch.linalg.matrix_rank: what is below is a zero of the exact product, left out of its inverse.
    """
    positive = eigenvalues > eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(torch.float64).eps
    return eigenvalues[positive].sqrt(), positive


def _gaussian(mean: Tensor, cov: Tensor, which: str) -> tuple[Tensor, Tensor]:
    mean, cov = torch.as_tensor(mean).double(), torch.as_tensor(cov).double()
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{which} Gaussian: mean (D,) and covariance (D, D) disagree: {tuple(mean.shape)}, {tuple(cov.shape)}"
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(cov).all()):
        raise ValueError(f"{which} Gaussian: mean or covariance holds NaN or infinite values")
    if not torch.allclose(cov, cov.T, rtol=1e-6, atol=1e-9 * float(cov.abs().max())):
        raise ValueError(f"{which} Gaussian: its covariance is not symmetric")
    return mean, cov


def _require_psd(eigenvalues: Tensor, scale: float, which: str) -> None:
    if float(eigenvalues.min()) < -1e-7 * scale:  # float32 covariances are allowed their rounding
        raise ValueError(f"{which} Gaussian: its covariance has the negative eigenvalue {float(eigenvalues.min()):.3g}")
