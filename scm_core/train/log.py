# SPDX-License-Identifier: Apache-2.0
"""The scalars of a run as a file of JSON lines, one for each log interval: `pandas.read_json(path, lines=True)` makes a table of it.

A line is {"iteration": …, "nimg": …, "time": …, scalars by name}; `time` in seconds since 1970. What is not finite is a string, "NaN",
"Infinity" or "-Infinity", which strict JSON readers accept and float() in Python, Number() in JavaScript and pandas turn back.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scm_core.disk import warn

OWN = ("iteration", "nimg", "time")


class JsonlLog:
    """Appends to `path`; call `start` before the first line. One process writes it.

    Each line is handed to the operating system when it is written. A full disk does not stop the run: `message` hears of it once, and the
    lines are kept and written when there is room. `now` gives the time.
    """

    def __init__(self, path: Path, message: Callable[[str], None] = warn, now: Callable[[], float] = time.time) -> None:
        self.path, self._message, self._now = path, message, now
        self._end: int | None = None  # bytes of the file that are whole lines; None before the start
        self._waiting = b""  # lines that the disk has not taken
        self._warned = False

    def start(self, iteration: int) -> None:
        """Say that the run begins at, or goes on from, `iteration`: what an interrupted attempt has logged beyond it is cut off.

        So an interrupted run ends with the lines of an uninterrupted one, up to times. Lines that are no JSON objects with an iteration are
        dropped, loudly unless it is the last one, torn when the process died. Raises OSError for a file that cannot be read.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        kept: list[bytes] = []
        *lines, last = content.split(b"\n")
        for number, line in enumerate([*lines, *([last] if last else [])], 1):
            found = _iteration(line)
            if found is None and number <= len(lines):
                self._message(f"{self.path}: line {number} is not a line of this log and is dropped: {line[:80]!r}")
            elif found is not None and found <= iteration:
                kept.append(line + b"\n")
        whole = b"".join(kept)
        self._end = _common(content, whole)
        self._waiting = whole[self._end :]
        self._append(self._end, cut=self._end < len(content))

    def write(self, iteration: int, nimg: int, scalars: Mapping[str, float]) -> None:
        """Append the line of the log interval that ends at `iteration`, `nimg` images seen. ValueError before `start`, and for a
        scalar named like another column."""
        if self._end is None:
            raise ValueError(f"{self.path}: expected start(iteration) before the first line")
        if taken := [key for key in OWN if key in scalars]:
            raise ValueError(f"scalars: expected other names than {', '.join(OWN)}, got {taken[0]!r}")
        row: dict[str, float | str] = {"iteration": iteration, "nimg": nimg, "time": round(self._now(), 3)}
        row |= {key: _number(float(value)) for key, value in scalars.items()}
        cut = bool(self._waiting)  # of which the disk may have taken a part
        self._waiting += json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._append(self._end, cut)

    def _append(self, end: int, cut: bool) -> None:
        """Append what waits; `cut`: after bringing the file back to `end` bytes."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                if cut and file.tell() > end:
                    file.truncate(end)
                file.write(self._waiting)
                file.flush()
                self._end = file.tell()
        except OSError as error:
            if not self._warned:
                self._message(f"{self.path}: log lines are kept in memory until they can be written: {error.strerror}")
            self._warned = True
        else:
            self._waiting = b""


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _iteration(line: bytes) -> int | None:
    """The iteration of a line; None for anything else, a part of a line for example."""
    try:
        row: Any = json.loads(line)
    except ValueError:
        return None
    found = row.get("iteration") if isinstance(row, dict) else None
    return found if isinstance(found, int) else None


def _common(a: bytes, b: bytes) -> int:
    """The number of leading bytes, in whole lines, that two texts share."""
    size = 0
    for one, other in zip(a.splitlines(keepends=True), b.splitlines(keepends=True), strict=False):
        if one != other:
            break
        size += len(one)
    return size
