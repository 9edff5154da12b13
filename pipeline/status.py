# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline status`: what is done, running (with rate and ETA), waiting, failed or stale."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline import attempts, paths, registry
from pipeline.cli import Parser
from pipeline.done import CHANGED, OUTDATED, states
from pipeline.files import is_alive, is_locked, read_json
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.plan import duration, estimate, longest_path, makespan
from pipeline.progress import describe
from pipeline.publish import RESULT, exit_note

DONE, RUNNING, QUEUED, WAITING, FAILED, STALE = "done", "running", "queued", "waiting", "failed", "stale"
STATES = (DONE, RUNNING, QUEUED, WAITING, FAILED, STALE)


@dataclass(frozen=True)
class Row:
    """One job as it stands."""

    job: Job
    state: str
    detail: str
    left_s: float
    """Expected seconds until it is done; 0 for a job that is."""
    progress: dict[str, Any] = field(default_factory=dict)


def survey(params: Params, jobs: Sequence[Job] | None = None) -> list[Row]:
    """Every job of the active scale, in topological order; reads small files only."""
    everything = registry.jobs(params) if jobs is None else jobs
    made = states(everything, params)
    return [_row(job, params, made[job.name]) for job in everything]


def active(job: Job) -> str | None:
    """Whether a job runs or is submitted now, by its lock, its process and its ticket."""
    if is_locked(paths.lock_file(job, "run")):
        return RUNNING
    ticket = read_json(paths.job_folder(job) / "ticket.json")
    note = None if ticket is None else exit_note(job, ticket)
    if ticket is None or (note is not None and not (note["status"] == "stopped" and ticket["launcher"] == "slurm")):
        return None
    if ticket["launcher"] == "slurm":
        return QUEUED if in_slurm(job, ticket) else None
    return QUEUED if is_alive(ticket) else None


def in_slurm(job: Job, ticket: Mapping[str, Any]) -> bool:
    """Whether SLURM has the job, or is about to; by the look at the queue that all who wait share."""
    from pipeline.slurm import Slurm

    return ticket.get("job_id") is None or Slurm().alive(job, ticket)


def place(job: Job, ticket: Mapping[str, Any] | None) -> str:
    """Where a job of the cluster is: `SLURM job 12 on n1`, `SLURM job 12 waits in the queue (Resources)`; empty for others."""
    from pipeline.slurm import Slurm

    if ticket is None or ticket["launcher"] != "slurm":
        return ""
    if ticket.get("job_id") is None:
        return "being submitted"
    slurm = Slurm()
    return slurm.queued(ticket) or slurm.where(ticket)


def _row(job: Job, params: Params, made: str) -> Row:
    folder = paths.job_folder(job)
    running = active(job)
    expected = 0.0 if made == DONE and not running else estimate(job, params).seconds
    if running:
        progress = read_json(folder / "progress.json") or {}
        tries = attempts.read(job)
        passed = time.time() - tries[-1]["started"] if tries else 0.0
        left = progress.get("eta_s") if progress else None
        detail = describe("", progress)[2:] if progress else "starting"
        if at := place(job, read_json(folder / "ticket.json")):
            then = "; goes on from its checkpoint" if tries else ""
            detail = f"{detail} ({at})" if running == RUNNING else f"{at}{then}"
        return Row(job, running, detail, max(0.0, expected - passed) if left is None else left, progress)
    if made == DONE:
        seconds = (read_json(paths.record_file(job)) or {}).get("seconds")
        return Row(job, DONE, "" if seconds is None else f"took {duration(seconds)}", 0.0)
    if (folder / RESULT).exists():
        return Row(job, WAITING, "computed; the next run publishes it", 1.0)
    note = read_json(folder / "exit.json")
    if note is not None and note["status"] == "error":
        return Row(job, FAILED, note["message"].removeprefix(f"{job.name}: "), expected)
    if note is None and (folder / "process.json").exists():
        return Row(job, FAILED, "its process died without a word; the next run resumes it", expected)
    if made == OUTDATED:
        return Row(job, STALE, "made with other parameters or inputs", expected)
    if made == CHANGED:
        why = "reports/ holds those of another scale, or they were changed" if job.is_report else "changed or damaged"
        return Row(job, STALE, f"its files are not those that it made: {why}", expected)
    resumes = (folder / "state.json").exists() and any((folder / "work").glob("*"))
    return Row(job, WAITING, "resumes from its checkpoint" if resumes else "", expected)


def remaining(rows: Sequence[Row], cores: int) -> float:
    """Seconds until everything is done on this many cores."""
    left = [row for row in rows if row.state != DONE]
    return makespan([row.job for row in left], {row.job.name: row.left_s for row in left}, cores)


def counted(rows: Sequence[Row]) -> str:
    """`23 jobs: 12 done, 1 running, 10 waiting`."""
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    return f"{len(rows)} jobs: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}"


def time_left(params: Params, rows: Sequence[Row], cores: int) -> str:
    """How long what is left will take, in words; '' when nothing is left."""
    if all(row.state == DONE for row in rows):
        return ""
    if params.active.hardware is None:
        return f"about {duration(remaining(rows, cores))} left on {cores} core{'s' * (cores > 1)}"
    left = {row.job.name: row.left_s for row in rows}
    return f"at least {duration(longest_path([row.job for row in rows], left)[0])} left, on as many GPUs as are wanted at once"


def main(argv: Sequence[str]) -> int:
    """Prints the table; exit status 1 when a job has failed."""
    parser = Parser(prog="python -m pipeline status", description=__doc__)
    parser.add_argument("--scale", help="default: that of params.yaml")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="default: those of this machine")
    parser.add_argument(
        "--replay", action="store_true", help="first send what the tracking store missed, and mark runs that died"
    )
    options = parser.parse_args(list(argv))
    params = load(paths.root() / PARAMS_FILE, options.scale)
    code = _replay() if options.replay else 0
    rows = survey(params)
    width = max((len(row.job.name) for row in rows), default=0)
    for row in rows:
        print(f"{row.job.name:{width}}  {row.state:8} {row.detail}".rstrip())
    print(f"\nscale {params.scale}: {counted(rows)}")
    if left := time_left(params, rows, max(1, options.cores)):
        print(left)
    pending = sum(map(_pending, (paths.runs(params.scale) / ".lineage").glob("*/run.json")))
    if pending:
        words = "run has records or an end" if pending == 1 else "runs have records or an end"
        print(f"{pending} {words} that the tracking store has not got: python -m pipeline status --replay")
    return 1 if any(row.state == FAILED for row in rows) else code


def _pending(file: Path) -> bool:
    """Whether the store misses something of the journal beside this run.json, and no job is about to send it."""
    from pipeline.lineage import died, unsent

    header, folder = read_json(file), file.parent
    if header is None or not (unsent(folder) or died(folder)):
        return False
    job = SimpleNamespace(scale=header["scale"], name=header["job"])
    return folder.name != header["job"] or not is_locked(paths.lock_file(job, "run"))


def _replay() -> int:
    from pipeline.replay import replay
    from pipeline.tracking import uri

    try:
        lines = replay()
    except Exception as error:
        # Whatever a store that is away makes its client raise: one sentence, and the records stay.
        words = " ".join(str(error).split())[:200]
        print(f"error: {uri()}: the tracking store does not answer ({words}); try again later", file=sys.stderr)
        return 1
    for line in lines:
        print(line)
    print(f"tracking store: {len(lines)} runs brought up to date\n")
    return 0
