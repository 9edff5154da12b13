# SPDX-License-Identifier: Apache-2.0
"""From a source to a store: read, decode, crop, write, by any number of processes, and every broken image named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scm_core.data.images import ImageSet, image_writer
from scm_core.data.sources.listing import BrokenImagesError, Source
from scm_core.data.writing import ShardWriter

BATCH = 64  # images between looks at the display


@dataclass(frozen=True)
class InMemory:
    """An image set in memory as a `Source`."""

    image_set: ImageSet

    @property
    def name(self) -> str:
        """Its name."""
        return self.image_set.name

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.image_set.labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.image_set.shape

    @property
    def made_from(self) -> Mapping[str, Any]:
        """Its name and digest."""
        return {"name": self.name, "sha256": self.image_set.digest}

    def images(self, part: range) -> np.ndarray:
        """uint8 (B, C, H, W) of these images."""
        return self.image_set.images[part.start : part.stop].numpy()


def store_source(
    source: Source,
    folder: str | Path,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] | None = None,
) -> ShardWriter:
    """Fill the store in `folder` with the images of a source, as `ShardWriter.fill` does; `images.finish_images` ends it.

    Images that do not decode stop nothing but their own shard: the others are made, and then BrokenImagesError names those found.
    """
    writer = image_writer(folder, len(source.labels), source.shape, source.made_from)
    broken: dict[str, str] = {}
    where = ""
    of_shard: dict[str, str] = {}

    def items(part: range) -> dict[str, np.ndarray]:
        nonlocal where
        if part.start % writer.per_shard == 0:
            of_shard.clear()
        try:
            made = source.images(part)
        except BrokenImagesError as error:
            of_shard.update(error.whys)
            where = error.where
            made = np.zeros((len(part), *source.shape), np.uint8)
        if of_shard and (part.stop % writer.per_shard == 0 or part.stop == writer.count):
            broken.update(of_shard)
            raise BrokenImagesError(of_shard, where)  # before the shard's last images are written: it is not published
        return {"images": made}

    try:
        writer.fill(items, BATCH, shard=shard, progress=progress, postpone=BrokenImagesError)
    except BrokenImagesError:
        raise BrokenImagesError(broken, where) from None
    return writer
