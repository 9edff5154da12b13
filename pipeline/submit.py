# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline submit STAGE [axis=value …]`: all jobs of a stage whose inputs are there, as arrays of SLURM jobs.

One array for all that ask for the same, instead of one job for each waiter that an engine starts: kinder to the scheduler where there are
hundreds. Nothing waits here; whoever runs a job next, Snakemake or `run`, attaches to it by its ticket and publishes it.
"""

import contextlib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import manifest, paths, publish, registry, site
from pipeline.children import deferred_signals, in_child
from pipeline.cli import Parser, axis_values
from pipeline.errors import NotYetError, PipelineError
from pipeline.files import Lock, canonical, host, is_locked, read_json, write_json
from pipeline.params import PARAMS_FILE, Params, load

if TYPE_CHECKING:
    from pipeline.entry import JobEntry
    from pipeline.registry import Job


def main(argv: Sequence[str]) -> int:
    """Submits what is ready; says what, and what is left out."""
    parser = Parser(prog="python -m pipeline submit", description=__doc__)
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("axes", metavar="axis=value", nargs="*", help="only jobs with these; and scale=…")
    options = parser.parse_intermixed_args(list(argv))
    registry.stage_named(options.stage)
    axes = axis_values(options.axes)
    params = load(paths.root() / PARAMS_FILE, axes.pop("scale", None))
    jobs = [
        job for job in registry.jobs(params) if job.stage == options.stage and axes.items() <= dict(job.axes).items()
    ]
    if not jobs:
        registry.find(params, options.stage, axes)  # says which word is wrong
        raise PipelineError(f"{options.stage}: no job of scale {params.scale} has {' '.join(options.axes)}")
    sweep(params.scale, options.stage)
    counts = submit(jobs, params)
    print(", ".join(f"{count} {words}" for words, count in counts.items() if count))
    return 0


def submit(jobs: Sequence["Job"], params: Params) -> dict[str, int]:
    """Submits those of the jobs that are ready; returns how many there are of each kind."""
    settings = site.load()
    counts = {"submitted": 0, "done already": 0, "submitted or running already": 0, "lack an input": 0}
    groups: dict[str, list[tuple[Job, str, dict[str, manifest.Input]]]] = {}
    with contextlib.ExitStack() as locks:
        for job in jobs:
            try:
                inputs = manifest.verify_inputs(job)
            except PipelineError as error:
                print(error, file=sys.stderr)
                counts["lack an input"] += 1
                continue
            mark = manifest.fingerprint(job, params, inputs)
            if publish.published(job, mark):
                counts["done already"] += 1
                continue
            lock = Lock(paths.lock_file(job, "ticket"))
            if not lock.acquire(wait=False):  # somebody is just submitting it
                counts["submitted or running already"] += 1
                continue
            locks.callback(lock.release)
            if _taken(job, mark):
                counts["submitted or running already"] += 1
                continue
            groups.setdefault(canonical(settings.request(job)), []).append((job, mark, inputs))
        for group in groups.values():
            with deferred_signals() as late:
                counts["submitted"] += _array(group, params)
            if late:
                raise KeyboardInterrupt(late[0])
    return counts


def sweep(scale: str, stage: str) -> None:
    """Removes what submitit keeps of arrays whose jobs are all published."""
    work = paths.runs(scale) / ".work"
    tickets = [read_json(file) or {} for file in work.glob("*/ticket.json")]
    if any("job_id" in ticket and ticket["job_id"] is None for ticket in tickets):
        return  # of an array that is just being submitted, perhaps
    used = {Path(ticket.get("folder") or "").name for ticket in tickets}
    for folder in work.glob(f"{stage}-*.submitit"):
        if re.fullmatch(rf"{re.escape(stage)}-[0-9a-f]{{8}}\.submitit", folder.name) and folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def _taken(job: "Job", mark: str) -> bool:
    """Whether the job is staged, runs, or has a ticket that may still stand for something: its waiter will sort that out."""
    from pipeline.slurm import Slurm
    from pipeline.status import active
    from pipeline.submission import settle

    ticket = read_json(paths.job_folder(job) / "ticket.json")
    if ticket is not None and ticket["launcher"] == "slurm" and ticket.get("job_id") is None:
        try:
            found = Slurm().find(job, ticket)
        except NotYetError as error:
            print(error, file=sys.stderr)
            return True
        if found is None:  # sbatch was never called, or refused
            (paths.job_folder(job) / "ticket.json").unlink()
        else:
            settle(job, ticket, found)
    # In this order: what ends between two of the looks has staged its result by then.
    return is_locked(paths.lock_file(job, "run")) or active(job) is not None or publish.staged(job, mark)


def _array(group: Sequence[tuple["Job", str, dict[str, manifest.Input]]], params: Params) -> int:
    """One array; the tickets are there before it is, under a name by which each finds its job should this process be killed."""
    from pipeline.submission import begin, sbatch, settle, submitting

    begun: list[tuple[Job, JobEntry, dict[str, Any]]] = []

    def call() -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            for job, _, _ in begun:
                stack.enter_context(submitting(job))
            found = sbatch(first, [entry for _, entry, _ in begun], name, folder)
            for (job, _, ticket), one in zip(begun, found, strict=True):
                settle(job, ticket, {"host": host(), **one})
        return {"first": found[0]["job_id"], "last": found[-1]["job_id"]}

    try:
        for job, mark, inputs in group:
            entry, ticket = begin(job, params, mark, inputs, "slurm")
            begun.append((job, entry, ticket))
        first, attempt = begun[0][0], begun[0][1].attempt
        name = begun[0][2]["name"] if len(begun) == 1 else f"{first.stage}@{attempt[:8]}"
        folder = paths.runs(first.scale) / ".work" / f"{first.stage}-{attempt[:8]}.submitit"
        for index, (job, _, ticket) in enumerate(begun):
            place = {"name": name, "index": index if len(begun) > 1 else None, "folder": paths.relative(folder)}
            ticket |= place
            write_json(paths.job_folder(job) / "ticket.json", ticket, durable=True)
        found = in_child(call)
    except NotYetError:
        raise  # the tickets stay: what sbatch has said may not be what it has done
    except PipelineError:
        for job, _, _ in begun:
            (paths.job_folder(job) / "ticket.json").unlink(missing_ok=True)
        raise
    print(f"{first.stage}: {len(begun)} submitted as SLURM job {found['first']} to {found['last']}", flush=True)
    return len(begun)
