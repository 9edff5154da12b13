# SPDX-License-Identifier: Apache-2.0
"""Writing a store: shards made by any number of processes, each whole or not there, and an index that comes last."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scm_core.claims import claimed, work_off
from scm_core.data.shards import FORMAT, INDEX, Field, array_file, files_of, read_index, shard_file
from scm_core.disk import StoreError, draft, failure, replace_file, require_space, sync, warn
from scm_core.train.lock import HeldError

SHARD_BYTES = 128 << 20  # of an item's fields together: a minute lost by a kill, and enough shards for many processes
MOST_SHARDS = 256  # a mapped file needs a descriptor, and a process has 1024
UNFINISHED, PLAN = "unfinished", "plan.json"
STAYS = "the shards that are there stay"

Items = Callable[[range], Mapping[str, np.ndarray]]


class ShardWriter:
    """The store of `count` items that is being made in `folder`; `fields` says what it holds of each.

    `made_from` (JSON values) names what the items are made of: a store that was begun from something else is not gone on with. Item i is
    in shard ⌊i/per_shard⌋; `per_shard` follows from the items' size and number, so that a store has the same bytes whoever makes it, in
    whatever order, killed how often. Raises StoreError if the folder holds another store or its disk is too small.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        fields: Mapping[str, Field],
        count: int,
        made_from: Mapping[str, Any] | None = None,
        per_shard: int | None = None,
        notify: Callable[[str], None] = warn,
    ) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least one item, got {count}")
        self.folder, self.kind, self.count, self.notify = Path(folder), kind, count, notify
        self.fields = {name: Field(np.dtype(f.dtype).name, tuple(f.shape)) for name, f in fields.items()}
        self.item_bytes = sum(field.item_bytes for field in self.fields.values())
        self.per_shard = per_shard or max(1, SHARD_BYTES // self.item_bytes, -(-count // MOST_SHARDS))
        self.shards = -(-count // self.per_shard)
        self._records = self.folder / UNFINISHED
        self._layout = {name: {"dtype": f.dtype, "shape": list(f.shape)} for name, f in self.fields.items()}
        self._plan = {
            "format": FORMAT,
            "kind": kind,
            "count": count,
            "per_shard": self.per_shard,
            "fields": self._layout,
        }
        try:
            self._prepare(dict(made_from or {}))
        except OSError as error:
            raise failure(self.folder, error, "opening the store", STAYS) from error

    @property
    def finished(self) -> bool:
        """Whether the index is there: the store is complete."""
        return (self.folder / INDEX).is_file()

    def done(self) -> int:
        """How many items are in shards that are there."""
        if self.finished:
            return self.count
        return sum(len(self._items(k)) for k in range(self.shards) if self._record(k) is not None)

    def fill(
        self,
        items: Items,
        batch: int,
        *,
        shard: tuple[int, int] = (0, 1),
        progress: Callable[[int], None] | None = None,
        postpone: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> None:
        """Make every shard that is missing; returns when all are there.

        `items(range)` gives the items of at most `batch` consecutive indices as arrays (B, …) by field; batches start at each shard's
        start. Any number of processes may call this at once, on machines that share the folder: each takes the next shard that nobody
        has (`claims.work_off`; `shard` is its rank and their number). `progress` gets the number of items that are there. Raises
        StoreError if writing fails or the items are of another shape or dtype, and whatever `items` raises; the shards that are there stay.
        After an exception of the kind `postpone` the other shards are made before it is raised.
        """
        if batch < 1:
            raise ValueError(f"batch must be ≥ 1, got {batch}")
        if self.finished:
            return

        def advanced(count: int) -> None:
            if progress is not None:
                progress(min(self.count, len(list(self._records.glob("[0-9]*.json"))) * self.per_shard + count))

        failed: list[Exception] = []

        def settle(k: int) -> str | None:
            try:
                if self._record(k) is None:
                    with claimed(self._records / f"{k:05d}.lock", f"shard {k}", STAYS):
                        if self._record(k) is None:  # again: who held the claim may have made it meanwhile
                            self._make(k, items, batch, advanced)
            except HeldError as error:
                return str(error)
            except postpone as error:
                failed.append(error)
                return None
            except StoreError:
                if not self.finished:  # by who was first, and so without the records
                    raise
            advanced(0)
            return None

        def waiting(k: int, holder: str) -> None:
            self.notify(f"{self.folder}: waiting for shard {k}, which {holder} is making")

        work_off(self.shards, settle, shard, waiting)
        if failed:
            raise failed[0]

    def finish(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Add small arrays and `meta` (JSON values) and publish the index, last; one process calls this, after `fill`.

        Raises StoreError if shards are missing or writing fails.
        """
        if self.finished:
            return
        records = [self._record(k) for k in range(self.shards)]
        found = [record for record in records if record is not None]
        if len(found) < self.shards:
            missing = records.index(None)
            raise StoreError(f"{self.folder}: shard {missing} of {self.shards} is missing; fill the store first")
        try:
            small = {name: self._small(name, array) for name, array in arrays.items()}
            fields = {
                name: {**self._layout[name], "shards": [record[name] for record in found]} for name in self.fields
            }
            index = {**self._plan, "meta": dict(meta), "fields": fields, "arrays": small}
            text = json.dumps(index, indent=1, sort_keys=True) + "\n"
            replace_file(self.folder / INDEX, text.encode(), durable=True)
            shutil.rmtree(self._records, ignore_errors=True)  # of use to nobody, and found by nobody who reads
        except OSError as error:
            raise failure(self.folder, error, "finishing the store", STAYS) from error

    def move(self, target: str | Path) -> None:
        """Give a finished store's files another folder on the same disk; they stay here too (as links) where the file system can."""
        target = Path(target)
        target.mkdir(parents=True, exist_ok=True)
        for name in (*files_of(read_index(self.folder, self.kind)), INDEX):
            try:
                os.link(self.folder / name, target / name)
            except OSError:
                os.replace(self.folder / name, target / name)

    def shard_arrays(self) -> Iterator[dict[str, np.ndarray]]:
        """The shards, one after the other, as arrays by field: for statistics before `finish`."""
        for k in range(self.shards):
            yield {name: np.load(self.folder / shard_file(name, k), allow_pickle=False) for name in self.fields}

    def _prepare(self, made_from: dict[str, Any]) -> None:
        remedy = f"remove {self.folder} and start again"
        if self.finished:
            index = read_index(self.folder, self.kind)
            fields = {name: {k: f[k] for k in ("dtype", "shape")} for name, f in index["fields"].items()}
            if {key: {**index, "fields": fields}[key] for key in self._plan} != self._plan:
                raise StoreError(f"{self.folder}: holds a store of other items; {remedy}")
            return
        self._records.mkdir(parents=True, exist_ok=True)
        plan = {**self._plan, "made_from": made_from}
        file = self._records / PLAN
        if not file.exists():
            replace_file(file, (json.dumps(plan, indent=1, sort_keys=True) + "\n").encode(), durable=True)
        try:
            begun = json.loads(file.read_text())
        except ValueError as error:
            raise StoreError(f"{file}: is corrupt ({error}); {remedy}") from error
        if begun != json.loads(json.dumps(plan)):
            raise StoreError(f"{self.folder}: was begun as a store of other items or with other data; {remedy}")
        require_space(self.folder, (self.count - self.done()) * self.item_bytes, f"the store of {self.count} items")

    def _items(self, k: int) -> range:
        return range(k * self.per_shard, min((k + 1) * self.per_shard, self.count))

    def _record(self, k: int) -> dict[str, Any] | None:
        """Sizes and digests of a shard's files, which are there then: the record is written after them."""
        try:
            record = json.loads((self._records / f"{k:05d}.json").read_bytes())
            whole = all((self.folder / shard_file(name, k)).stat().st_size == record[name]["bytes"] for name in record)
        except (FileNotFoundError, ValueError):
            return None
        return record if whole else None

    def _make(self, k: int, items: Items, batch: int, progress: Callable[[int], None]) -> None:
        for stale in self.folder.glob(f".*-{k:05d}.npy.{socket.gethostname()}-*.tmp"):  # of a process that died:
            stale.unlink(missing_ok=True)  # it held the claim
        wanted = self._items(k)
        drafts = {name: draft(self.folder / shard_file(name, k)) for name in self.fields}
        files: dict[str, _Hashed] = {}
        try:
            with self._writing(k):
                for name, field in self.fields.items():
                    files[name] = _Hashed(open(drafts[name], "wb"))  # noqa: SIM115  # closed below
                    files[name].write(npy_header(Field(field.dtype, (len(wanted), *field.shape))))
            for start in range(wanted.start, wanted.stop, batch):
                part = range(start, min(start + batch, wanted.stop))
                made = items(part)
                with self._writing(k):
                    for name, field in self.fields.items():
                        files[name].write(_bytes(name, field, made, part))
                progress(part.stop - wanted.start)
            with self._writing(k):
                record = {name: file.close() for name, file in files.items()}
                for name, path in drafts.items():
                    os.replace(path, self.folder / shard_file(name, k))
                sync(self.folder)
                replace_file(self._records / f"{k:05d}.json", json.dumps(record, sort_keys=True).encode(), durable=True)
        finally:
            for file in files.values():
                with contextlib.suppress(OSError):  # what it could not write then was said before
                    file.file.close()
            for path in drafts.values():
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self, k: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise failure(self.folder, error, f"writing shard {k}", STAYS) from error

    def _small(self, name: str, array: np.ndarray) -> dict[str, Any]:
        if array.dtype.hasobject:
            raise StoreError(f"array {name!r} of {self.kind} holds Python objects, which would be pickled: not saved")
        content = npy_header(Field(array.dtype.name, array.shape)) + np.ascontiguousarray(array).tobytes()
        replace_file(self.folder / array_file(name), content, durable=True)
        digest = hashlib.sha256(content).hexdigest()
        return {"dtype": array.dtype.name, "shape": list(array.shape), "bytes": len(content), "sha256": digest}


class _Hashed:
    """A file whose digest is taken while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self._digest, self._count = file, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self._digest.update(content)
        self._count += memoryview(content).nbytes

    def close(self) -> dict[str, Any]:
        """Flush the file to the disk; its bytes and SHA-256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"bytes": self._count, "sha256": self._digest.hexdigest()}


def npy_header(field: Field) -> bytes:
    """The header of a `.npy` file (version 1.0) of an array of that dtype and shape, little-endian, in C order."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(field.dtype).newbyteorder("<"))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": field.shape})
    return buffer.getvalue()


def _bytes(name: str, field: Field, made: Mapping[str, np.ndarray], part: range) -> memoryview:
    """The items of a field as bytes, if they are what the store holds; else StoreError."""
    array = made[name]
    if array.dtype.name != field.dtype or array.shape != (len(part), *field.shape):
        raise StoreError(
            f"{name} of items {part.start}…{part.stop - 1}: expected {field.dtype} {(len(part), *field.shape)}, "
            f"got {array.dtype.name} {array.shape}"
        )
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data.cast("B")
