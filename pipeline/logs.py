# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline logs STAGE axis=value …`: where a job's log is, and its end; with --follow also what it says from now on.

STAGE may also be a job's name, as `status` shows it, or the number of a SLURM job.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.cli import Parser, axis_values
from pipeline.errors import PipelineError
from pipeline.files import read_json

if TYPE_CHECKING:
    from pipeline.registry import Job

TAIL_LINES = 15
FOLLOW_S = 0.5


def tail(log: "os.PathLike[str]", lines: int = TAIL_LINES, whole: bool = False) -> list[str]:
    """The last lines of a log, up to where a traceback starts (the sentence for the user has its gist) unless the `whole` is wanted."""
    size = max(16384, 200 * lines)
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.path.getsize(log) - size))
            text = f.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    if not whole:
        text = text.partition("Traceback (most recent call last):")[0]
    return text.splitlines()[-lines:]


def source(job: "Job", ticket: Mapping[str, Any] | None) -> Path:
    """Where a job has said its last: in its log, or if it died before it came to it, where submitit and SLURM write."""
    from pipeline.submission import output

    log = paths.log_file(job)
    process = read_json(paths.job_folder(job) / "process.json") or {}
    if ticket is None or (process.get("attempt") == ticket.get("attempt") and log.exists()):
        return log
    other = output(job, ticket)
    return other if other.exists() else log


def last_words(job: "Job", ticket: Mapping[str, Any]) -> str:
    """For the end of an error: which log, and the last lines of it."""
    log = source(job, ticket)
    lines = tail(log)
    where = f"log: {paths.relative(log)}" if lines else "it wrote no log"
    return f" ({where})" + "".join(f"\n  | {line}" for line in lines)


def main(argv: Sequence[str]) -> int:
    """Prints the log's place on stderr and its end on stdout."""
    parser = Parser(prog="python -m pipeline logs", description=__doc__)
    parser.add_argument("stage", metavar="STAGE", help="a stage, a job's name, or the number of a SLURM job")
    parser.add_argument("axes", metavar="axis=value", nargs="*")
    parser.add_argument("-n", "--lines", type=int, default=50, help="of the end (default: %(default)s)")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job ends")
    options = parser.parse_intermixed_args(list(argv))
    if options.lines < 1:
        raise PipelineError(f"-n: expected a number above 0, got {options.lines}")
    job = find(options.stage, axis_values(options.axes))
    ticket = read_json(paths.job_folder(job) / "ticket.json")
    log = source(job, ticket)
    going = _state(job, ticket)
    if not log.exists() and not (options.follow and going):
        state = "is submitted and has not started" if going else "has not run, or ran in a terminal"
        raise PipelineError(f"{job.name}: no log yet in {paths.relative(log)}: it {state}")
    print(f"{job.name}{going}: {paths.relative(log)}", file=sys.stderr, flush=True)
    for line in tail(log, options.lines, whole=True):
        print(line)
    if options.follow:
        follow(job, log)
    return 0


def find(word: str, axes: dict[str, str]) -> "Job":
    """The job that is meant; PipelineError if there is none."""
    from pipeline import registry
    from pipeline.params import PARAMS_FILE, load

    params = load(paths.root() / PARAMS_FILE, axes.pop("scale", None))
    if not axes:
        name = word
        if word.replace("_", "").isdigit():
            tickets = {
                file.parent.name: read_json(file) for file in paths.runs(params.scale).glob(".work/*/ticket.json")
            }
            mine = [job for job, ticket in tickets.items() if str((ticket or {}).get("job_id")) == word]
            records = paths.runs(params.scale).glob(".records/*.json")
            mine += [file.stem for file in records if str((read_json(file) or {}).get("job_id")) == word]
            if not mine:
                raise PipelineError(
                    f"{word}: no job of scale {params.scale} has this number in SLURM; see `python -m pipeline status`"
                )
            name = mine[0]
        for job in registry.jobs(params):
            if job.name == name:
                return job
    return registry.find(params, word, axes)


def follow(job: "Job", log: Path) -> None:
    """Prints what is added to a job's log until the job has ended. Where it dies before it has one, submitit's words are followed."""
    from pipeline.status import active

    place = log.stat().st_size if log.exists() else 0
    while True:
        going = active(job) is not None
        now = source(job, read_json(paths.job_folder(job) / "ticket.json"))
        if now != log:
            log, place = now, 0
        if log.exists():
            with log.open("rb") as f:
                place = min(place, log.stat().st_size)  # begun anew
                f.seek(place)
                new = f.read()
            place += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()
        if not going:
            return
        time.sleep(FOLLOW_S)


def _state(job: "Job", ticket: Mapping[str, Any] | None) -> str:
    from pipeline.status import active, place

    state = active(job)
    if state is None:
        return ""
    where = place(job, ticket)
    return f" ({state}{': ' if where else ''}{where})"
