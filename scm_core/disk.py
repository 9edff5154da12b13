# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, their digests and names, canonical JSON, and errors and warnings as sentences.

It imports the standard library alone, so that processes that have to stay small may import it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make the folder writable"),
    errno.EFBIG: "raise the limit on the size of a file",
    **dict.fromkeys((errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK), "use a file system that has locks (flock)"),
}


class BadFileError(ValueError):
    """Files that are not what they should be; the message names them and the remedy."""


class StoreError(ValueError):
    """A store that cannot be used or not be written, or items that do not belong in it; the message names file and remedy."""


def warn(message: str) -> None:
    """A warning on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def failure(path: Path, error: OSError, doing: str, stays: str) -> StoreError:
    """An operating system's error as one sentence: what failed, why, the remedy, and what is not lost."""
    remedy = REMEDIES.get(error.errno or 0, "look after the disk")
    return StoreError(f"{path}: {doing} failed: {error.strerror or error}; {remedy} and start again: {stays}")


def canonical(value: Any) -> str:
    """JSON that is the same string for the same value: sorted keys, no spaces; ValueError for NaN or an infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def visible_files(top: Path) -> Iterator[str]:
    """The paths of all files below `top`, relative to it, with slashes, in no order; what begins with a dot is left out.

    Links are followed. Raises BadFileError for a folder that cannot be read, and for one that is reached twice.
    """
    seen = set()

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out
        raise BadFileError(f"{error.filename}: cannot be read: {error.strerror}; make the folder readable") from error

    for parent, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            raise BadFileError(f"{parent}: is reached a second time through a link; remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(parent, top)
        for name in files:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}".replace(os.sep, "/")


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft(path: Path) -> Path:
    """A name beside `path` for what will become it: hidden, and of its own for each writer, as others may be writing the same file."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{secrets.token_hex(8)}.tmp")


def replace_file(path: Path, content: bytes, durable: bool) -> None:
    """Write a file atomically: temporary file beside it → (`durable`: fsync) → rename → (fsync of the folder).

    Raises OSError, and leaves no temporary file then: half a file only takes space that is needed.
    """
    temporary = draft(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def require_space(folder: Path, wanted: int, what: str) -> None:
    """Raise StoreError if the disk of `folder` has fewer than `wanted` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StoreError(
            f"{folder}: {what} needs {_size(wanted)}, {_size(free)} are free; free some space there, or use another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
