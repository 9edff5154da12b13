# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance of Gaussians (FID: Heusel et al. 2017) and its standard error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.evaluate.moments import Moments, checked_features


class FidResult(NamedTuple):
    """A Fréchet distance and the standard error that the finite number of generated samples gives it."""

    value: float
    se: float


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Return d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₂^½ Σ₁ Σ₂^½)^½) for means (D,) and covariances (D, D), in float64.

    The trace term is the sum of the roots of the symmetrised product's eigenvalues, which have the eigenvalues of Σ₁Σ₂
    without its loss of symmetry. Singular covariances are fine. Raises `ValueError` for disagreeing shapes, values
    that are not finite, or a matrix that is not symmetric positive semi-definite.
    """
    mu1, cov1 = _gaussian(mu1, cov1, "first")
    mu2, cov2 = _gaussian(mu2, cov2, "second")
    if mu1.shape != mu2.shape:
        raise ValueError(f"the two Gaussians have {len(mu1)} and {len(mu2)} dimensions")
    root2 = _root(cov2, "second")
    product = root2 @ cov1 @ root2
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    _require_psd(eigenvalues, cov1, cov2, "first")
    trace = eigenvalues.clamp(min=0).sqrt().sum()  # below zero is rounding of a zero
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace)


def transport_map(cov1: Tensor, cov2: Tensor) -> Tensor:
    """Return T (D, D) of the optimal transport x ↦ μ₂ + T(x − μ₁) from N(μ₁, Σ₁) to N(μ₂, Σ₂), float64.

    T = Σ₂^½ (Σ₂^½ Σ₁ Σ₂^½)^{−½} Σ₂^½ with the pseudo-inverse: I − T is then the derivative of d² by Σ₁ also where a
    covariance is singular, since samples of the first Gaussian never leave Σ₁'s range.
    """
    root2 = _root(cov2.double(), "second")
    product = root2 @ cov1.double() @ root2
    eigenvalues, vectors = torch.linalg.eigh((product + product.T) / 2)
    # Numerical rank as in torch.linalg.matrix_rank: what is below is a zero of the exact product, left out of its
    # inverse.
    floor = eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(torch.float64).eps
    inverse_root = torch.where(eigenvalues > floor, eigenvalues.clamp(min=floor).rsqrt(), 0.0)
    half = root2 @ (vectors * inverse_root.sqrt())
    return half @ half.T


def frechet_with_error(features_fake: Tensor, ref_moments: Moments) -> FidResult:
    """Return the Fréchet distance of features (N, D) to a reference and its standard error sd(IF)/√N (delta method).

    The influence of sample i is IF_i = 2(μ − μ_ref)·x̃_i + x̃_iᵀ(I − T)x̃_i up to a constant, with x̃_i = x_i − μ and
    T the transport map from the samples' Gaussian to the reference's. The samples count as independent and the
    reference as exact; the estimate's bias is not in the error. For class-balanced samples the error is an upper
    estimate: sd(IF) holds the spread between classes too, which a fixed number of each leaves no room to vary. Raises
    `ValueError` for N < 2, another D or features that are not finite.
    """
    features = checked_features(features_fake, ref_moments.dim, "generated features").cpu()
    if len(features) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples, got {len(features)}")
    moments = Moments.of(features)
    mean, cov = moments.mean, moments.cov
    value = frechet_distance(mean, cov, ref_moments.mean, ref_moments.cov)
    centred = features - mean
    transport = transport_map(cov, ref_moments.cov)
    quadratic = (centred * (centred - centred @ transport)).sum(dim=1)
    influence = 2 * centred @ (mean - ref_moments.mean) + quadratic
    return FidResult(value, float(influence.std() / len(features) ** 0.5))


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


def _root(cov: Tensor, which: str) -> Tensor:
    """The symmetric positive semi-definite square root."""
    eigenvalues, vectors = torch.linalg.eigh(cov)
    _require_psd(eigenvalues, cov, cov, which)
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def _require_psd(eigenvalues: Tensor, cov1: Tensor, cov2: Tensor, which: str) -> None:
    scale = float(cov1.norm() if cov1 is cov2 else cov1.norm() * cov2.norm())
    if float(eigenvalues.min()) < -1e-7 * scale:  # float32 covariances are allowed their rounding
        raise ValueError(f"{which} Gaussian: its covariance has the negative eigenvalue {float(eigenvalues.min()):.3g}")
