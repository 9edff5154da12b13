# SPDX-License-Identifier: Apache-2.0
"""A store on disk: items of one shape in `.npy` shards that are mapped into memory, small arrays, and an `index.json` of them all."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scm_core.disk import StoreError, file_digest

FORMAT = "scm-shards-1"
INDEX = "index.json"


class Field(NamedTuple):
    """What a store has of each item: NumPy's name of the dtype ("uint8", "float32") and the shape of one item."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class Store(NamedTuple):
    """A store that is read: its large `fields` (N items each), small `arrays`, and `meta` (JSON values)."""

    fields: dict[str, Sharded]
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


def shard_file(field: str, index: int) -> str:
    """The name of a field's shard: images-00000.npy."""
    return f"{field}-{index:05d}.npy"


def array_file(name: str) -> str:
    """The name of a small array: labels.npy."""
    return f"{name}.npy"


class Sharded:
    """N items over mapped shards, which looks like a tensor (N, …) as far as reading it goes; what is read is a copy.

    Index it with an int, a slice, or an int64 tensor of indices in any order; `split` goes through it in order. The file's bytes are the
    items' bytes: nothing is decoded, and only the pages of the items asked for are read. Threads may read at the same time.
    """

    def __init__(self, field: Field, count: int, per_shard: int, paths: list[Path]) -> None:
        self.shape = torch.Size((count, *field.shape))
        self.ndim = len(self.shape)
        self.per_shard = per_shard
        self._maps = [_mapped(path, field, min(per_shard, count - k * per_shard)) for k, path in enumerate(paths)]
        self._numpy = np.dtype(field.dtype)
        self.dtype: torch.dtype = torch.from_numpy(np.empty(0, self._numpy)).dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._range(start, stop) if step == 1 else self._gather(np.arange(start, stop, step))
        if isinstance(index, int):
            return self._gather(np.array([index]))[0]
        if index.dtype != torch.int64 or index.ndim != 1:
            raise IndexError(f"expected an int64 tensor (B,) of indices, got {index.dtype} {tuple(index.shape)}")
        return self._gather(index.cpu().numpy())

    def split(self, size: int) -> Iterator[Tensor]:
        """The items in order, `size` at a time (the last time fewer)."""
        for start in range(0, len(self), size):
            yield self._range(start, min(start + size, len(self)))

    def _range(self, start: int, stop: int) -> Tensor:
        """Items start … stop − 1."""
        result = np.empty((max(stop - start, 0), *self.shape[1:]), self._numpy)
        position = start
        while position < stop:
            k, first = divmod(position, self.per_shard)
            count = min(stop - position, self.per_shard - first)
            result[position - start : position - start + count] = self._maps[k][first : first + count]
            position += count
        return torch.from_numpy(result)

    def _gather(self, index: np.ndarray) -> Tensor:
        count = len(self)
        if len(index) and not (-count <= index.min() and index.max() < count):
            raise IndexError(f"expected indices in {-count}…{count - 1}, got {index.min()}…{index.max()}")
        shards, rows = np.divmod(np.where(index < 0, index + count, index), self.per_shard)
        used = np.unique(shards)
        if len(used) == 1:
            return torch.from_numpy(np.take(self._maps[used[0]], rows, axis=0))
        result = np.empty((len(index), *self.shape[1:]), self._numpy)
        for k in used:
            where = np.flatnonzero(shards == k)
            result[where] = self._maps[k][rows[where]]
        return torch.from_numpy(result)


def _mapped(path: Path, field: Field, count: int) -> np.ndarray:
    """A shard's items, mapped read-only; StoreError if it holds others."""
    with open(path, "rb") as file:
        offset, found = _header(path, file)
        if found != Field(field.dtype, (count, *field.shape)):
            raise StoreError(f"{path} holds {found.dtype} {found.shape}, {INDEX} says otherwise: make it again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.ndarray(found.shape, np.dtype(found.dtype).newbyteorder("<"), mapped, offset)


def _header(path: Path, file: Any) -> tuple[int, Field]:
    """Where a `.npy` file's data begin, their dtype and shape; StoreError for what this format has not."""
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise StoreError(f"{path} is no readable .npy file ({error}): make it again") from error
    if fortran or dtype.hasobject or dtype.byteorder == ">":
        raise StoreError(f"{path} is no readable .npy file of plain numbers ({dtype}): make it again")
    offset = file.tell()
    if os.fstat(file.fileno()).st_size != offset + dtype.itemsize * math.prod(shape):
        raise StoreError(f"{path} is truncated or changed: make it again")
    return offset, Field(dtype.name, shape)


def read_index(folder: Path, kind: str) -> dict[str, Any]:
    """The index of a finished store; FileNotFoundError if there is none, StoreError if it is damaged or of another kind."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no {kind}; make it first")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:  # JSON's and Unicode's errors are both ValueErrors
        raise StoreError(f"{path} is corrupt ({error}): make {folder} again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise StoreError(f"{path} is not an index of format {FORMAT}: make {folder} again")
    if index.get("kind") != kind:
        raise StoreError(f"{folder} holds {index.get('kind')}, {kind} expected")
    return index


def files_of(index: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The files that an index names, with their `bytes` and `sha256`."""
    files = {array_file(name): entry for name, entry in index["arrays"].items()}
    for name, field in index["fields"].items():
        files |= {shard_file(name, k): entry for k, entry in enumerate(field["shards"])}
    return files


def open_store(folder: str | Path, kind: str, verify: bool = False) -> Store:
    """Return the store in `folder`, its fields mapped into memory.

    Sizes, dtypes and shapes of all files are compared with the index always, their SHA-256 if `verify`, which reads every byte once.
    Raises FileNotFoundError for a missing folder or file and StoreError for one that is truncated, changed or of another kind.
    """
    folder = Path(folder)
    index = read_index(folder, kind)
    try:
        for name, entry in files_of(index).items():
            _check_file(folder, name, entry, verify)
        arrays = {name: _small(folder / array_file(name), entry) for name, entry in index["arrays"].items()}
        fields = {}
        for name, entry in index["fields"].items():
            paths = [folder / shard_file(name, k) for k in range(len(entry["shards"]))]
            field = Field(entry["dtype"], tuple(entry["shape"]))
            if len(paths) != -(-index["count"] // index["per_shard"]):
                raise StoreError(f"{folder}: {INDEX} lists {len(paths)} shards of {name}, more or fewer than it needs")
            fields[name] = Sharded(field, index["count"], index["per_shard"], paths)
        return Store(fields, arrays, dict(index["meta"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder / INDEX} is incomplete ({error!r}): make {folder} again") from error


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], verify: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make {folder} again")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise StoreError(
            f"{path} is truncated or changed ({size} bytes, {entry['bytes']} expected): make {folder} again"
        )
    if verify and file_digest(path) != entry["sha256"]:
        raise StoreError(f"{path} is corrupt (its SHA-256 differs from {INDEX}'s): make {folder} again")


def _small(path: Path, entry: Mapping[str, Any]) -> np.ndarray:
    with open(path, "rb") as file:
        _, found = _header(path, file)
        if found != Field(entry["dtype"], tuple(entry["shape"])):
            raise StoreError(f"{path} holds {found.dtype} {found.shape}, {INDEX} says otherwise: make it again")
        return np.fromfile(file, np.dtype(found.dtype).newbyteorder("<")).reshape(found.shape)
