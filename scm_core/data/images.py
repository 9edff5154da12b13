# SPDX-License-Identifier: Apache-2.0
"""Image sets in memory and on disk, and the maps between uint8 pixels and the [−1, 1] that networks see."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scm_core.data.shards import Field, Sharded, open_store
from scm_core.data.writing import ShardWriter

KIND = "image set"
PART = 1000  # images read at a time where all are gone through


@dataclass(frozen=True)
class ImageSet:
    """Images with labels: `images` (N, C, H, W) uint8, in memory or mapped (`Sharded`), `labels` (N,) int64 in [0, num_labels), `name` of
    the set; `ValueError` if these disagree.
    """

    images: Tensor | Sharded
    labels: Tensor
    name: str

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"image set {self.name}: images must be uint8 of shape (N, C, H, W), "
                f"got {self.images.dtype} of shape {shape}"
            )
        if 0 in shape:
            raise ValueError(f"image set {self.name}: there is no image in it, shape {shape}")
        if self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]:
            raise ValueError(
                f"image set {self.name}: labels must be int64 of shape ({len(self.images)},), "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if int(self.labels.min()) < 0:
            raise ValueError(f"image set {self.name}: labels must be ≥ 0, got {int(self.labels.min())}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_labels(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape, pixels and labels: two sets are the same data exactly if their digests agree. Reads every image once."""
        digest = hashlib.sha256()
        parts = (part.numpy() for part in self.images.split(PART))
        _add(digest, "|u1", tuple(self.images.shape), parts)
        _add(digest, "<i8", tuple(self.labels.shape), [self.labels.numpy()])
        return digest.hexdigest()


def _add(digest: hashlib._Hash, dtype: str, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
    """Dtype, shape and little-endian content, whatever the machine's order and the cut into parts."""
    digest.update(f"{dtype}{shape}".encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype=dtype).data)


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 pixels 0…255 to float32 in [−1, 1], any shape: x = pixel/127.5 − 1."""
    if images.dtype != torch.uint8:
        raise ValueError(f"from_uint8: pixels must be uint8, got {images.dtype}")
    return images.float().div_(127.5).sub_(1)  # in place: pages that are new cost more than the arithmetic


def to_uint8(x: Tensor) -> Tensor:
    """Map float images, nominally in [−1, 1], to the nearest uint8 pixels; values outside are clipped, NaN raises
    `ValueError`.

    Rounding instead of truncation: truncating darkens every image by half a level, which an FID sees.
    """
    if not x.is_floating_point():
        raise ValueError(f"to_uint8: images must be floating point in [-1, 1], got {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("to_uint8: the images hold NaN or infinite values")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_writer(
    folder: str | Path, count: int, shape: tuple[int, int, int], made_from: Mapping[str, object] | None = None
) -> ShardWriter:
    """The store in `folder` of `count` images (C, H, W), to be filled with `images`; `finish_images` ends it."""
    return ShardWriter(folder, KIND, {"images": Field("uint8", shape)}, count, made_from)


def finish_images(writer: ShardWriter, labels: Tensor, name: str) -> None:
    """Publish a filled store of images with their `labels` (N,) int64 as the image set `name`."""
    writer.finish({"labels": labels.numpy()}, {"name": name})


def save_images(image_set: ImageSet, folder: str | Path) -> None:
    """Write an image set to `folder`: images-00000.npy, … (N, C, H, W) uint8, labels.npy (N,) int64, index.json."""
    writer = image_writer(folder, len(image_set), image_set.shape)
    writer.fill(lambda part: {"images": image_set.images[part.start : part.stop].numpy()}, PART)
    finish_images(writer, image_set.labels, image_set.name)


def load_images(folder: str | Path, verify: bool = False) -> ImageSet:
    """Return the image set in `folder`, its images mapped into memory; raises and verifies as `open_store`."""
    store = open_store(folder, KIND, verify)
    if store.fields.keys() != {"images"} or store.arrays.keys() != {"labels"} or "name" not in store.meta:
        found = sorted([*store.fields, *store.arrays, *store.meta])
        raise ValueError(f"{folder}: an image set needs a name, images and labels, got {found}")
    return ImageSet(store.fields["images"], torch.from_numpy(store.arrays["labels"]), store.meta["name"])
