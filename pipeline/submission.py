# SPDX-License-Identifier: Apache-2.0
"""What is asked of SLURM, through submitit: one job, or many as an array.

The ticket of a job is written before sbatch is called, with the name that the job will have: who finds it without a job id knows what to
look for. So a kill between sbatch and its answer costs nothing, nor does an answer that got lost: no job is submitted twice.
"""

import contextlib
import dataclasses
import io
import os
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import attempts, paths, preflight, publish, site, unfinished
from pipeline.backends import prepare, submit_folder
from pipeline.errors import NotYetError, PipelineError
from pipeline.files import Lock, write_json
from pipeline.rendezvous import request
from pipeline.scheduler import passes

if TYPE_CHECKING:
    from pipeline.entry import JobEntry
    from pipeline.manifest import Input
    from pipeline.params import Params
    from pipeline.registry import Job

# As in `backends`, but a file for each start and each task of the job, and none of an earlier start.
ID = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
WITNESS = (
    f'f="$0/{ID}_${{SLURM_PROCID}}_status"; rm -f "$f"; '
    'trap : INT TERM USR1 USR2; "$@"; code=$?; echo $code > "$f"; exit $code'
)


def begin(
    job: "Job", params: "Params", mark: str, inputs: Mapping[str, "Input"], launcher: str
) -> "tuple[JobEntry, dict[str, Any]]":
    """A new attempt at a job: its working folder made ready, what its process needs, and a ticket that has no job yet."""
    from pipeline.entry import JobEntry

    unfinished.check(job, params, mark, inputs)
    folder = paths.job_folder(job)
    folder.mkdir(parents=True, exist_ok=True)
    attempts.close(job)
    for name in (publish.EXIT, "process.json", "progress.json"):
        (folder / name).unlink(missing_ok=True)
    if not (folder / "state.json").exists():
        made_with = unfinished.made_with(job, params, inputs)
        write_json(folder / "state.json", {"fingerprint": mark, "made_with": made_with, "attempts": []})
        paths.log_file(job).unlink(missing_ok=True)
    attempt = uuid.uuid4().hex[:12]
    entry = JobEntry(
        root=str(paths.root()),
        scale=job.scale,
        stage=job.stage,
        axes=tuple(job.axes.items()),
        fingerprint=mark,
        attempt=attempt,
        launcher=launcher,
    )
    ticket = {
        "launcher": launcher,
        "fingerprint": mark,
        "attempt": attempt,
        "submitted": time.time(),
        "job_id": None,
        "minutes": job.resources.minutes,
        "memory": request(job.resources)["mem"],
        "name": f"{job.name}@{attempt[:8]}",
    }
    write_json(folder / "ticket.json", ticket, durable=True)
    return entry, ticket


def settle(job: "Job", ticket: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """The ticket of a job that is submitted. Where it cannot be written, the one without a number stands, by which the job is found."""
    try:
        write_json(paths.job_folder(job) / "ticket.json", {**ticket, **found}, durable=True)
    except OSError as error:
        if ticket["launcher"] != "slurm":
            raise
        raise NotYetError(publish.explain(error, f"{job.name}: is submitted, but")) from error


def hand_over(job: "Job", ticket: Mapping[str, Any], job_id: str) -> None:
    """Puts what a job is to run where its process looks for it: submitit does so after sbatch's answer, which may have been lost.

    The process waits a minute for it. By the attempt that it is of: those of an array lie together, under names that say nothing.
    """
    place = _folder(job, ticket) / f"{job_id}_submitted.pkl"
    for draft in [] if place.exists() else place.parent.glob("*.pkl"):
        if ticket["attempt"].encode() in draft.read_bytes():
            draft.replace(place)
            return


@contextlib.contextmanager
def submitting(job: "Job") -> Any:
    """Held by the process that calls sbatch, and freed by the kernel when it dies: until then the ticket may still be settled."""
    with Lock(paths.lock_file(job, "submit")).held():
        yield


def leave_job() -> None:
    """Within a job of SLURM, such as a shell on a node: what was granted to that one would be asked for again."""
    if "SLURM_JOB_ID" in os.environ:
        for known in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_")) and key != "SLURM_CONF"]:
            del os.environ[known]


def sbatch(job: "Job", entries: Sequence["JobEntry"], name: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Submits one job, or several that ask for the same as `job` as an array into `folder`; what a ticket needs of each.

    Raises `NotYetError` where it will work later, and `PipelineError` with SLURM's words if it never will.
    """
    import submitit

    leave_job()
    settings = site.load()
    preflight.before_submission(settings, job)
    wanted = settings.request(job)
    folder = prepare(job, folder)
    witness = shlex.join(["sh", "-c", WITNESS, str(folder)])
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1000, python=f"{witness} {wanted.pop('python')}")
    executor.update_parameters(job_name=name, **wanted)
    limit_s = 60.0 * wanted["time"]
    work = [dataclasses.replace(entry, limit_s=limit_s, signal_s=float(wanted["signal_delay_s"])) for entry in entries]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            submitted = executor.submit_array(work)
    except submitit.core.utils.FailedSubmissionError as error:
        # It has answered, but with no number: a wrapper of the site's, perhaps.
        raise NotYetError(f"sbatch did not say which job it made: {said(str(error))}") from error
    except submitit.core.utils.FailedJobError as error:
        words = said(str(error))
        if passes(words):
            raise NotYetError(words) from error
        raise PipelineError(f"{job.name}: SLURM refused the job: {words}; see {site.SITE}") from error
    return [{"job_id": str(one.job_id), "folder": paths.relative(folder)} for one in submitted]


def said(words: str) -> str:
    """What sbatch said, of what submitit makes of it."""
    lines = [line.strip().removeprefix("sbatch: ").removeprefix("error: ") for line in words.splitlines()]
    told = [line for line in lines if line and not line.startswith(("subprocess", "Command"))]
    return " ".join(" ".join(told).split())[:300]


def output(job: "Job", ticket: Mapping[str, Any]) -> Path:
    """What a submitted job says outside its own log: submitit's words, SLURM's, and those of a process that dies before it has a log."""
    folder = _folder(job, ticket)
    if ticket.get("job_id") is not None and ticket.get("launcher") == "slurm":
        return folder / f"{ticket['job_id']}_0_log.out"
    return next(iter(sorted(folder.glob("*_log.out"))), folder / "log.out")


def _folder(job: "Job", ticket: Mapping[str, Any]) -> Path:
    """Where submitit's files of a job are: its own, or its array's."""
    return paths.root() / ticket["folder"] if ticket.get("folder") else submit_folder(job)
