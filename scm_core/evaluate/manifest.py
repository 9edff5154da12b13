# SPDX-License-Identifier: Apache-2.0
"""What the features of an image set depend on, as JSON, and the key that this gives them in a cache."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from torch import Tensor

from scm_core.disk import canonical


class Identity(Protocol):
    """What says which extractor it is: weights' hash, layer, preprocessing, dtype."""

    def to_json(self) -> Mapping[str, Any]:
        """The identity as JSON values."""


class FeatureExtractor(Protocol):
    """uint8 images (B, 1 or 3, H, W) → features (B, D) float32, with an identity."""

    @property
    def identity(self) -> Identity:
        """Which extractor it is."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Features (B, D) of a batch."""


def manifest_json(value: Any) -> str:
    """A manifest as `canonical` JSON in which equal numbers are the same text: 1.0 and 1 both are 1.

    Raises ValueError, with the entry's dotted name, for NaN, an infinity, and whatever is not JSON (a set, a tensor, a NumPy number).
    """
    return canonical(_plain(value, "manifest"))


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
        # Python compares 1.0 and 1, or 0.0 and -0.0, as equal: they must not be two keys. Beyond 2^53 floats are not exact.
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name}: expected names as keys, got {key!r}")
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{name}: expected text, a number, a list or a mapping of them, got {type(value).__name__}")


def manifest_key(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON, 64 hex digits; ValueError as `manifest_json`."""
    return hashlib.sha256(manifest_json(manifest).encode()).hexdigest()


def identities(extractors: Mapping[str, FeatureExtractor]) -> dict[str, dict[str, Any]]:
    """The identities of named extractors as JSON values, as manifests hold them."""
    return {name: dict(extractor.identity.to_json()) for name, extractor in extractors.items()}


class _Manifest:
    """Every field is part of the JSON and so of the key."""

    KIND: ClassVar[str]
    chunk: int
    extractors: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, and the kind of set."""
        return {"kind": self.KIND, **{field.name: getattr(self, field.name) for field in fields(self)}}  # type: ignore[arg-type]

    @property
    def key(self) -> str:
        """The cache key of the features."""
        return manifest_key(self.to_json())

    def _check(self, hashes: Sequence[str], texts: Sequence[str], least: Mapping[str, int]) -> None:
        for name in hashes:
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
                raise ValueError(f"{type(self).__name__}: {name}: expected a SHA-256 of 64 hex digits, got {value!r}")
        for name in texts:
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{type(self).__name__}: {name}: expected words, got {value!r}")
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{type(self).__name__}: {name}: expected a whole number ≥ {low}, got {value!r}")
        if not self.extractors or not all(isinstance(identity, Mapping) for identity in self.extractors.values()):
            raise ValueError(f"{type(self).__name__}: extractors: expected {{name: identity}}, got {self.extractors!r}")
        # A copy of its own: what the caller does with his later must not change the key.
        object.__setattr__(self, "extractors", json.loads(manifest_json(self.extractors)))
        manifest_json(self.to_json())


@dataclass(frozen=True, kw_only=True)
class SampleManifest(_Manifest):
    """All that the features of generated samples depend on, but for their number; no field has a default, so that none is forgotten.

    `model_sha256` and `decoder_sha256` (None: the model gives pixels) are of the weights' files. `sampler`, `steps`, `times` (radians;
    None: the sampler's own) and `sigma_data` say how x0 is made, `guidance` with which scale (None: without). `noise` and `labels` are
    the rules by which a sample's index gives them ("sample_noise z", "index mod 10"), `first_index` is the index of the set's sample 0.
    `dtype` is that of the network's forward pass. `code` names what computes them (a digest, a commit; None: any code). `chunk` is
    one of them because a batch's size changes the last bits of what a network gives; so does the processor, which is not.
    Raises ValueError for a value that is no hash, not in range, NaN or empty.
    """

    KIND: ClassVar[str] = "samples"

    model_sha256: str
    sampler: str
    steps: int
    times: tuple[float, ...] | None
    guidance: float | None
    sigma_data: float
    noise: str
    first_index: int
    labels: str
    decoder_sha256: str | None
    dtype: str
    code: str | None
    chunk: int
    extractors: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        if self.times is not None:
            object.__setattr__(self, "times", tuple(self.times))
        hashes = ("model_sha256",) if self.decoder_sha256 is None else ("model_sha256", "decoder_sha256")
        texts = ("sampler", "noise", "labels", "dtype", *(("code",) if self.code is not None else ()))
        self._check(hashes, texts, {"steps": 1, "first_index": 0, "chunk": 1})


@dataclass(frozen=True, kw_only=True)
class ImagesManifest(_Manifest):
    """All that the features of `size` given images depend on: their digest (as `ImageFolder.digest`), the chunk size, the extractors."""

    KIND: ClassVar[str] = "images"

    images_sha256: str
    size: int
    chunk: int
    extractors: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        self._check(("images_sha256",), (), {"size": 1, "chunk": 1})
