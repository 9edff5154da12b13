# SPDX-License-Identifier: Apache-2.0
"""Image files with labels in one fixed order, in whatever they lie: folders, ZIPs, tars, Parquet shards."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scm_core.data.sources.pixels import ImageError, pixels
from scm_core.disk import BadFileError, visible_files

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
NAMED = 5  # files named in an error


class BrokenImagesError(ValueError):
    """Images that do not decode; `names` and `whys` say which and why."""

    def __init__(self, whys: Mapping[str, str], where: str) -> None:
        self.whys, self.where = dict(whys), where
        shown = [f"{name} {why}" for name, why in list(self.whys.items())[:NAMED]]
        more = f"; and {len(self.whys) - NAMED} more" if len(self.whys) > NAMED else ""
        count = len(self.whys)
        super().__init__(
            f"{where}: {count} image{'s' if count > 1 else ''} cannot be used: {'; '.join(shown)}{more}; replace or remove them, as "
            "nothing is left out silently"
        )


class Source(Protocol):
    """A data set that can be read part by part: N images of one shape with labels, in a fixed order."""

    @property
    def name(self) -> str:
        """What the image set is called."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def made_from(self) -> Mapping[str, Any]:
        """What it is read from, as JSON values: a store that was begun from something else is not gone on with."""

    def images(self, part: range) -> np.ndarray:
        """uint8 (B, C, H, W) of these images; BrokenImagesError for those that do not decode."""


class Container(Protocol):
    """Where the bytes of image files are; any number of threads and processes may read."""

    def read(self, index: int) -> bytes:
        """The bytes of entry `index`."""


@dataclass(frozen=True)
class Encoded:
    """A `Source` of image files: entry i of `container` has the name `names[i]` and the label `labels[i]`, and is cropped to `shape`.

    `where` is for messages; `strict` as for `pixels.decode`.
    """

    name: str
    container: Container
    names: Sequence[str]
    labels: Tensor
    shape: tuple[int, int, int]
    where: str
    strict: bool = True

    @property
    def made_from(self) -> Mapping[str, Any]:
        """A digest of names and labels in order."""
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels.tolist(), strict=True):
            digest.update(f"{name}\0{label}\n".encode(errors="surrogateescape"))
        return {"name": self.name, "files": digest.hexdigest()}

    def images(self, part: range) -> np.ndarray:
        """uint8 (B, C, H, W) of these images; BrokenImagesError for those that do not decode."""
        result = np.zeros((len(part), *self.shape), np.uint8)
        broken = {}
        for row, index in enumerate(part):
            try:
                result[row] = pixels(self.container.read(index), self.shape[0], self.shape[1], self.strict)
            except ImageError as error:
                broken[self.names[index]] = str(error)
            except OSError as error:
                broken[self.names[index]] = f"cannot be read ({error.strerror or error})"
        if broken:
            raise BrokenImagesError(broken, self.where)
        return result


class Files:
    """Image files below a folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return (self.folder / self.names[index]).read_bytes()


class Spans:
    """Image files that lie whole within others (tars): entry i is `sizes[i]` bytes at `offsets[i]` of file `files[i]`."""

    def __init__(self, paths: Sequence[Path], files: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
        self.paths, self.files, self.offsets, self.sizes = paths, files, offsets, sizes
        self._open: dict[int, int] = {}

    def read(self, index: int) -> bytes:
        """The entry's bytes; ImageError if the file ends before them."""
        which, size = int(self.files[index]), int(self.sizes[index])
        if which not in self._open:
            for descriptor in self._open.values():  # in order of classes: the one before is not needed any more
                os.close(descriptor)
            self._open = {which: os.open(self.paths[which], os.O_RDONLY | os.O_CLOEXEC)}
        data = os.pread(self._open[which], size, int(self.offsets[index]))
        if len(data) < size:
            raise ImageError(f"is cut off ({self.paths[which].name} ends before it does)")
        return data

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class Zipped:
    """Image files in a ZIP, stored or deflated; nothing is extracted."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self._local = threading.local()

    def read(self, index: int) -> bytes:
        """The member's bytes, whose checksum is compared; ImageError if that or its compression is wrong."""
        if not hasattr(self._local, "file"):
            self._local.file = zipfile.ZipFile(self.path)
        try:
            return self._local.file.read(self.names[index])
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise ImageError(f"cannot be taken from the ZIP ({error})") from error


def image_names(top: Path) -> Iterator[str]:
    """The paths of all image files below `top`, relative to it, in no order; names that begin with a dot are left out.

    Raises BadFileError for anything else there, so that no image is left out by its name.
    """
    for name in visible_files(top):
        if name == "dataset.json":
            continue
        if os.path.splitext(name)[1].lower() not in SUFFIXES:
            raise BadFileError(f"{top / name}: is no image by its name; keep nothing but images in the folder")
        yield name


def labels_of(values: Sequence[int]) -> Tensor:
    """Labels as int64 (N,)."""
    return torch.tensor(values, dtype=torch.int64)
