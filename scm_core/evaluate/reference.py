# SPDX-License-Identifier: Apache-2.0
"""What generated features are compared with: the features of a data set, their moments, and where both come from, on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scm_core.disk import file_digest
from scm_core.evaluate.frechet import triangular_root
from scm_core.evaluate.manifold import FeatureSet
from scm_core.evaluate.moments import Moments

if TYPE_CHECKING:  # extractors imports torch_fidelity, which takes seconds and is needed by few
    from scm_core.evaluate.extractors import ExtractorIdentity

FORMAT = "scm-reference-2"
TENSORS, INDEX = "reference.safetensors", "reference.json"


class Subset(NamedTuple):
    """Which images of a reference are compared pair by pair: `size` of them, drawn at random by `seed`; all if there are no more."""

    size: int
    seed: int

    def indices(self, images: int) -> Tensor:
        """The drawn indices (size,) of 0 … images − 1, ascending."""
        order = torch.randperm(images, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.size].sort().values


class Prepared(NamedTuple):
    """What comparisons need of a reference alone: the `triangular_root` (D, D) of its covariance, and of its `FeatureSet` `nearest`
    (N, K) for neighbours up to the K-th and `kernel_mean`. Tensors in float64.
    """

    root: Tensor
    nearest: Tensor
    kernel_mean: float


@dataclass(frozen=True)
class Reference:
    """What generated features are compared with.

    `features` (M, D) float32, those that are compared pair by pair; `mean` (D,) and unbiased `cov` (D, D) in float64, which FID
    compares. Without a `subset` all three are of the same images; with one, `features` are a random part of the `images` behind the
    moments. `dataset`, `dataset_sha256` name the image set; `extractor`, `layer`, `weights_sha256`, `preprocessing` and `dtype` the
    network. What is not `prepared` is computed by the first evaluation and kept in memory.
    """

    features: Tensor
    mean: Tensor
    cov: Tensor
    dataset: str
    dataset_sha256: str
    extractor: str
    layer: str
    weights_sha256: str
    preprocessing: str = "none"
    dtype: str = "float32"
    prepared: Prepared | None = None
    subset: Subset | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        if (self.subset is None) != (self.images is None) or (
            self.subset is not None and not len(self.features) == self.subset.size < (self.images or 0)
        ):
            raise ValueError(
                f"reference of {self.dataset}: a subset has as many features as it says, of more images, got {len(self.features)} "
                f"features for {self.subset} of {self.images} images"
            )
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
        ready = self.prepared
        if ready is not None and (
            (ready.root.shape, ready.nearest.shape[:1]) != (self.cov.shape, self.features.shape[:1])
            or (ready.root.dtype, ready.nearest.dtype) != (torch.float64, torch.float64)
        ):
            raise ValueError(
                f"reference of {self.dataset}: root (D, D) and nearest (N, K) must be float64 of its N and D, got "
                f"{tuple(ready.root.shape)} {ready.root.dtype}, {tuple(ready.nearest.shape)} {ready.nearest.dtype}"
            )

    @property
    def count(self) -> int:
        """Number of reference images behind the moments."""
        return len(self.features) if self.images is None else self.images

    @property
    def key(self) -> str:
        """SHA-256 over what its features depend on: images, their number, which of them, network."""
        named = {name: getattr(self, name) for name in _IDENTITY if name != "dataset"} | {"count": self.count}
        if self.subset is not None:
            named["subset"] = self.subset
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    @property
    def moments(self) -> Moments:
        """Mean and covariance as `Moments`."""
        return Moments.given(self.mean, self.cov, self.count)

    @cached_property
    def root(self) -> Tensor:
        """Triangular root (D, D) of the covariance."""
        return triangular_root(self.cov) if self.prepared is None else self.prepared.root

    @cached_property
    def _on_devices(self) -> dict[torch.device, FeatureSet]:
        return {}

    def feature_set(self, device: torch.device | str | None = None) -> FeatureSet:
        """Return the features on `device` (by default where they are) with what is known of them; the same one each time."""
        place = torch.empty(0, device=self.features.device if device is None else device).device  # "cuda" is cuda:0
        if place not in self._on_devices:
            features = self.features.to(place)
            moments = self.moments if self.subset is None else None  # a part has moments of its own
            self._on_devices[place] = (
                FeatureSet(features, self.mean, "reference features", moments=moments)
                if self.prepared is None
                else FeatureSet.given(features, self.mean, self.prepared.nearest, self.prepared.kernel_mean, moments)
            )
        return self._on_devices[place]

    def prepare(self, neighbours: int = 5, device: torch.device | str | None = None) -> Reference:
        """Return the reference with all that evaluations need of it alone: `save` then keeps it, too.

        For neighbours up to `neighbours`, or all there are. Costs a pass over all pairs of its features, on `device`.
        """
        features = self.feature_set(device)
        count = min(neighbours, self.count - 1)
        features.prepare(count)
        ready = Prepared(self.root, features.nearest(count).cpu().contiguous(), features.kernel_mean)
        return replace(self, prepared=ready)

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
        for name in ("preprocessing", "dtype"):
            here, now = getattr(self, name), getattr(identity, name)
            if here != now:
                raise ValueError(f"the reference was made with {name} {here!r}, now {now!r}: make it again")

    def save(self, folder: str | Path) -> None:
        """Write reference.safetensors (features, mean, cov, what is prepared) and, last, reference.json (identities, N,
        digest) to `folder`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in ("features", "mean", "cov")}
        index = {name: getattr(self, name) for name in _IDENTITY}
        if self.prepared is not None:
            tensors |= {"root": self.prepared.root.contiguous(), "nearest": self.prepared.nearest.contiguous()}
            index["kernel_mean"] = self.prepared.kernel_mean
        save_file(tensors, str(folder / TENSORS))
        if self.subset is not None:
            index["subset"] = self.subset._asdict()
        index |= {"format": FORMAT, "count": self.count, "sha256": file_digest(folder / TENSORS)}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


_IDENTITY = ("dataset", "dataset_sha256", "extractor", "layer", "weights_sha256", "preprocessing", "dtype")


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
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT or not {*_IDENTITY, "count", "sha256"} <= set(index):
        raise ValueError(
            f"{index_path} is not an index of format {FORMAT} (it says {found!r}): make the reference again, with the stage "
            "`reference` or `make_reference(…).prepare().save(folder)`"
        )
    if file_digest(tensors_path) != index["sha256"]:
        raise ValueError(f"{tensors_path} is truncated or corrupt (its SHA-256 is not {INDEX}'s): make it again")
    try:
        tensors = load_file(str(tensors_path))
        reference = Reference(
            features=tensors["features"],
            mean=tensors["mean"],
            cov=tensors["cov"],
            **{name: index[name] for name in _IDENTITY},
            subset=Subset(**index["subset"]) if "subset" in index else None,
            images=index["count"] if "subset" in index else None,
            prepared=Prepared(tensors["root"], tensors["nearest"], float(index["kernel_mean"]))
            if "kernel_mean" in index
            else None,
        )
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{tensors_path} is no reference ({error}): make it again") from error
    if reference.count != index["count"]:
        raise ValueError(f"{tensors_path} holds {reference.count} images, {INDEX} says {index['count']}: make it again")
    reference.require(identity, dataset)
    return reference
