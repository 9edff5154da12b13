# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline watch` without a command: what runs now, how far it is, what waits and what failed, whoever started it.

Only small files are read (locks, tickets, progress), so it may be opened and closed at any time, as often as one likes: Ctrl-C ends the
display, no job. It ends by itself when everything is done. In a terminal a table is redrawn; elsewhere lines are printed when a job's state
changes, and every quarter of a minute for each job that runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.cli import Parser
from pipeline.errors import PipelineError
from pipeline.files import is_locked, read_json
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.progress import clock, shown
from pipeline.status import DONE, FAILED, QUEUED, RUNNING, STALE, WAITING, Row, counted, survey, time_left

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REFRESH_SECONDS, MOST_SECONDS = 2.0, 3600.0  # between two looks
LINE_SECONDS = 15.0
SILENT_SECONDS = 300.0  # without a sign of progress, after which the table says so
NAMED = 6  # jobs that wait, by name; of the others the number
LISTED = (RUNNING, QUEUED, FAILED)  # states whose jobs have a line each
COLORS = {RUNNING: "green", QUEUED: "cyan", FAILED: "bold red"}


@dataclass(frozen=True)
class Line:
    """One job of the table."""

    name: str
    state: str
    share: float | None
    """How much of it is done, from 0 to 1."""
    done: str
    """1200/2500 it, and the rate."""
    left: str
    """0:27"""
    what: str
    """The last scalars, or why it failed."""
    where: str
    """Launcher and job id, or the log of a job that failed."""

    def text(self) -> str:
        """In one line."""
        share = "" if self.share is None else f"{self.share:4.0%}"
        left = f"ETA {self.left}" if self.left else ""
        return f"{self.name}  {self.state}  {', '.join(part for part in (share, self.done, left, self.what, self.where) if part)}".rstrip()


@dataclass(frozen=True)
class View:
    """One scale as it stands."""

    head: str
    lines: Sequence[Line]
    rest: Sequence[str]
    """Sentences below: what waits, what is to be made again."""
    rows: Sequence[Row]

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return all(row.state == DONE for row in self.rows)

    @property
    def failed(self) -> bool:
        """Whether a job has failed."""
        return any(row.state == FAILED for row in self.rows)


def main(argv: Sequence[str]) -> int:
    """Shows the runs until everything is done, or Ctrl-C; with `--once` exit status 1 when a job has failed."""
    parser = Parser(prog="python -m pipeline watch", description=__doc__)
    parser.add_argument("--scale", help="default: that of params.yaml, and those of which jobs run now")
    parser.add_argument("--once", action="store_true", help="show it once and end; exit status 1 when a job has failed")
    parser.add_argument(
        "--interval", type=float, default=REFRESH_SECONDS, help="seconds between two looks (default: %(default)g)"
    )
    parser.add_argument(
        "--cores", type=int, default=os.cpu_count() or 1, help="for the time left; default: this machine's"
    )
    options = parser.parse_args(list(argv))
    if not 0 < options.interval <= MOST_SECONDS:
        raise PipelineError(
            f"watch: --interval {options.interval:g}: must be > 0 and at most {MOST_SECONDS:g}; leave it out for {REFRESH_SECONDS:g}"
        )
    if options.cores < 1:
        raise PipelineError(f"watch: --cores {options.cores}: must be at least 1; leave it out for this machine's")
    look = Looker(options.scale, options.cores)
    views = look()
    table = sys.stdout.isatty() and os.environ.get("SCM_PROGRESS") != "plain" and os.environ.get("TERM") != "dumb"
    if options.once:
        if table:
            console = _console()
            console.print(drawn(views, console.height))
        else:
            print_views(views)
        return 1 if any(view.failed for view in views) else 0
    try:
        _draw(look, views, options.interval) if table else _print(look, views, options.interval)
    except KeyboardInterrupt:
        print("the display ended; jobs go on" if any(_alive(view) for view in views) else "the display ended")
    return 0


def _alive(view: View) -> bool:
    return any(row.state in (RUNNING, QUEUED) for row in view.rows)


class Looker:
    """Looks at the scales each time that it is called; params.yaml is read again when it was changed."""

    def __init__(self, scale: str | None, cores: int) -> None:
        self.scale, self.cores = scale, cores
        self._read: tuple[int, Params] = self._load()
        self.trouble = ""

    def __call__(self) -> list[View]:
        params = self._params()
        views = []
        for scale in [self.scale] if self.scale else scales(params):
            of_scale = params if scale == params.scale else params.with_scale(scale)
            views.append(view(of_scale, survey(of_scale), self.cores, self.trouble))
        return views

    def _load(self) -> tuple[int, Params]:
        file = paths.root() / PARAMS_FILE
        return file.stat().st_mtime_ns, load(file, self.scale)

    def _params(self) -> Params:
        """The parameters as they are now; as they were before while the file is being edited and makes no sense."""
        try:
            if (paths.root() / PARAMS_FILE).stat().st_mtime_ns != self._read[0]:
                self._read = self._load()
            self.trouble = ""
        except (PipelineError, OSError) as error:
            self.trouble = f"as params.yaml was before: {error}"
        return self._read[1]


def scales(params: Params) -> list[str]:
    """The active scale, after those others of which a job runs now."""
    others = [name for name in params.scales if name != params.scale]
    return [
        *(name for name in others if any(map(is_locked, (paths.runs(name) / ".work").glob("*.run.lock")))),
        params.scale,
    ]


def view(params: Params, rows: Sequence[Row], cores: int, trouble: str = "") -> View:
    """What is shown of a scale."""
    left = time_left(params, rows, cores)
    head = f"scale {params.scale}: {counted(rows)}" + (f"; {left}" if left else "")
    now = [line_of(row) for state in LISTED for row in rows if _state(row) == state]
    rest = [trouble] if trouble else []
    for state, words in ((WAITING, "waiting"), (STALE, "to be made again")):
        names = [row.job.name for row in rows if row.state == state]
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            rest.append(f"{words}: {', '.join(names[:NAMED])}{more}")
    return View(head, now, rest, rows)


def _state(row: Row) -> str:
    """A job on another machine whose lock cannot be seen from here runs if it shows progress."""
    fresh = row.progress and time.time() - row.progress.get("updated", 0) < SILENT_SECONDS
    return RUNNING if row.state == QUEUED and fresh else row.state


def line_of(row: Row) -> Line:
    """One job that runs, is queued or has failed."""
    state = _state(row)
    if state == FAILED:
        return Line(row.job.name, state, None, "", "", row.detail, paths.relative(paths.log_file(row.job)))
    progress = row.progress
    if not progress:
        what = "in the queue" if state == QUEUED else "starting"
        return Line(row.job.name, state, None, "", "", what, _where(row.job))
    unit, rate, total = progress["unit"], progress.get("rate"), progress["total"]
    done = f"{progress['done']}/{total} {unit}"
    if rate:
        done += f", {rate:.3g} {unit}/s" if rate < 100 else f", {rate:.0f} {unit}/s"
    words = shown(progress.get("scalars", {}))
    silence = time.time() - progress.get("updated", time.time())
    if silence > SILENT_SECONDS:
        words.append(f"no news for {clock(silence)}")
    share = progress["done"] / total if total else None
    return Line(row.job.name, state, share, done, clock(progress.get("eta_s")), ", ".join(words), _where(row.job))


def _where(job: Job) -> str:
    """Who runs a job: its launcher, with the number that the launcher gave it."""
    folder = paths.job_folder(job)
    known: Mapping[str, Any] = read_json(folder / "process.json") or read_json(folder / "ticket.json") or {}
    launcher, number = known.get("launcher", ""), known.get("job_id", "")
    node = f" on {known['host']}" if launcher == "slurm" and known.get("host") and known.get("pid") else ""
    return f"{launcher} {number}".strip() + node


def print_views(views: Sequence[View]) -> None:
    """The same as text."""
    for one in views:
        print(one.head)
        for line in (*(line.text() for line in one.lines), *one.rest):
            print(f"  {line}")
    sys.stdout.flush()


def _print(look: Looker, views: Sequence[View], interval: float) -> None:
    """Everything once, then what changes."""
    print_views(views)
    printed = time.monotonic()
    while not all(one.over for one in views):
        time.sleep(interval)
        before = {(row.job.scale, row.job.name): row.state for one in views for row in one.rows}
        views = look()
        due = time.monotonic() - printed >= LINE_SECONDS
        printed = time.monotonic() if due else printed
        for one in views:
            lines = {line.name: line for line in one.lines}
            for row in one.rows:
                line, changed = lines.get(row.job.name), before.get((row.job.scale, row.job.name)) != row.state
                if line is not None and (changed or (due and line.state == RUNNING)):
                    print(line.text())
                elif changed:
                    print(f"{row.job.name}  {row.state}  {row.detail}".rstrip())
        sys.stdout.flush()
    for one in views:
        print(one.head, flush=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _draw(look: Looker, views: Sequence[View], interval: float) -> None:
    """A table that is redrawn in its place."""
    from rich.live import Live

    console = _console()
    with Live(drawn(views, console.height), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while not all(one.over for one in views):
            time.sleep(interval)
            views = look()
            live.update(drawn(views, console.height), refresh=True)


def drawn(views: Sequence[View], height: int) -> RenderableType:
    """The table of each scale, with as many jobs as fit on the screen."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    room = max(3, height // len(views) - 6)
    for one in views:
        parts.append(Text(one.head, style="bold"))
        if one.lines:
            table = Table(box=None, pad_edge=False, header_style="dim")
            table.add_column("job", no_wrap=True)
            table.add_column("state", no_wrap=True)
            table.add_column("", width=12)
            table.add_column("done", no_wrap=True)
            table.add_column("ETA", justify="right", no_wrap=True)
            table.add_column("now", ratio=1)
            table.add_column("where", style="dim")
            for line in one.lines[:room]:
                bar = "" if line.share is None else ProgressBar(total=1.0, completed=line.share, width=12)
                state = Text(line.state, style=COLORS.get(line.state, ""))
                table.add_row(line.name, state, bar, line.done, line.left, Text(line.what), Text(line.where))
            parts.append(table)
            if len(one.lines) > room:
                parts.append(Text(f"and {len(one.lines) - room} more", style="dim"))
        parts += [Text(sentence, style="dim") for sentence in one.rest]
    parts.append(Text(f"{time.strftime('%H:%M:%S')}, Ctrl-C ends this display only", style="dim"))
    return Group(*parts)
