# SPDX-License-Identifier: Apache-2.0
"""Progress of a job: a bar in a terminal, plain lines in a log, and a small JSON file for those who watch."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.files import write_json

FILE_SECONDS = 1.0
LINE_SECONDS = 10.0


def clock(seconds: float | None) -> str:
    """Seconds as `0:45`, `12:07` or `3:20:00`; `?` when unknown."""
    if seconds is None or seconds < 0:
        return "?"
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


# How scalars are shown, last and in this order (progress.json sorts its keys); others by name, with four digits.
SHOWN: dict[str, Callable[[float], str]] = {
    "tangent_norm": lambda norm: f"tangent {norm:.3g}",
    "images_per_second": lambda rate: f"{rate:.0f} img/s" if rate >= 100 else f"{rate:.3g} img/s",
    "memory_gb": lambda size: f"{size:.1f} GB",
}


def shown(scalars: Mapping[str, float]) -> list[str]:
    """Scalars in few words: `loss -1.234`, `tangent 0.52`, `1.2 GB`."""
    named = [f"{key} {value:.4g}" for key, value in scalars.items() if key not in SHOWN]
    return named + [form(scalars[key]) for key, form in SHOWN.items() if key in scalars]


def describe(name: str, state: dict[str, Any]) -> str:
    """One line for a progress.json: `teacher-…: 1200/3500 it, 48.0 it/s, ETA 0:45, loss 0.123, tangent 0.52, 1.2 GB`."""
    unit, rate = state["unit"], state.get("rate")
    parts = [f"{state['done']}/{state['total']} {unit}"]
    if rate:
        parts.append(f"{rate:.3g} {unit}/s" if rate < 100 else f"{rate:.0f} {unit}/s")
    parts.append(f"ETA {clock(state.get('eta_s'))}")
    parts += shown(state.get("scalars", {}))
    return f"{name}: {', '.join(parts)}"


class Progress:
    """Counts `done` of `total`; the rate is that of the last half minute, so that the ETA follows the machine.

    What a resumed job finds done counts for the display and not for the rate: it says so with `start`.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        file: Path,
        label: str = "",
        show: bool = True,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.total, self.unit, self.file, self.label = total, unit, file, label
        self.done = 0
        self.scalars: dict[str, float] = {}
        self._now = now
        self._started = now()
        self._marks: list[tuple[float, int]] = [(self._started, 0)]
        self._written = self._printed = 0.0
        self._broken = False
        self._bar: Any = None
        self._show = show
        if show and sys.stdout.isatty() and os.environ.get("SCM_PROGRESS") != "plain":
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, desc=label, dynamic_ncols=True, smoothing=0.1)
        self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def rate(self) -> float | None:
        """Units per second over the last half minute; None before the second mark."""
        (t0, n0), (t1, n1) = self._marks[0], self._marks[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 and n1 > n0 else None

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate."""
        return (self.total - self.done) / self.rate if self.rate else None

    def start(self, done: int) -> None:
        """Says that `done` units were there before: the rate counts from here."""
        self.done = done
        self._marks = [(self._now(), done)]
        if self._bar is not None:
            self._bar.n = self._bar.initial = self._bar.last_print_n = done
            self._bar.refresh()
        self._write()

    def update(self, done: int, **scalars: float) -> None:
        """Says that `done` units are ready (a count, not an increment), with scalars worth showing."""
        now = self._now()
        self.done = done
        self.scalars.update(scalars)
        if now - self._marks[-1][0] >= 0.5 or len(self._marks) == 1:
            self._marks.append((now, done))
            while len(self._marks) > 2 and now - self._marks[1][0] > 30:
                self._marks.pop(0)
        if now - self._written >= FILE_SECONDS:
            self._write()
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(", ".join(shown(self.scalars)), refresh=False)
            self._bar.update(0)
        elif self._show and now - self._printed >= LINE_SECONDS and now - self._started >= 1.0:
            self._print()

    def close(self) -> None:
        """Shows where it ended."""
        self._marks.append((self._now(), self.done))
        self._write()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._show:
            self._print()
        self._show = False

    def state(self) -> dict[str, Any]:
        """What progress.json holds."""
        return {
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": self.rate,
            "eta_s": self.eta_s,
            "scalars": self.scalars,
            "updated": self._now(),
            "started_at": self._started,
        }

    def _print(self) -> None:
        self._printed = self._now()
        print(describe(self.label, self.state()), flush=True)

    def _write(self) -> None:
        self._written = self._now()
        try:
            write_json(self.file, self.state())
        except OSError as error:
            # A full disk must stop the job where it loses data, not here: progress is only for the eye.
            if not self._broken:
                print(f"{self.label}: progress is no longer written to {self.file.name}: {error.strerror}", flush=True)
            self._broken = True
