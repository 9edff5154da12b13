# SPDX-License-Identifier: Apache-2.0
"""The section `dataset` of a slot in params.yaml: which images, of what size, from where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline import paths
from pipeline.sections import Count, Index, Model, problem

if TYPE_CHECKING:
    from scm_core.data import Wanted

SHIPPED = {"mnist5k": 32, "digits": 8}  # their own resolution
CIFAR10, CLASSES = 32, 1000


class ReadingEngine(Model):
    """How images are read: not a part of what they are known by."""

    processes: Count = 1
    """Processes that share the decoding."""


class Dataset(Model):
    source: Literal["mnist5k", "digits", "cifar10", "imagenet", "images"]
    """Where the images come from: a Python package, SCM_DATA (cifar10, imagenet), or `path` (images)."""
    resolution: Count
    """Side of the square images, in pixels."""
    channels: Count
    """Image channels."""
    labels: Index
    """Number of classes; 0 for unlabelled data."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """Of source images: a folder or a ZIP, relative to the repository or absolute."""
    engine: ReadingEngine = ReadingEngine()

    @model_validator(mode="after")
    def _fits_source(self) -> Dataset:
        source, side = self.source, self.resolution
        native = SHIPPED.get(source)
        if native is not None and native % side:
            raise problem("resolution", f"must divide {native} for source {source}, got {side}")
        if source == "cifar10" and side != CIFAR10:
            raise problem("resolution", f"must be {CIFAR10} for source cifar10, got {side}")
        channels = (1,) if native is not None else (1, 3) if source == "images" else (3,)
        if self.channels not in channels:
            raise problem(
                "channels", f"must be {' or '.join(map(str, channels))} for source {source}, got {self.channels}"
            )
        if source == "imagenet" and not self.labels:
            what = f"must be {CLASSES}, or the number of classes of a subset, for source imagenet"
            raise problem("labels", f"{what}, got {self.labels}")
        if source not in ("imagenet", "images") and self.labels not in (0, 10):
            raise problem("labels", f"must be 10 (or 0: unlabelled) for source {source}, got {self.labels}")
        if (self.path is not None) != (source == "images"):
            raise problem("path", "must be given for source images, and only for it")
        return self

    def keys(self) -> tuple[str, ...]:
        """The keys of the section, below the slot, that the images depend on, of those that are given."""
        return tuple(f".dataset.{key}" for key in type(self).model_fields if key in self.model_fields_set - {"engine"})

    def wanted(self) -> Wanted:
        """The images as the library knows them."""
        from scm_core.data import Wanted

        path = None if self.path is None else paths.root() / Path(self.path).expanduser()
        return Wanted(self.source, self.resolution, self.channels, self.labels, path)
