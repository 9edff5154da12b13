# SPDX-License-Identifier: Apache-2.0
"""Where jobs run besides this process: a local job process, or a SLURM cluster; both through submitit.

A backend submits, says whether a job still runs, cancels it and, when a job died without a word, says how.
submitit's own result and state calls are not used: its result file is a pickle, and without SLURM's accounting it
waits for ever for a job that died hard.
"""

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pipeline
from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.files import host, identify, is_alive, is_locked, read_json, start_time

if TYPE_CHECKING:
    from pipeline.entry import JobEntry
    from pipeline.registry import Job

Ticket = Mapping[str, Any]
GRACE_S = 10.0
# The time limit of a local job is only there because submitit wants one; nobody else waits for this machine.
LOCAL_MINUTES = 60 * 24 * 30

# The shell between submitit's controller and Python notes how Python ended: nobody else sees the signal of a job whose
# waiter has died. It must outlive the signals that the controller passes on.
_WITNESS = 'trap : INT TERM USR1 USR2; "$@"; code=$?; echo $code > "$0"; exit $code'


class Backend(Protocol):
    """A place where jobs run."""

    poll_s: float
    line_s: float
    """Seconds between two lines about its progress."""

    def submit(self, job: "Job", entry: "JobEntry") -> dict[str, Any]:
        """Starts the job; returns what recognises it later (JSON)."""

    def alive(self, job: "Job", ticket: Ticket) -> bool:
        """Whether the job may still do something."""

    def cancel(self, job: "Job", ticket: Ticket) -> None:
        """Stops the job, gently first."""

    def cause(self, job: "Job", ticket: Ticket) -> str:
        """How a job ended that left no word."""

    def where(self, ticket: Ticket) -> str:
        """The job in words, such as `process 1234`."""

    def queued(self, ticket: Ticket) -> str:
        """How it waits for its turn, in words; empty if it does not."""

    def find(self, job: "Job", ticket: Ticket) -> dict[str, Any] | None:
        """What became of a submission that a kill has cut off; None: nothing. `NotYetError` while that cannot be known."""

    def again(self, job: "Job", ticket: Ticket) -> bool:
        """Whether the job has ended, unfinished, by no fault of its own: it should be submitted once more."""


def submit_folder(job: paths.JobName) -> Path:
    """Where submitit keeps its files of a job: beside the working folder, which is removed while it still writes."""
    return paths.runs(job.scale) / ".work" / f"{job.name}.submitit"


def prepare(job: "Job", folder: Path | None = None) -> Path:
    """An empty folder for submitit (default: the job's), and the environment that the job's process inherits."""
    folder = folder or submit_folder(job)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    from pipeline.execute import set_threads

    # submitit's process imports numpy before our code runs, and numeric libraries read these when they are loaded.
    set_threads(job.resources.threads_each)
    home = str(Path(pipeline.__file__).resolve().parents[1])
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != home]
    os.environ["PYTHONPATH"] = os.pathsep.join([home, *known])
    return folder


class Local:
    """A process of this machine that outlives the one that waits for it."""

    poll_s = 0.2
    line_s = 15.0

    def submit(self, job: "Job", entry: "JobEntry") -> dict[str, Any]:
        """Starts submitit's controller, which starts the job's process."""
        import submitit

        folder = prepare(job)
        witness = ["sh", "-c", _WITNESS, str(folder / "status"), sys.executable]
        executor = submitit.LocalExecutor(folder=folder, python=shlex.join(witness), max_num_timeout=100)
        executor.update_parameters(
            timeout_min=LOCAL_MINUTES, gpus_per_node=job.resources.gpus, stderr_to_stdout=True, signal_delay_s=60
        )
        submitted = executor.submit(entry)
        return {"job_id": submitted.job_id, **identify(int(submitted.job_id))}

    def alive(self, job: "Job", ticket: Ticket) -> bool:
        """By pid and start time; for a job of another machine by the lock that a running job holds."""
        if ticket.get("host") != host():
            return is_locked(paths.lock_file(job, "run"))
        process = read_json(paths.job_folder(job) / "process.json")
        return is_alive(ticket) or (is_alive(process) and (process or {}).get("attempt") == ticket.get("attempt"))

    def cancel(self, job: "Job", ticket: Ticket) -> None:
        """SIGTERM to the job's process, ten seconds for its last words, then SIGKILL to all that is left."""
        if ticket.get("host") != host():
            raise PipelineError(f"{job.name}: runs on {ticket.get('host')}; stop it there")
        pids = [int(ticket["pid"])] if is_alive(ticket) else []
        process = read_json(paths.job_folder(job) / "process.json") or {}
        if is_alive(process) and process.get("attempt") == ticket.get("attempt"):
            pids.append(int(process["pid"]))
            signal_all(pids[-1:], signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and is_alive(process):
                time.sleep(0.1)
        signal_all([*pids, *descendants(pids)], signal.SIGKILL)

    def cause(self, job: "Job", ticket: Ticket) -> str:
        """By the exit status that the shell around it noted."""
        try:
            status = int((submit_folder(job) / "status").read_text())
        except (FileNotFoundError, ValueError):
            return "its process is gone without a trace (killed together with its parents, or the machine restarted)"
        if status > 128:
            name = signal.Signals(status - 128).name if status - 128 in list(signal.Signals) else str(status - 128)
            hint = "; out of memory? (see dmesg)" if name == "SIGKILL" else ""
            return f"its process was killed by {name}{hint}"
        return f"its process ended with status {status} without saying why"

    def where(self, ticket: Ticket) -> str:
        """By process number."""
        return f"process {ticket.get('pid', '?')} on {ticket.get('host', '?')}"

    def queued(self, ticket: Ticket) -> str:
        """It never waits."""
        return ""

    def find(self, job: "Job", ticket: Ticket) -> dict[str, Any] | None:
        """By the word of the job's own process, if it came so far."""
        process = read_json(paths.job_folder(job) / "process.json") or {}
        mine = process.get("attempt") == ticket["attempt"]
        return {key: process[key] for key in ("job_id", "host", "pid", "started")} if mine else None

    def again(self, job: "Job", ticket: Ticket) -> bool:
        """A process that was stopped here was stopped on purpose."""
        return False


def signal_all(pids: list[int], signum: signal.Signals) -> None:
    """Sends a signal to each process that still exists."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def descendants(pids: list[int]) -> list[int]:
    """The living children of the processes, their children, and so on (on Linux; elsewhere none are found)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    todo = list(pids)
    while todo:
        new = [pid for pid in children.get(todo.pop(), []) if start_time(pid) is not None]
        found += new
        todo += new
    return found
