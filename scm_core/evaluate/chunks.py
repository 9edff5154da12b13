# SPDX-License-Identifier: Apache-2.0
"""The chunks of a feature store: safetensors files with their SHA-256 in their names, so that both appear in one rename."""

from __future__ import annotations

import hashlib
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from scm_core.described import described_bytes, load_described
from scm_core.disk import StoreError, file_digest, replace_file

FORMAT = "scm-features-1"
NAME = re.compile(r"chunk-(\d{8,})-([0-9a-f]{64})\.safetensors")


class Layout(NamedTuple):
    """What all chunks of a store have in common: the shape (C, H, W) of the images and the features' dimensions by extractor."""

    image: tuple[int, ...]
    dims: dict[str, int]

    def __str__(self) -> str:
        dims = ", ".join(f"{dim} of {name}" for name, dim in sorted(self.dims.items()))
        return f"images {'×'.join(map(str, self.image))} with features {dims}"


class Chunk(NamedTuple):
    """Features (rows, D) float32 by extractor, and the shape (C, H, W) of the images they are of."""

    features: dict[str, Tensor]
    image: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        """The shapes of images and features."""
        return Layout(self.image, {name: value.shape[1] for name, value in self.features.items()})


@dataclass(frozen=True)
class Chunks:
    """The chunk files in the folder `path` of the store `key`, each with the features of the extractors `names`."""

    path: Path
    key: str
    names: tuple[str, ...]

    def published(self) -> dict[int, Path]:
        """The chunks that are there by index, whether valid or not; StoreError if one index has two."""
        return self._matching("chunk-*.safetensors")

    def find(self, index: int) -> Path | None:
        """The file of one chunk, whether valid or not; None if there is none, StoreError if there are two."""
        return self._matching(f"chunk-{index:08d}-*.safetensors").get(index)

    def _matching(self, pattern: str) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for path in sorted(self.path.glob(pattern)):
            match = NAME.fullmatch(path.name)
            if match is None:
                continue
            if (index := int(match[1])) in found:
                raise StoreError(
                    f"{path}: chunk {index} is there twice with different contents, as {found[index].name} too: two jobs that do not see "
                    "each other's locks computed it; delete one of the two"
                )
            found[index] = path
        return found

    def write(self, index: int, chunk: Chunk) -> Path:
        """Publish a chunk: temporary file in the folder → fsync → rename → fsync of the folder. The caller holds the chunk's claim.

        Raises OSError, and leaves no temporary file then.
        """
        config = {"key": self.key, "chunk": index, "image": list(chunk.image)}
        content = described_bytes(chunk.features, FORMAT, config)
        final = self.path / f"chunk-{index:08d}-{hashlib.sha256(content).hexdigest()}.safetensors"
        for stale in self.path.glob(f".chunk-{index:08d}-*.{socket.gethostname()}-*.tmp"):  # of a process that died:
            stale.unlink(missing_ok=True)  # it held the claim
        replace_file(final, content, durable=True)
        return final

    def read(self, index: int, path: Path, rows: int) -> Chunk:
        """The verified chunk in a file; StoreError, without a remedy, if it is not chunk `index` with `rows` rows, bit for bit.

        The tensors may be views of the file, which is read when they are.
        """
        match = NAME.fullmatch(path.name)
        try:
            if match is None or file_digest(path) != match[2]:
                raise StoreError(f"{path}: truncated or changed (its SHA-256 is not the one in its name)")
            tensors, config, _ = load_described(path, FORMAT)
        except OSError as error:  # unreadable is as bad as damaged
            raise StoreError(f"{path}: cannot be read: {error.strerror or error}") from error
        except StoreError:
            raise
        except ValueError as error:
            raise StoreError(str(error)) from error
        if (config.get("key"), config.get("chunk")) != (self.key, index):
            raise StoreError(f"{path}: holds chunk {config.get('chunk')} of the store {config.get('key')}")
        if tensors.keys() != set(self.names) or any(
            value.ndim != 2 or len(value) != rows or value.dtype != torch.float32 for value in tensors.values()
        ):
            found = ", ".join(f"{name} {value.dtype} {tuple(value.shape)}" for name, value in sorted(tensors.items()))
            raise StoreError(f"{path}: expected {rows} rows of {', '.join(self.names)} in float32, got {found}")
        return Chunk(tensors, tuple(config["image"]))
