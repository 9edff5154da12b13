# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: tensors in safetensors, the rest in JSON, written atomically and verified when read.

Order of writing: temporary folder → files → fsync → SHA-256 manifest → rename → pointer. A checkpoint that does not
verify is named and the one before is used; if none verifies, loading fails rather than starting over.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, META, MANIFEST, POINTER = "state.safetensors", "meta.json", "manifest.json", "latest"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


class CheckpointStore:
    """The checkpoints of one run in a folder, the last `keep` of them."""

    def __init__(self, folder: Path, keep: int = 2, warn: Callable[[str], None] = _warn) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.folder, self.keep, self.warn = Path(folder), keep, warn

    def paths(self) -> list[Path]:
        """The published checkpoints, oldest first, whether valid or not."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def save(self, iteration: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Write checkpoint `iteration`, then drop those beyond the last `keep`; the existing ones stay if writing fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{iteration:08d}"
        temporary = self.folder / f".tmp-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed writer left behind
        temporary.mkdir()
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        (temporary / META).write_text(json.dumps({"iteration": iteration, **meta}, indent=1, sort_keys=True))
        manifest = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        for path in temporary.iterdir():
            sync(path)
        if final.exists():
            shutil.rmtree(final)  # the same iteration again: it did not verify, or it would have been resumed
        os.rename(temporary, final)
        sync(self.folder)
        write_text(self.folder / POINTER, final.name)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None if there never was one.

        Raises CheckpointError if there are, or the pointer says that there were, checkpoints and none of them verifies.
        """
        paths, pointer = self.paths(), self.folder / POINTER
        if pointer.is_file() and (newest := self.folder / pointer.read_text()) not in paths:
            paths.append(newest)  # deleted: reading it says so
        for path in reversed(paths):
            try:
                return self._read(path)
            except CheckpointError as error:
                self.warn(f"{error}; falling back to the checkpoint before it")
        if paths:
            raise CheckpointError(
                f"{self.folder}: none of its {len(paths)} checkpoints ({paths[-1].name} the newest) is valid; restore one from a backup, "
                "or delete the folder to start over"
            )
        return None

    def _read(self, path: Path) -> Checkpoint:
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
            if sha256(file) != digest:
                raise CheckpointError(f"{file}: damaged (its SHA-256 is not the recorded one)")
        return Checkpoint(load_file(path / TENSORS), json.loads((path / META).read_text()), path)
