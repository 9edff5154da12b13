# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: tensors in safetensors, the rest in JSON, written atomically, beside the training, and verified when read.

Order of writing: temporary folder → files → fsync → SHA-256 manifest → fsync of the folder → rename → fsync of its parent → pointer →
those that are no longer needed. A checkpoint that does not verify is named and the one before is used; if none verifies, loading fails
rather than starting over.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from scm_core.disk import REMEDIES, file_digest, replace_file, sync, warn
from scm_core.train.lock import HeldError, exclusive
from scm_core.train.writer import Background, Buffers, write_tensors

TENSORS, META, MANIFEST, POINTER, LOCK = "state.safetensors", "meta.json", "manifest.json", "latest", ".lock"


class CheckpointError(Exception):
    """A checkpoint that cannot be used, or not be written; the message names the file and the remedy."""


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class CheckpointStore:
    """The checkpoints of one run in a folder, the last `keep` of them. One process writes, any number may read."""

    def __init__(self, folder: Path, keep: int = 2, warn: Callable[[str], None] = warn) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.folder, self.keep, self.warn = Path(folder), keep, warn
        self._buffers, self._background = Buffers(), Background()
        self._damaged: set[Path] = set()  # found by `load`

    def paths(self) -> list[Path]:
        """The published checkpoints, oldest first, whether valid or not."""
        found = (p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir())
        return sorted(found, key=_iteration)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, as a trainer does; ends with `wait`. Reading needs no lock.

        Raises CheckpointError that names the holder if another process, or another store, holds it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(self.folder / LOCK))
            except HeldError as error:
                raise CheckpointError(
                    f"{self.folder}: in use by another trainer, {error}; wait until it has ended, or stop it: two of them would delete "
                    "each other's checkpoints"
                ) from None
            except OSError as error:
                raise self._failure(self.folder / LOCK, error, "locking the checkpoints' folder") from error
            stack.callback(self._background.join)  # the lock covers a write that is still going on, whatever happened
            yield
            self.wait()

    def save(self, iteration: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Write checkpoint `iteration`, then drop those beyond the last `keep`; the existing ones stay if writing fails.

        Raises CheckpointError if it does, or if the write before, by `save_async`, did.
        """
        self.wait()
        return self._write(iteration, tensors, self._meta(iteration, meta))

    def save_async(self, iteration: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """`save` in the background: returns as soon as `tensors` are copied, into memory that the next call uses again.

        Waits first until the write before has ended. The error of a write that failed is raised, once, by the next `save_async`,
        `save`, `check` or `wait`.
        """
        self.wait()
        text = self._meta(iteration, meta)
        arrived = self._buffers.fill(tensors)

        def work() -> None:
            arrived()
            self._write(iteration, self._buffers.tensors, text)

        self._background.start(work)

    def writing(self) -> bool:
        """Whether a write of `save_async` is going on."""
        return self._background.busy()

    def check(self) -> None:
        """Raise CheckpointError if a write of `save_async` has failed; looks only, so that it may be called at every step."""
        self._background.check()

    def wait(self) -> None:
        """Wait until the write of `save_async` has ended. Raises CheckpointError if it failed."""
        self._background.wait()

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None if there never was one.

        Raises CheckpointError if there are, or the pointer says that there were, checkpoints and none of them verifies.
        """
        paths, pointer = self.paths(), self.folder / POINTER
        if pointer.is_file():
            name = pointer.read_bytes().decode(errors="replace")
            if not re.fullmatch(r"step-\d+", name):
                self.warn(f"{pointer}: damaged; taking the newest checkpoint that is there")
            elif (newest := self.folder / name) not in paths:
                paths.append(newest)  # deleted: reading it says so
            if not paths:
                raise CheckpointError(
                    f"{pointer}: says that there were checkpoints; restore one, or delete the folder to start over"
                )
        self._damaged.clear()
        for path in reversed(paths):
            try:
                return self.read(path)
            except CheckpointError as error:
                self._damaged.add(path)
                self.warn(
                    f"{error}; falling back to the checkpoint before it (a run keeps this one as bad-{path.name})"
                )
        if paths:
            raise CheckpointError(
                f"{self.folder}: none of its {len(paths)} checkpoints ({paths[-1].name} the newest) is valid; restore one from a backup, "
                "or delete the folder to start over"
            )
        return None

    @staticmethod
    def _meta(iteration: int, meta: Mapping[str, Any]) -> str:
        return json.dumps({"iteration": iteration, **meta}, indent=1, sort_keys=True)

    def _write(self, iteration: int, tensors: Mapping[str, Tensor], meta: str) -> Path:
        final = self.folder / f"step-{iteration:08d}"
        temporary = where = self.folder / f".tmp-{final.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob(".tmp-*"):  # what a killed writer left behind
                shutil.rmtree(stale)
            for stale in self.folder.glob(f".{POINTER}.*.tmp"):
                stale.unlink()
            temporary.mkdir()
            where = temporary / TENSORS
            digests = {TENSORS: write_tensors(tensors, where)}
            where = temporary / META
            where.write_text(meta)
            digests[META] = file_digest(where)
            sizes = {name: (temporary / name).stat().st_size for name in digests}
            manifest = {name: {"sha256": digest, "bytes": sizes[name]} for name, digest in digests.items()}
            where = temporary / MANIFEST
            where.write_text(json.dumps(manifest, indent=1, sort_keys=True))
            for where in (temporary / META, temporary / MANIFEST, temporary):
                sync(where)
            where = final
            if final.exists():
                self._set_aside(final)  # the same iteration again: it did not verify, or it would have been resumed
            os.rename(temporary, final)
            sync(self.folder)
            where = self.folder / POINTER
            replace_file(where, final.name.encode(), durable=True)
            where = self.folder
            self._tidy(final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint only takes space that is needed
            raise self._failure(where, error, f"writing checkpoint {iteration}") from error
        return final

    def _tidy(self, newest: Path) -> None:
        """Drop what `newest`, just published, makes superfluous: only what verified counts towards `keep`."""
        for path in self.paths():
            # newer ones are of a future that the run was not resumed from
            if path in self._damaged or _iteration(path) > _iteration(newest):
                self._set_aside(path)
        self._damaged.clear()
        for old in self.paths()[: -self.keep]:
            doomed = old.with_name(f".tmp-{old.name}")  # a half-deleted one must not look like a checkpoint
            os.rename(old, doomed)
            shutil.rmtree(doomed)

    def _set_aside(self, path: Path) -> None:
        # Renamed, not deleted: a disk or network that failed to read may read again, and nothing but a copy can replace it.
        # One for each iteration, so that they cannot pile up where a run fails again and again.
        aside = path.with_name(f"bad-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)
        if path in self._damaged:
            self._damaged.remove(path)  # `load` has said so
        else:
            self.warn(f"{path}: the run was not resumed from it; kept as {aside.name}")

    def _failure(self, where: Path, error: OSError, doing: str) -> CheckpointError:
        remedy = REMEDIES.get(error.errno or 0, "look after the disk")
        there = [path for path in self.paths() if path not in self._damaged]
        goes_on = f"it goes on from {there[-1].name}" if there else "it has no checkpoint yet"
        return CheckpointError(
            f"{where}: {doing} failed: {error.strerror or error}; {remedy} and start the run again: {goes_on}"
        )

    def read(self, path: Path) -> Checkpoint:
        """The checkpoint in a folder of `paths`; CheckpointError if it does not verify."""
        try:
            return self._verified(path)
        except OSError as error:  # unreadable is as bad as damaged
            raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error

    def _verified(self, path: Path) -> Checkpoint:
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            entries = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest.items()}
        except FileNotFoundError:
            raise CheckpointError(f"{path / MANIFEST}: missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path / MANIFEST}: damaged") from None
        if not {TENSORS, META} <= set(entries):
            raise CheckpointError(f"{path / MANIFEST}: does not list {TENSORS} and {META}")
        for name, (digest, size) in entries.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing")
            if file.stat().st_size != size:
                raise CheckpointError(f"{file}: truncated ({file.stat().st_size} of {size} bytes)")
            if file_digest(file) != digest:
                raise CheckpointError(f"{file}: damaged (its SHA-256 is not the recorded one)")
        return Checkpoint(load_file(path / TENSORS), json.loads((path / META).read_text()), path)
