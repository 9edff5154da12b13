# SPDX-License-Identifier: Apache-2.0
"""Jobs on a SLURM cluster, through submitit: submission, one shared `squeue` for all waiters, honest causes of death.

What a job needs comes from the registry, what the site wants beside it from `pipeline/site.py`. `squeue` is asked
instead of `sacct`, as many clusters have no accounting.
"""

import contextlib
import io
import subprocess
import time
from typing import TYPE_CHECKING, Any

from pipeline import paths, preflight, site
from pipeline.backends import Ticket, prepare
from pipeline.errors import PipelineError
from pipeline.files import Lock, host, read_json, user, write_json
from pipeline.publish import exit_note

if TYPE_CHECKING:
    from pipeline.entry import JobEntry
    from pipeline.registry import Job

QUERY_S = 15.0  # between two squeue calls, of all waiters together
# A job leaves squeue some minutes after its end (MinJobAge), and may not be shown yet right after its submission.
APPEARS_S = 60.0
FINAL = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY REVOKED TIMEOUT".split()  # noqa: SIM905
)
CAUSES = {
    "OUT_OF_MEMORY": "it was killed for using more memory than it asked for",
    "TIMEOUT": "it ran into its time limit",
    "NODE_FAIL": "its node failed",
    "CANCELLED": "it was cancelled",
}


class Slurm:
    """A SLURM cluster whose nodes see this folder."""

    poll_s = 2.0

    def submit(self, job: "Job", entry: "JobEntry") -> dict[str, Any]:
        """Submits a job that SLURM may requeue; it resumes from its checkpoints."""
        import submitit

        settings = site.load()
        preflight.before_submission(settings, job)
        # A waiter that died between sbatch and its ticket leaves a job that only its name recognises.
        name = f"{job.name}@{entry.fingerprint[:8]}"
        lost = self._named(name)
        if lost is not None:
            return {"job_id": lost, "host": host(), "attempt": None}
        wanted = settings.request(job)
        executor = submitit.SlurmExecutor(folder=prepare(job), max_num_timeout=1000, python=wanted.pop("python"))
        executor.update_parameters(job_name=name, **wanted)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
                submitted = executor.submit(entry)
        except submitit.core.utils.FailedJobError as error:
            words = " ".join(str(error).split())[:300]
            raise PipelineError(f"{job.name}: SLURM refused the job: {words}; see {site.SITE}") from error
        return {"job_id": str(submitted.job_id), "host": host()}

    def alive(self, job: "Job", ticket: Ticket) -> bool:
        """By the exit note, else by squeue's word; a scheduler that does not answer ends nothing."""
        if exit_note(job, ticket) is not None:
            return False
        shown = self._queue()
        if shown is None:
            return True
        state = shown.get(ticket["job_id"], {}).get("state")
        if state is None:
            return time.time() - float(ticket.get("submitted", 0)) < APPEARS_S
        return state not in FINAL

    def cancel(self, job: "Job", ticket: Ticket) -> None:
        """scancel: SIGTERM, and SIGKILL after the cluster's KillWait."""
        done = subprocess.run(["scancel", ticket["job_id"]], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PipelineError(f"{job.name}: scancel {ticket['job_id']} failed: {done.stderr.strip()}")

    def cause(self, job: "Job", ticket: Ticket) -> str:
        """By the last state that squeue showed."""
        entry = (self._queue() or {}).get(ticket["job_id"], {})
        state = entry.get("state", "")
        words = CAUSES.get(state, f"it ended as {state}" if state else "it is no longer known to SLURM")
        node = f" on {entry['node']}" if entry.get("node") else ""
        return f"SLURM job {ticket['job_id']}{node}: {words}"

    def where(self, ticket: Ticket) -> str:
        """By job id."""
        return f"SLURM job {ticket['job_id']}"

    def _queue(self) -> dict[str, dict[str, str]] | None:
        """All of the user's jobs, from one squeue call in QUERY_S for all waiters; None when it does not answer."""
        cache = paths.root() / "runs" / ".squeue.json"
        lock = Lock(cache.with_suffix(".lock"))
        with lock.held():
            known = read_json(cache)
            if known is not None and time.time() - known["time"] < QUERY_S:
                jobs: dict[str, dict[str, str]] | None = known["jobs"]
                return jobs
            asked = self._ask()
            # States are kept: SLURM forgets a job some minutes after its end, a waiter may come later.
            jobs = None if asked is None else {**((known or {}).get("jobs") or {}), **asked}
            write_json(cache, {"time": time.time(), "jobs": jobs if jobs is not None else (known or {}).get("jobs")})
            return jobs

    def _ask(self) -> dict[str, dict[str, str]] | None:
        command = ["squeue", "-h", "-r", "-t", "all", "-u", user(), "-o", "%i|%T|%N|%r|%j"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (subprocess.SubprocessError, FileNotFoundError):
            return None
        rows = (line.split("|", 4) for line in done.stdout.splitlines() if line.count("|") >= 4)
        return {row[0]: {"state": row[1], "node": row[2], "reason": row[3], "name": row[4]} for row in rows}

    def _named(self, name: str) -> str | None:
        """The id of a job of this name that is not over."""
        shown = self._ask()
        if shown is None:
            raise PipelineError("launcher slurm: squeue does not answer; try again when the scheduler is back")
        found = [job for job, entry in shown.items() if entry["name"] == name and entry["state"] not in FINAL]
        return found[0] if found else None
