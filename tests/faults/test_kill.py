# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment, in a step or in the middle of writing a checkpoint: the resumed run is the uninterrupted one, bit for bit."""

import builtins
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scm_core.train import writer

KILLED = -signal.SIGKILL


def kill_later(run: Any, steps: int, part: float) -> int:
    """Start the run and kill -9 it when it has made so many steps more and a part of the next one: a busy machine changes nothing.

    Its exit status.
    """
    log = run.folder / "log"

    def made() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    first, child = made(), run.fork(run.go)
    begin = last = time.monotonic()
    while (done := made() - first) < steps and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < begin + 60
        time.sleep(0.001)
        last = time.monotonic()
    time.sleep(part * (last - begin) / (done + 1))
    os.kill(child, signal.SIGKILL)
    return run.wait_for(child)


@pytest.mark.slow
def test_killed_at_random_moments(new_run: Callable[[], Any], uninterrupted: Any, same: Callable[[Any], None]) -> None:
    """Twenty moments, uniform over the run; some runs are killed again while they go on."""
    random_number, steps = random.Random(20), len(uninterrupted.steps)
    killed: list[int] = []
    while len(killed) < 20:
        run = new_run()
        for _ in range(1 + len(killed) % 2):
            status = kill_later(run, random_number.randint(0, steps), random_number.random())
            killed += [max(run.steps(), default=-1)] if status == KILLED else []
        run.go()
        same(run)
    assert len(set(killed)) >= 8  # not all at one step


class Countdown:
    """Kills the process before the k-th of the calls that it is told of, or only counts them."""

    def __init__(self, after: int | None) -> None:
        self.calls, self.after = 0, after

    def tick(self) -> None:
        if self.calls == self.after:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # not one instruction more
        self.calls += 1

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return function(*args, **kwargs)

        return call

    def install(self) -> None:
        """Count whatever the writing of a checkpoint does to the disk: pieces of files as well, which leave torn ones."""
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir")):
            setattr(owner, name, self.before(getattr(owner, name)))
        for name in ("mkdir", "write_text"):
            setattr(Path, name, self.before(getattr(Path, name)))
        shutil.rmtree = self.before(shutil.rmtree)  # type: ignore[assignment]

        def open_unbuffered(path: Path, mode: str, buffering: int) -> Any:
            file = builtins.open(path, mode, buffering=0)  # noqa: SIM115
            pieces, plain = self.before(file.write), file.write

            class Torn:
                def __enter__(self) -> "Torn":
                    return self

                def __exit__(self, *error: object) -> None:
                    file.close()

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def write(self, data: Any) -> None:
                    half = len(data) // 2
                    plain(data[:half])
                    (pieces if len(data) > 2000 else plain)(data[half:])

            return Torn()

        writer.open = open_unbuffered  # type: ignore[attr-defined]


def calls_of(run: Any, first: int, last: int) -> tuple[int, int]:
    """The numbers of calls that a run has made when it starts to write checkpoint `first`, and when it has written `last`."""
    counts = run.folder / "counts"

    def count() -> None:
        countdown = Countdown(None)
        countdown.install()
        store = run.store()
        original = type(store)._write
        marks: list[str] = []

        def write(self: Any, iteration: int, tensors: Any, meta: str) -> Path:
            if iteration == first:
                marks.append(str(countdown.calls))
            final = original(self, iteration, tensors, meta)
            if iteration == last:
                marks.append(str(countdown.calls))
            return final

        type(store)._write = write
        run.go()
        with builtins.open(counts, "w") as file:
            file.write(" ".join(marks))

    assert run.wait_for(run.fork(count)) == 0
    start, end = map(int, counts.read_text().split())
    return start, end


@pytest.mark.slow
def test_killed_while_writing(new_run: Callable[[], Any], same: Callable[[Any], None]) -> None:
    """Before every single thing that writing a checkpoint does to the disk, one that is the first and one that replaces an old one."""
    first, _ = calls_of(new_run(), 4, 4)
    begin, end = calls_of(new_run(), 12, 12)
    assert end - begin > 20
    points = [*random.Random(5).sample(range(first, begin), 8), *range(begin, end)]
    stale = 0
    for point in points:
        run = new_run()

        def go(run: Any = run, point: int = point) -> None:
            Countdown(point).install()
            run.go()

        assert run.wait_for(run.fork(go)) == KILLED
        stale += any(run.store().folder.glob(".tmp-*"))
        for path in run.store().paths():  # at no moment does half a checkpoint bear a whole one's name
            run.store().read(path)
        warnings: list[str] = []
        assert (run.store(warnings.append).load() is None) == (not run.store().paths())
        assert not warnings
        run.go()
        same(run)
        assert not list(run.store().folder.glob(".tmp-*"))
        assert len(run.store().paths()) == 2
    assert stale > 10  # there was something to clear away
