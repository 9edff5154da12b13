# SPDX-License-Identifier: Apache-2.0
"""How a number is measured: features of an image set, the reference that they make, and the metrics together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from scm_core.data.images import ImageSet, to_uint8
from scm_core.data.shards import Sharded
from scm_core.evaluate.frechet import frechet_with_error
from scm_core.evaluate.manifold import manifold_metrics
from scm_core.evaluate.moments import Moments, check_features
from scm_core.evaluate.reference import Reference, Subset

if TYPE_CHECKING:  # extractors imports torch_fidelity, which takes seconds and is needed by few
    from scm_core.evaluate.extractors import Extractor, ExtractorIdentity

__all__ = ["Evaluation", "evaluate", "extract", "make_reference", "reference_of", "to_uint8"]


class Evaluation(NamedTuple):
    """All metrics of `samples` generated images against a reference; FID with its standard error and, where it is known, bias;
    precision and recall with theirs, if asked for.

    See `frechet.frechet_with_error` and `manifold.manifold_metrics`.
    """

    fid: float
    fid_se: float
    fid_bias: float | None
    precision: float
    recall: float
    density: float
    coverage: float
    kid: float
    precision_se: float | None
    recall_se: float | None
    samples: int


def extract(extractor: Callable[[Tensor], Tensor], images: Tensor | Sharded, batch: int = 500) -> Tensor:
    """Return float32 features (N, D) of uint8 images (N, 1 or 3, H, W), `batch` at a time; `ValueError` if they are not
    finite.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"images must be uint8 of shape (N, C, H, W) with N ≥ 1, got {images.dtype} {tuple(images.shape)}"
        )
    if batch < 1:
        raise ValueError(f"batch must be ≥ 1, got {batch}")
    features = torch.cat([extractor(chunk).float().cpu() for chunk in images.split(batch)])
    check_features(features, what="extracted features")
    return features


def make_reference(
    extractor: Extractor, image_set: ImageSet, batch: int = 500, subset: Subset | None = None
) -> Reference:
    """Return the reference of an image set: its features, or those of a `subset`, the moments of all, and the identities of both.

    With a subset, memory holds its features and a batch's.
    """
    parts = (extract(extractor, images, batch) for images in image_set.images.split(batch))
    known = (image_set.name, image_set.digest, extractor.identity)
    return reference_of(parts, len(image_set.images), *known, subset)


def reference_of(
    parts: Iterable[Tensor],
    count: int,
    dataset: str,
    dataset_sha256: str,
    identity: ExtractorIdentity,
    subset: Subset | None = None,
) -> Reference:
    """Return the reference of `count` features (N_i, D) float32 that arrive in `parts`, in the order of the images of `dataset`.

    `identity` is that of the extractor that made them. With a `subset` of fewer images, its features alone are kept.
    """
    if subset is not None and subset.size < count:
        features, moments = _drawn(parts, subset.indices(count))
    else:
        subset, features = None, torch.cat(list(parts))
        moments = Moments.of(features)
    if moments.count != count:
        raise ValueError(f"reference of {dataset}: expected the features of {count} images, got {moments.count}")
    return Reference(
        features=features,
        mean=moments.mean,
        cov=moments.cov,
        dataset=dataset,
        dataset_sha256=dataset_sha256,
        extractor=identity.name,
        layer=identity.layer,
        weights_sha256=identity.weights_sha256,
        preprocessing=identity.preprocessing,
        dtype=identity.dtype,
        subset=subset,
        images=count if subset is not None else None,
    )


def _drawn(parts: Iterable[Tensor], indices: Tensor) -> tuple[Tensor, Moments]:
    """The features with these ascending indices, and the moments of all."""
    kept: list[Tensor] = []

    def passing() -> Iterable[Tensor]:
        start = 0
        for part in parts:
            first, last = torch.searchsorted(indices, torch.tensor([start, start + len(part)])).tolist()
            kept.append(part[indices[first:last] - start])
            start += len(part)
            yield part

    moments = Moments.of_chunks(passing())
    return torch.cat(kept), moments


def evaluate(
    features_fake: Tensor,
    reference: Reference,
    neighbours: int = 3,
    expected: int | None = None,
    device: torch.device | str | None = None,
    groups: int = 0,
) -> Evaluation:
    """Return every metric of generated features (N, D), made with the reference's extractor; k = `neighbours`.

    `groups`, if any, are left out in turn for the errors of precision and recall. `expected` is the N that there must be,
    as all metrics depend on it. Pairs are computed on `device`, by default where the reference is; FID on the CPU, in
    float64. Raises `ValueError` for another N, another D, too few samples for neighbours or groups, or features that are
    not finite.
    """
    check_features(features_fake, reference.features.shape[1], "generated features")
    count = len(features_fake)
    if expected is not None and count != expected:
        raise ValueError(f"{count} generated samples, expected {expected}: metrics of other numbers do not compare")
    moments = Moments.of(features_fake)
    # With few samples the distance needs no root of the reference.
    root = reference.root if count > len(reference.mean) else None
    fid = frechet_with_error(features_fake, reference.moments, root, moments)
    real = reference.feature_set(device)
    manifold = manifold_metrics(real, features_fake, neighbours, moments=moments, groups=groups)
    return Evaluation(fid.value, fid.se, fid.bias, *manifold, samples=count)
