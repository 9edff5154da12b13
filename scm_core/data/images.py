# SPDX-License-Identifier: Apache-2.0
"""Image sets on disk, and the maps between uint8 pixels and the [−1, 1] that networks see."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from scm_core.data.arrays import load_arrays, save_arrays
from scm_core.data.sources import ImageSet

KIND = "image set"


def from_uint8(images: Tensor) -> Tensor:
    """Map uint8 pixels 0…255 to float32 in [−1, 1], any shape: x = pixel/127.5 − 1."""
    if images.dtype != torch.uint8:
        raise ValueError(f"from_uint8: pixels must be uint8, got {images.dtype}")
    return images.float() / 127.5 - 1


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


def save_images(image_set: ImageSet, folder: str | Path) -> None:
    """Write an image set to `folder`: images.npy (N, C, H, W) uint8, labels.npy (N,) int64, index.json."""
    arrays = {"images": image_set.images.numpy(), "labels": image_set.labels.numpy()}
    save_arrays(folder, KIND, arrays, {"name": image_set.name})


def load_images(folder: str | Path, verify: bool = True) -> ImageSet:
    """Return the image set in `folder`, memory-mapped; raises as `load_arrays` for missing, truncated or corrupt files."""
    arrays, meta = load_arrays(folder, KIND, verify)
    if set(arrays) != {"images", "labels"} or not isinstance(meta.get("name"), str):
        raise ValueError(f"{folder}: an image set needs a name, images and labels, got {sorted(arrays)}")
    return ImageSet(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]), meta["name"])
