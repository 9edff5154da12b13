# SPDX-License-Identifier: Apache-2.0
"""A folder of `.npy` arrays with an `index.json` of their shapes and SHA-256 digests: memory-mapped, nothing pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "index.json"
FORMAT = "scm-arrays-1"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_arrays(folder: str | Path, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write each array to `folder`/<name>.npy and, last, `index.json` with `kind`, `meta` (JSON values) and digests."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} of {kind} holds Python objects, which would be pickled: not saved")
        path = folder / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        entries[name] = {
            "dtype": array.dtype.name,
            "shape": list(array.shape),
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
        }
    index = {"format": FORMAT, "kind": kind, "meta": dict(meta), "arrays": entries}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def load_arrays(folder: str | Path, kind: str, verify: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return (arrays, meta) of a folder written by `save_arrays`, memory-mapped copy-on-write.

    `verify` reads every file once to compare its digest; sizes, dtypes and shapes are compared always. Raises
    `FileNotFoundError` for a missing folder or file and `ValueError` for one that is truncated, changed or of another
    kind.
    """
    folder = Path(folder)
    index = _read_index(folder, kind)
    arrays = {}
    for name, entry in index["arrays"].items():
        path = folder / f"{name}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: make {folder} again")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{path} is truncated or changed ({path.stat().st_size} bytes, {entry['bytes']} expected): "
                f"make {folder} again"
            )
        if verify and file_digest(path) != entry["sha256"]:
            raise ValueError(f"{path} is corrupt (its SHA-256 differs from {INDEX}'s): make {folder} again")
        try:
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no readable .npy file ({error}): make {folder} again") from error
        if array.dtype.name != entry["dtype"] or list(array.shape) != entry["shape"]:
            raise ValueError(f"{path} holds {array.dtype.name} {array.shape}, {INDEX} says otherwise: make it again")
        arrays[name] = array
    return arrays, index["meta"]


def _read_index(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no {kind}; make it first")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:  # JSON's and Unicode's errors are both ValueErrors
        raise ValueError(f"{path} is corrupt ({error}): make {folder} again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or not isinstance(index.get("arrays"), dict):
        raise ValueError(f"{path} is not an index of format {FORMAT}: make {folder} again")
    if index.get("kind") != kind:
        raise ValueError(f"{folder} holds {index.get('kind')}, {kind} expected")
    return index
