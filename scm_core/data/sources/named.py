# SPDX-License-Identifier: Apache-2.0
"""The sources by name, and the processes that read one into a store together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scm_core.data.images import finish_images
from scm_core.data.sources.cifar10 import cifar10
from scm_core.data.sources.folder import images
from scm_core.data.sources.imagenet import imagenet
from scm_core.data.sources.listing import BrokenImagesError, Source
from scm_core.data.sources.reading import InMemory, store_source
from scm_core.data.sources.shipped import NATIVE, SHIPPED, load_source
from scm_core.data.writing import ShardWriter
from scm_core.published import DATA_HOME

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


class Wanted(NamedTuple):
    """Which images: a source by name, their size and channels, the number of classes (0: unlabelled), and where `images` are."""

    source: str
    resolution: int
    channels: int
    labels: int
    path: Path | None = None

    @property
    def name(self) -> str:
        """What the image set is called: `set_name`."""
        return set_name(self.source, self.resolution, self.path)


def open_source(wanted: Wanted) -> Source:
    """Return a source, its files listed and checked, no image of it decoded yet.

    Raises `ValueError` for an unknown source and for data that are not what is wanted, `FileNotFoundError` for data that are not there.
    """
    source, side, channels, labels, path = wanted
    if source in SHIPPED:
        return InMemory(load_source(source, side))
    if source == "cifar10":
        return InMemory(cifar10())
    if source == "imagenet":
        return imagenet(DATA_HOME.folder / "imagenet", wanted.name, channels, side, labels)
    if source != "images" or path is None:
        raise ValueError(f"source {source}: known are {', '.join(sorted(SOURCES))}, of which images needs a path")
    return images(path, wanted.name, channels, side, labels)


def store_images(
    wanted: Wanted, folder: str | Path, processes: int = 1, progress: Callable[[int, int], None] | None = None
) -> ShardWriter:
    """Make the image set in `folder` by this process and `processes` − 1 others; returns its finished store.

    What a killed attempt has left is gone on with. The others only help: what one of them leaves, this process does. `progress` gets the
    images done and all of them. Raises as `open_source`, `ShardWriter.fill`, and BrokenImagesError.
    """
    source = open_source(wanted)
    total = len(source.labels)
    context = multiprocessing.get_context("spawn")
    helpers = [
        context.Process(target=_help, args=(wanted, folder, (rank, processes)), daemon=True)
        for rank in range(1, processes)
    ]
    for helper in helpers:
        helper.start()
    try:
        shown = None if progress is None else lambda done: progress(done, total)
        writer = store_source(source, folder, (0, processes), shown)
    finally:
        for helper in helpers:
            helper.kill()
            helper.join()
    finish_images(writer, source.labels, source.name)
    return writer


def _help(wanted: Wanted, folder: str | Path, shard: tuple[int, int]) -> None:
    try:
        store_source(open_source(wanted), folder, shard)
    except BrokenImagesError:
        return  # the first process comes upon them too, and says so
