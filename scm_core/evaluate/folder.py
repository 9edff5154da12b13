# SPDX-License-Identifier: Apache-2.0
"""Images as PNG files: a folder of them as an image set, and a folder in which generated ones are kept."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scm_core.disk import StoreError, failure, replace_file, visible_files

COLOURS = {0: "greyscale", 2: "RGB", 3: "palette", 4: "greyscale with alpha", 6: "RGB with alpha"}  # of PNG's header
CHANNELS = {"L": 1, "RGB": 3}
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MARKER = ".images-of"


class ImageFolder:
    """The PNG images below a folder as an image set: `folder(range)` gives them as uint8 (B, C, H, W), C = 1 or 3.

    Sorted by path in natural order (2.png before 10.png), subfolders (classes) included; names that begin with a dot are left out, and
    anything else that is no PNG is refused. All have one size and are greyscale or RGB with 8 bits per channel; colour profiles
    are not applied. `count` is the number of images expected, if known. The first image and the names are looked at here, the others in
    `digest` and when they are read. Raises FileNotFoundError without the folder and ValueError, which names the file, for the rest.
    """

    def __init__(self, path: str | Path, count: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} is missing: expected a folder of PNG images")
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: expected a folder of PNG images, got a file")
        self.names = sorted(_listed(self.path), key=_natural)
        if not self.names:
            raise ValueError(f"{self.path}: there is no image in it; expected PNG files")
        if count is not None and len(self.names) != count:
            raise ValueError(
                f"{self.path}: expected {count} images, got {len(self.names)}; complete the folder, or ask for what is there"
            )
        self.shape = _checked(self.path / self.names[0], _bytes(self.path / self.names[0]))
        self._digests: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, indices: range) -> Tensor:
        """The images with these indices, uint8 (B, C, H, W)."""
        if len(indices) == 0 or min(indices) < 0 or max(indices) >= len(self):
            raise ValueError(f"{self.path}: expected indices in 0…{len(self) - 1}, got {indices}")
        return torch.stack([torch.from_numpy(self._read(index)) for index in indices])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over each image's name and its file's SHA-256, in order, 64 hex digits; reads and checks every file once."""
        whole, found = hashlib.sha256(), []
        for name in self.names:
            data = _bytes(self.path / name)
            self._require_shape(name, _checked(self.path / name, data))
            found.append(hashlib.sha256(data).digest())
            whole.update(os.fsencode(name) + b"\0" + found[-1])
        self._digests = found
        return whole.hexdigest()

    def _require_shape(self, name: str, shape: tuple[int, int, int]) -> None:
        if shape != self.shape:
            raise ValueError(
                f"{self.path / name}: expected {_words(self.shape)} like {self.names[0]}, got {_words(shape)}; give all one size and colour"
            )

    def _read(self, index: int) -> np.ndarray:
        name = self.names[index]
        data = _bytes(self.path / name)
        if self._digests is not None and hashlib.sha256(data).digest() != self._digests[index]:
            raise ValueError(f"{self.path / name}: was changed since the folder's digest was taken; start again")
        self._require_shape(name, _checked(self.path / name, data))
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                pixels = np.array(image)
        except BROKEN as error:
            raise _broken(self.path / name, error) from error
        return np.ascontiguousarray(pixels.reshape(*self.shape[1:], self.shape[0]).transpose(2, 0, 1))


def _listed(top: Path) -> list[str]:
    """The paths of all images below `top`, relative to it; ValueError for anything that is not a PNG file by its name."""
    names = []
    for name in visible_files(top):
        path = top / name
        if path.suffix.lower() != ".png":
            raise _foreign(path, path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif"))
        names.append(name)
    return names


def _natural(name: str) -> tuple[list[list[str | int]], str]:
    """Numbers in names by value, folder by folder; equal ones (1.png, 01.png) by their letters."""
    parts = (re.split("([0-9]+)", part) for part in name.split("/"))  # text and digits in turn, text first
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], name


def _foreign(path: Path, jpeg: bool) -> ValueError:
    if jpeg:
        return ValueError(
            f"{path}: is a JPEG, whose compression every metric of features sees as a property of the images; write PNG files "
            "from the pixels themselves (a JPEG that is converted keeps the damage)"
        )
    return ValueError(f"{path}: is no PNG image; keep nothing but PNG images in the folder")


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: is no readable PNG image ({error}); write it again")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read: {error.strerror or error}; mend or remove it and start again"
        ) from error


def _checked(path: Path, data: bytes) -> tuple[int, int, int]:
    """The shape (C, H, W) of an image that may be used; ValueError if it may not be, or a checksum of its parts is wrong.

    Pillow reads 16 bits per channel of RGB as 8 and drops what a palette or transparency adds: the file's header is asked.
    """
    if data.startswith(b"\xff\xd8\xff"):
        raise _foreign(path, jpeg=True)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            depth, colour = data[24], data[25]
            transparent, animated = "transparency" in image.info, getattr(image, "is_animated", False)
            image.verify()
    except BROKEN as error:
        raise _broken(path, error) from error
    found = f"{depth} bits {COLOURS.get(colour, 'of an unknown kind')}"
    found += " with a transparent colour" if transparent and colour != 3 else ""
    found += ", animated" if animated else ""
    if depth != 8 or colour not in (0, 2) or transparent or animated:
        raise ValueError(
            f"{path}: expected 8 bits per channel, greyscale or RGB without transparency, got {found}; write the images as that"
        )
    return (1 if colour == 0 else 3), height, width


def _words(shape: tuple[int, int, int]) -> str:
    return f"{COLOURS[0 if shape[0] == 1 else 2]} {shape[2]}×{shape[1]}"


class KeptImages:
    """A folder in which the samples of one key are kept as PNG files, 000000.png for sample 0; an `ImageFolder` reads them.

    Raises StoreError if there are other images in it, or those of another key.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder)
        marker = self.folder / MARKER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            used = any(not path.name.startswith(".") for path in self.folder.iterdir())
            # Read after the listing: another process writes its mark before its first image.
            mark = marker.read_text().strip() if marker.exists() else None
            if mark is None and not used:
                replace_file(marker, f"{key}\n".encode(), durable=False)
                mark = key
        except OSError as error:
            raise failure(self.folder, error, "keeping images", "nothing is lost") from error
        if mark != key:
            raise StoreError(
                f"{self.folder}: holds {'other files' if mark is None else f'the images of {mark[:16]}…'}, not those of {key[:16]}…; "
                "name an empty folder for the images"
            )

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / f"{index:06d}.png"

    def missing(self, indices: range) -> bool:
        """Whether any of these samples has no file."""
        return not all(self.path(index).exists() for index in indices)

    def write(self, indices: range, images: Tensor) -> None:
        """Write uint8 images (B, 1 or 3, H, W) of these samples, each file atomically but without fsync; StoreError if that fails."""
        for index, image in zip(indices, images.cpu(), strict=True):
            buffer = io.BytesIO()
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(buffer, "PNG")
            try:
                replace_file(self.path(index), buffer.getvalue(), durable=False)
            except OSError as error:
                raise failure(
                    self.path(index), error, "keeping an image", "what was kept before stays valid"
                ) from error
