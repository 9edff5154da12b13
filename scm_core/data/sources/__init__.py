# SPDX-License-Identifier: Apache-2.0
"""Where images come from: sets that ship inside Python packages, CIFAR-10, ImageNet, and any folder or ZIP of images."""

from __future__ import annotations

from pathlib import Path

from scm_core.data.sources.cifar10 import cifar10
from scm_core.data.sources.folder import images
from scm_core.data.sources.imagenet import imagenet
from scm_core.data.sources.listing import BrokenImagesError, Source
from scm_core.data.sources.reading import InMemory, store_source
from scm_core.data.sources.shipped import NATIVE, SHIPPED, load_source
from scm_core.published import DATA_HOME

__all__ = ["SOURCES", "BrokenImagesError", "Source", "load_source", "open_source", "set_name", "store_source"]

SOURCES = (*SHIPPED, "cifar10", "imagenet", "images")


def set_name(source: str, resolution: int, path: str | Path | None = None) -> str:
    """Return the name of the image set that a source gives at a resolution: digits, or digits-4 below its own resolution; cifar10;
    imagenet-64; of `images` the name of its folder or ZIP with the resolution. Raises `ValueError` for an unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown image source {source!r}: known are {', '.join(sorted(SOURCES))}")
    if NATIVE.get(source) == resolution:
        return source
    return f"{Path(path).stem if path is not None else source}-{resolution}"


def open_source(source: str, resolution: int, channels: int, labels: int, path: str | Path | None = None) -> Source:
    """Return the source of that name, its files listed and checked, no image of it decoded yet.

    `labels` is the number of classes (0: unlabelled), `path` where `images` are. Raises `ValueError` for an unknown source and for data
    that do not fit these, `FileNotFoundError` for data that are not there.
    """
    name = set_name(source, resolution, path)
    if source in SHIPPED:
        return InMemory(load_source(source, resolution))
    if source == "cifar10":
        return InMemory(cifar10())
    if source == "imagenet":
        return imagenet(DATA_HOME.folder / "imagenet", name, channels, resolution, labels)
    if path is None:
        raise ValueError("source images needs a path")
    return images(path, name, channels, resolution, labels)
