# SPDX-License-Identifier: Apache-2.0
"""Small files written so that a reader sees the old or the new content, never half of it; locks; live processes."""

import contextlib
import fcntl
import getpass
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from scm_core.disk import canonical, replace_file, sync
from scm_core.disk import file_digest as sha256_file

__all__ = [
    "Lock",
    "canonical",
    "fsync_tree",
    "host",
    "identify",
    "is_alive",
    "is_locked",
    "read_json",
    "replace_file",
    "sha256_file",
    "sha256_text",
    "start_time",
    "user",
    "write_json",
]


def sha256_text(text: str) -> str:
    """SHA-256 of a string, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Writes `value` to `path` atomically; `durable` also waits until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    replace_file(path, text.encode(), durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file or it is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def fsync_tree(folder: Path) -> None:
    """Waits until every file and folder below `folder` is on the disk."""
    for parent, _, names in os.walk(folder):
        for name in (*names, "."):
            sync(Path(parent, name))


class Lock:
    """A POSIX lock on a file, freed by the kernel when the process dies; works across hosts where the file system does.

    Closing any descriptor of a file drops its POSIX locks, so a process opens each lock file once: `is_locked` knows
    which ones this process holds.
    """

    _held: ClassVar[set[Path]] = set()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, shared: bool = False, wait: bool = True) -> bool:
        """Takes the lock, or changes it between shared and exclusive; False when `wait` is false and another has it."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+")
        try:
            fcntl.lockf(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            if self.path not in self._held:
                self.release()
            return False
        self._held.add(self.path)
        return True

    def release(self) -> None:
        """Gives the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._held.discard(self.path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock exclusively, waiting for it."""
        self.acquire()
        try:
            yield
        finally:
            self.release()


# struct flock of the C library: type, whence, start, length and (for the answer) owner.
_FLOCK = "qqihh" if sys.platform == "darwin" else "hhqqi0q"


def is_locked(path: Path) -> bool:
    """Whether this or another process holds the lock on `path`, shared or exclusive.

    The kernel is asked, the lock is not taken: a job that wants it at this moment gets it.
    """
    if path in Lock._held:
        return True
    try:
        # Not a file that this process has locked: closing any descriptor of one would drop the lock.
        with path.open("rb") as f:
            answer = fcntl.fcntl(f, fcntl.F_GETLK, struct.pack(_FLOCK, *_whole_file(fcntl.F_WRLCK)))
    except FileNotFoundError:
        return False
    return _lock_type(struct.unpack(_FLOCK, answer)) != fcntl.F_UNLCK


def _whole_file(kind: int) -> tuple[int, ...]:
    return (0, 0, 0, kind, os.SEEK_SET) if sys.platform == "darwin" else (kind, os.SEEK_SET, 0, 0, 0)


def _lock_type(fields: tuple[int, ...]) -> int:
    return fields[3] if sys.platform == "darwin" else fields[0]


def user() -> str:
    """The user's name; the number where the system has no name for it (a container with a foreign uid)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def host() -> str:
    """This machine's name in tickets and records."""
    return socket.gethostname()


def start_time(pid: int) -> str | None:
    """When process `pid` started, as a string to compare; None when it is gone (or a zombie, which is as good as gone).

    With the boot's identity in it, a pid that was given to another process later, or after a reboot, is not mistaken.
    """
    try:
        # The command name is in brackets and may hold spaces and brackets: count fields from the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    # No /proc (macOS, BSD): ps says the same thing, slower.
    shown = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = shown.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def identify(pid: int) -> dict[str, Any]:
    """What recognises process `pid` later: host, pid, start time."""
    return {"host": host(), "pid": pid, "started": start_time(pid)}


def is_alive(process: Mapping[str, Any] | None) -> bool:
    """Whether a process described by `identify` on this host still runs (False for one of another host)."""
    if not process or process.get("host") != host():
        return False
    now = start_time(int(process["pid"]))
    return now is not None and now == process.get("started")
