# SPDX-License-Identifier: Apache-2.0
"""A lock that the kernel releases when its process dies, however it dies."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_held: set[int] = set()


def _release_in_child() -> None:
    """A forked child (a data loader's worker) would keep the lock of a killed parent: it closes its copy."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


class HeldError(Exception):
    """The lock is taken; the message says by whom."""


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an flock on the file at `path`, which says pid and host. Raises HeldError at once if it is taken, and OSError.

    The file stays: removing it would let two processes hold locks on two files of one name.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace").strip()
            raise HeldError(holder or "a process that has just started") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a child that was forked meanwhile
            _held.remove(descriptor)
            os.close(descriptor)
