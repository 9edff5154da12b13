# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline watch -- COMMAND …`: runs an engine and shows the progress of the jobs that it starts.

The engine's own output goes to `runs/.logs/<engine>.log`. In a terminal there is a bar for each running job and one
for everything; elsewhere a plain line for each running job every quarter of a minute, and one for each that ends.
Without a command: `pipeline.live`, a table of the runs that others have started.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.logs import tail
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.plan import duration
from pipeline.progress import clock, describe
from pipeline.status import DONE, RUNNING, Row, remaining, survey

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_SECONDS = 15.0
POLL_SECONDS = 1.0
SHARE = 0.05  # of a core, which is what looking at the jobs may take from them


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit status; on failure prints what went wrong from its log. Without one shows what runs now."""
    command = list(argv)
    if not command or (command[0] != "--" and command[0].startswith("-")):
        from pipeline.live import main as show_runs

        return show_runs(command)
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise PipelineError("watch: which command? Write for example: python -m pipeline watch -- snakemake all")
    params = load(paths.root() / PARAMS_FILE, _scale(command))
    log = paths.root() / "runs" / ".logs" / f"{Path(command[0]).name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    shown = Bars(params) if sys.stdout.isatty() else Lines(params)
    with log.open("w") as output:
        try:
            # In a session of its own, so that Ctrl-C comes once, from here, and not from the terminal as well.
            engine = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | {"SCM_PROGRESS": "plain"},
            )
        except FileNotFoundError:
            raise PipelineError(f"watch: {command[0]}: no such command; is the environment activated?") from None
        except OSError as error:  # no permission, no program
            raise PipelineError(f"watch: {command[0]}: cannot be run: {error.strerror}; name a program") from None
        with _passing_on_signals(engine), shown:
            while engine.poll() is None:
                began = time.process_time()
                shown.show()
                _rest(engine, max(POLL_SECONDS, (time.process_time() - began) / SHARE))
            shown.show(last=True)
    passed = duration(time.time() - started)
    for line in _lines(log, "warning: "):
        print(line, file=sys.stderr)
    if engine.returncode == 0:
        print(f"done in {passed}")
        return 0
    _explain(log, engine.returncode, passed)
    return engine.returncode if engine.returncode > 0 else 128 - engine.returncode


def _rest(engine: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Sleeps, but not longer than the command runs."""
    with suppress(subprocess.TimeoutExpired):
        engine.wait(seconds)


def _scale(command: Sequence[str]) -> str | None:
    """The scale that the engine is told to use (`--config scale=smoke`, `-S scale=smoke`)."""
    named = [word.removeprefix("scale=") for word in command if word.startswith("scale=")]
    return named[-1] if named else None


@contextmanager
def _passing_on_signals(engine: "subprocess.Popen[bytes]") -> Iterator[None]:
    def pass_on(signum: int, frame: FrameType | None) -> None:
        # To the whole group, as a terminal does: the engine and the processes that wait for its jobs.
        if engine.poll() is None:
            os.killpg(engine.pid, signum)

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.signal(kind, pass_on) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _explain(log: Path, code: int, passed: str) -> None:
    """The sentences that failed jobs left in the engine's log; its last lines if there are none."""
    for line in _lines(log, "error: ") or tail(log, 25):
        print(line, file=sys.stderr)
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
    print(f"{log.stem} {ended} after {passed}; its log: {paths.relative(log)}", file=sys.stderr)


def _lines(log: Path, start: str) -> list[str]:
    """The different lines of a log that start with a word of ours."""
    lines = log.read_text(errors="replace").splitlines()
    return list(dict.fromkeys(line for line in lines if line.startswith(start)))


class Lines:
    """Plain lines for a log file."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.done = {row.job.name for row in survey(params) if row.state == DONE}
        self.printed = time.monotonic()

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, *error: object) -> None:
        """Nothing to take down."""

    def show(self, last: bool = False) -> None:
        """Prints what has ended since the last call, and now and then what runs."""
        rows = survey(self.params)
        self.report(rows)
        if time.monotonic() - self.printed >= LINE_SECONDS and not last:
            self.printed = time.monotonic()
            for row in rows:
                if row.progress:
                    self.say(describe(row.job.name, row.progress))

    def report(self, rows: Sequence[Row]) -> None:
        """One line for each job that is done now and was not before."""
        for row in rows:
            if row.state == DONE and row.job.name not in self.done:
                self.done.add(row.job.name)
                self.say(f"{row.job.name}: done, {row.detail} ({len(self.done)} of {len(rows)})")

    def say(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True)


class Bars(Lines):
    """Live bars for a terminal: one for each running job, one for everything."""

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        from rich.progress import BarColumn, Progress, TextColumn

        self.bars: Progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}", style="dim")
        )
        self.total = self.bars.add_task("[bold]everything", total=1.0, text="")
        self.tasks: dict[str, TaskID] = {}
        self.started = time.monotonic()
        self.expected: float | None = None

    def __enter__(self) -> None:
        self.bars.start()

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self.bars.console.print(line, highlight=False, markup=False)

    def show(self, last: bool = False) -> None:
        """Brings the bars up to date."""
        rows = survey(self.params)
        self.report(rows)
        running = {row.job.name: row for row in rows if row.state == RUNNING and not last}
        for name in [name for name in self.tasks if name not in running]:
            self.bars.remove_task(self.tasks.pop(name))
        for name, row in running.items():
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(name, total=None, text="starting")
            state = row.progress
            if state:
                text = describe("", state)[2:]
                self.bars.update(self.tasks[name], total=state["total"], completed=state["done"], text=text)
        left = remaining(rows, os.cpu_count() or 1)
        passed = time.monotonic() - self.started
        text = f"{len(self.done)}/{len(rows)} jobs, {clock(passed)}" + ("" if last else f", ETA {clock(left)}")
        share = passed / (passed + left) if left else 1.0
        self.bars.update(self.total, completed=share, text=text)
