# SPDX-License-Identifier: Apache-2.0
"""How a number is measured: features of an image set, a reference to compare with, and the metrics together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scm_core.data.arrays import file_digest
from scm_core.data.images import to_uint8
from scm_core.data.sources import ImageSet
from scm_core.evaluate.frechet import frechet_with_error
from scm_core.evaluate.manifold import precision_recall
from scm_core.evaluate.moments import Moments, checked_features

if TYPE_CHECKING:  # extractors imports torch_fidelity, which takes seconds and is needed by few
    from scm_core.evaluate.extractors import Extractor, ExtractorIdentity

__all__ = ["Evaluation", "Reference", "evaluate", "extract", "load_reference", "make_reference", "to_uint8"]

FORMAT = "scm-reference-1"
TENSORS, INDEX = "reference.safetensors", "reference.json"


class Evaluation(NamedTuple):
    """Fréchet distance with its standard error, precision and recall of `samples` generated images against a reference."""

    fid: float
    fid_se: float
    precision: float
    recall: float
    samples: int


@dataclass(frozen=True)
class Reference:
    """What generated features are compared with.

    `features` (N, D) float32, their `mean` (D,) and unbiased `cov` (D, D) in float64; `dataset`, `dataset_sha256` name
    the image set; `extractor`, `layer`, `weights_sha256` the network.
    """

    features: Tensor
    mean: Tensor
    cov: Tensor
    dataset: str
    dataset_sha256: str
    extractor: str
    layer: str
    weights_sha256: str

    def __post_init__(self) -> None:
        dim = self.features.shape[-1]
        if (
            self.features.ndim != 2
            or self.features.dtype != torch.float32
            or self.mean.shape != (dim,)
            or self.cov.shape != (dim, dim)
        ):
            raise ValueError(
                f"reference of {self.dataset}: features (N, D) float32, mean (D,), cov (D, D) disagree: "
                f"{tuple(self.features.shape)} {self.features.dtype}, {tuple(self.mean.shape)}, {tuple(self.cov.shape)}"
            )
        if self.mean.dtype != torch.float64 or self.cov.dtype != torch.float64:
            raise ValueError(f"reference of {self.dataset}: mean and cov must be float64")

    @property
    def count(self) -> int:
        """Number of reference images."""
        return len(self.features)

    @property
    def moments(self) -> Moments:
        """Mean and covariance as `Moments`."""
        return Moments.given(self.mean, self.cov, self.count)

    def require(self, identity: ExtractorIdentity | None = None, dataset: str | None = None) -> None:
        """Raise `ValueError` unless this is a reference of `dataset` made with the extractor `identity` (each checked
        if given).
        """
        if dataset is not None and dataset != self.dataset:
            raise ValueError(f"the reference is of dataset {self.dataset}, not {dataset}: make one of {dataset}")
        if identity is None:
            return
        if (identity.name, identity.layer) != (self.extractor, self.layer):
            raise ValueError(
                f"the reference was made with {self.extractor}/{self.layer}, not {identity.name}/{identity.layer}"
            )
        if identity.weights_sha256 != self.weights_sha256:
            raise ValueError(
                f"the reference was made with other weights of {self.extractor} (SHA-256 {self.weights_sha256[:12]}…, "
                f"now {identity.weights_sha256[:12]}…): make it again"
            )

    def save(self, folder: str | Path) -> None:
        """Write reference.safetensors (features, mean, cov) and, last, reference.json (identities, N, digest) to
        `folder`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in ("features", "mean", "cov")}
        save_file(tensors, str(folder / TENSORS))
        index = {name: getattr(self, name) for name in _IDENTITY}
        index |= {"format": FORMAT, "count": self.count, "sha256": file_digest(folder / TENSORS)}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


_IDENTITY = ("dataset", "dataset_sha256", "extractor", "layer", "weights_sha256")


def load_reference(
    folder: str | Path, identity: ExtractorIdentity | None = None, dataset: str | None = None
) -> Reference:
    """Return the reference in `folder`, refusing one of another extractor `identity` or `dataset` (each checked if
    given).

    Raises `FileNotFoundError` for missing and `ValueError` for corrupt or mismatching files.
    """
    index_path, tensors_path = Path(folder) / INDEX, Path(folder) / TENSORS
    for path in (index_path, tensors_path):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: make the reference first")
    try:
        index = json.loads(index_path.read_text())
    except ValueError as error:
        raise ValueError(f"{index_path} is corrupt ({error}): make the reference again") from error
    if (
        not isinstance(index, dict)
        or index.get("format") != FORMAT
        or not {*_IDENTITY, "count", "sha256"} <= set(index)
    ):
        raise ValueError(f"{index_path} is not an index of format {FORMAT}: make the reference again")
    if file_digest(tensors_path) != index["sha256"]:
        raise ValueError(f"{tensors_path} is truncated or corrupt (its SHA-256 is not {INDEX}'s): make it again")
    try:
        tensors = load_file(str(tensors_path))
        reference = Reference(
            features=tensors["features"],
            mean=tensors["mean"],
            cov=tensors["cov"],
            dataset=index["dataset"],
            dataset_sha256=index["dataset_sha256"],
            extractor=index["extractor"],
            layer=index["layer"],
            weights_sha256=index["weights_sha256"],
        )
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{tensors_path} is no reference ({error}): make it again") from error
    if reference.count != index["count"]:
        raise ValueError(f"{tensors_path} holds {reference.count} images, {INDEX} says {index['count']}: make it again")
    reference.require(identity, dataset)
    return reference


def extract(extractor: Callable[[Tensor], Tensor], images: Tensor, batch: int = 500) -> Tensor:
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
    checked_features(features, what="extracted features")
    return features


def make_reference(extractor: Extractor, image_set: ImageSet, batch: int = 500) -> Reference:
    """Return the reference of an image set: its features, their moments, and the identities of both."""
    features = extract(extractor, image_set.images, batch)
    moments = Moments.of(features)
    return Reference(
        features=features,
        mean=moments.mean,
        cov=moments.cov,
        dataset=image_set.name,
        dataset_sha256=image_set.digest,
        extractor=extractor.identity.name,
        layer=extractor.identity.layer,
        weights_sha256=extractor.identity.weights_sha256,
    )


def evaluate(features_fake: Tensor, reference: Reference, neighbours: int = 3) -> Evaluation:
    """Return FID ± SE, precision and recall (k = `neighbours`) of generated features (N, D); the extractor must be the
    reference's.
    """
    fid = frechet_with_error(features_fake, reference.moments)
    manifold = precision_recall(reference.features, features_fake, neighbours)
    return Evaluation(fid.value, fid.se, manifold.precision, manifold.recall, len(features_fake))
