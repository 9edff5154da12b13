# SPDX-License-Identifier: Apache-2.0
"""Jobs on a SLURM cluster, through submitit: submission, one shared `squeue` for all waiters, honest causes of death.

Site settings are in `cluster/slurm/site.yaml` (or the environment: SCM_SLURM_PARTITION and so on). What a job needs
comes from the registry. `squeue` is asked instead of `sacct`, as many clusters have no accounting.
"""

import contextlib
import io
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.backends import Ticket, prepare
from pipeline.errors import PipelineError, suggestion
from pipeline.files import Lock, host, read_json, user, write_json
from pipeline.publish import exit_note
from pipeline.rendezvous import request

if TYPE_CHECKING:
    from pipeline.entry import JobEntry
    from pipeline.registry import Job

SITE = "cluster/slurm/site.yaml"
SETTINGS = ("partition", "account", "qos", "constraint", "setup")
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


def site() -> dict[str, Any]:
    """The site's settings, validated; the environment wins over the file."""
    import yaml

    file = paths.root() / SITE
    values: dict[str, Any] = {}
    if file.exists():
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise PipelineError(f"{SITE}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise PipelineError(f"{SITE}: must hold keys with values, such as 'partition: gpu'")
    for key in values:
        if key not in SETTINGS:
            raise PipelineError(f"{SITE}: {key}: unknown key; {suggestion(key, SETTINGS, 'keys')}")
    if not isinstance(values.get("setup", []), list):
        raise PipelineError(f"{SITE}: setup: must be a list of shell lines")
    for key in SETTINGS[:-1]:
        named = os.environ.get(f"SCM_SLURM_{key.upper()}")
        if named:
            values[key] = named
    return {key: value for key, value in values.items() if value not in (None, "")}


class Slurm:
    """A SLURM cluster whose nodes see this folder."""

    poll_s = 2.0

    def submit(self, job: "Job", entry: "JobEntry") -> dict[str, Any]:
        """Submits a job that SLURM may requeue; it resumes from its checkpoints."""
        import submitit

        settings = site()
        for program in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise PipelineError(f"launcher slurm: {program} is not on the PATH; run this on a login node")
        # A waiter that died between sbatch and its ticket leaves a job that only its name recognises.
        name = f"{job.name}@{entry.fingerprint[:8]}"
        lost = self._named(name)
        if lost is not None:
            return {"job_id": lost, "host": host(), "attempt": None}
        executor = submitit.SlurmExecutor(folder=prepare(job), max_num_timeout=1000)
        executor.update_parameters(
            job_name=name,
            time=job.resources.minutes,
            stderr_to_stdout=True,
            signal_delay_s=90,
            additional_parameters={"requeue": True},
            **request(job.resources),
            **settings,
        )
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
                submitted = executor.submit(entry)
        except submitit.core.utils.FailedJobError as error:
            words = " ".join(str(error).split())[:300]
            raise PipelineError(f"{job.name}: SLURM refused the job: {words}; see {SITE}") from error
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
