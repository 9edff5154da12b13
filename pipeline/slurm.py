# SPDX-License-Identifier: Apache-2.0
"""Jobs on a SLURM cluster: submitted (`pipeline.submission`), watched through one shared look at the queue (`pipeline.scheduler`), and
when they die, with the cause of their death.

What a job needs comes from the registry, what the site wants beside it from `pipeline/site.py`.
"""

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.backends import Ticket
from pipeline.errors import NotYetError, PipelineError
from pipeline.files import host, is_locked, read_json
from pipeline.publish import exit_note
from pipeline.scheduler import FINAL, Scheduler, Seen, accounting, cancel
from pipeline.submission import hand_over, output, sbatch

if TYPE_CHECKING:
    from pipeline.entry import JobEntry
    from pipeline.registry import Job

APPEARS_S = 60.0  # a job may not be shown yet right after its submission
LOST_S = 5.0  # an sbatch whose parent was killed has reached the scheduler by then, or never will
# How a job ends that the cluster has stopped, where it does not start it again itself.
STOPPED = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")
ENDS = FINAL | {"PREEMPTED"}  # it stays so where the cluster does not requeue what it preempts
AGAIN = 20  # submissions of one job by the same waiter
# What SLURM writes into a job's output when it ends it. More may follow: `DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS`.
ENDED = re.compile(r"CANCELLED AT \S+(?: DUE TO (TIME LIMIT|PREEMPTION|NODE FAILURE|[A-Z]+)[^*\n]*)? \*\*\*")
DUE_TO = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL", None: "CANCELLED"}
OUT_OF_MEMORY = re.compile(r"oom.?kill|out.of.memory|exceeded (?:job )?memory limit|OutOfMemory", re.IGNORECASE)


class Slurm:
    """A SLURM cluster whose nodes see this folder."""

    poll_s = 2.0
    line_s = 60.0

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self._ended: dict[str, str] = {}

    def submit(self, job: "Job", entry: "JobEntry") -> dict[str, Any]:
        """Submits a job that SLURM may requeue; it resumes from its checkpoints."""
        return {"host": host(), **sbatch(job, [entry], f"{job.name}@{entry.attempt[:8]}")[0]}

    def find(self, job: "Job", ticket: Ticket) -> dict[str, Any] | None:
        """The job of a ticket without a job id: by the word of its process, else by its name in the queue, looked at later than that."""
        process = read_json(paths.job_folder(job) / "process.json") or {}
        if process.get("attempt") == ticket["attempt"]:
            return {"job_id": process["job_id"], "host": host()}
        if is_locked(paths.lock_file(job, "submit")):
            raise NotYetError(f"{job.name}: is being submitted by another process")
        look = self.scheduler.look()
        if look.time < float(ticket["submitted"]) + LOST_S:
            why = f" ({look.trouble})" if look.trouble else ""
            raise NotYetError(f"{job.name}: looking for it in the queue, should it be there already{why}")
        index = ticket.get("index")
        found = [one for one in look.named(ticket["name"]) if index is None or one.endswith(f"_{index}")]
        if not found:
            return None
        hand_over(job, ticket, found[0])
        return {"job_id": found[0], "host": host()}

    def alive(self, job: "Job", ticket: Ticket) -> bool:
        """By the exit note, else by squeue's word; a scheduler that does not answer ends nothing."""
        note = exit_note(job, ticket)
        # A job that stopped for want of time, or to make room, is started again by SLURM; whether it is, only the queue says.
        if note is not None and note["status"] != "stopped":
            return False
        look = self.scheduler.look()
        since = float(ticket.get("cancelled") or ticket.get("submitted", 0))
        if look.time <= since:
            return True
        seen = look.jobs.get(ticket["job_id"])
        return not seen.over if seen is not None else look.time - since < APPEARS_S

    def cancel(self, job: "Job", ticket: Ticket) -> None:
        """scancel: SIGTERM, and SIGKILL after the cluster's KillWait."""
        if words := cancel(ticket["job_id"]):
            raise PipelineError(
                f"{job.name}: scancel failed ({words}); cancel it later with: scancel {ticket['job_id']}"
            )

    def again(self, job: "Job", ticket: Ticket) -> bool:
        """Preempted or left by its node where the cluster does not requeue, or stopped with its work saved."""
        state = self._state(job, ticket)
        saved = (exit_note(job, ticket) or {}).get("status") == "stopped"
        return int(ticket.get("again", 0)) < AGAIN and (state in STOPPED or (saved and state != "CANCELLED"))

    def cause(self, job: "Job", ticket: Ticket) -> str:
        """By the last state that squeue showed or sacct has, by how its process ended, and by what SLURM wrote into its output."""
        status, told = self._status(job, ticket), _read_end(output(job, ticket))
        note = exit_note(job, ticket) or {}
        state, reason = self._state(job, ticket), getattr(self._seen(ticket), "reason", "")
        if state == "OUT_OF_MEMORY" or OUT_OF_MEMORY.search(reason) or OUT_OF_MEMORY.search(told):
            words = f"it was killed for using more memory than it asked for ({ticket.get('memory', '?')})"
        elif state == "TIMEOUT":
            words = f"it ran into its time limit of {ticket.get('minutes', '?')} minutes"
        elif state == "CANCELLED":
            words = "it was cancelled"
        elif state in STOPPED:
            words = {"PREEMPTED": "it was preempted"}.get(state, "its node failed") + f", for the {AGAIN}th time"
        elif state == "DEADLINE":
            words = "its deadline passed"
        elif note.get("status") == "stopped":
            words = f"{note['message'].removeprefix(f'{job.name}: ')}, for the {AGAIN}th time"
        elif status is not None and status > 128:
            words = f"its process was killed by {_signal(status - 128)}"
            if status == 128 + signal.SIGKILL:
                words += f"; out of memory? It asked for {ticket.get('memory', '?')}"
        elif status is not None:
            words = f"its process ended with status {status} without saying why"
        elif state:
            words = f"it ended as {state}" + (f" ({reason})" if reason not in ("", "None") else "")
        else:
            words = "it is no longer known to SLURM"
        return f"{self.where(ticket)}: {words}"

    def where(self, ticket: Ticket) -> str:
        """By job id, and by node as far as it is known."""
        seen = self._seen(ticket)
        node = seen.node if seen is not None and not seen.queued else ""
        node = node or ticket.get("node") or ""
        return f"SLURM job {ticket['job_id']}{' on ' if node else ''}{node}"

    def queued(self, ticket: Ticket) -> str:
        """What squeue says of a job that waits for its turn, the first time or again."""
        look, seen = self.scheduler.known(), self._seen(ticket)
        away = f"the scheduler does not answer ({look.trouble}); " if look.trouble else ""
        if seen is None or not seen.queued:
            return away and f"{away}what runs goes on"
        return f"{away}{self.where(ticket)} {seen.queued}"

    def _seen(self, ticket: Ticket) -> Seen | None:
        return self.scheduler.known().jobs.get(ticket["job_id"] or "")

    def _state(self, job: "Job", ticket: Ticket) -> str:
        """The state in which a job has ended: by squeue, else by sacct, else by SLURM's words in its output; empty where nobody knows."""
        seen, job_id = self._seen(ticket), ticket["job_id"]
        if seen is not None and seen.state in ENDS:
            return seen.state
        if job_id not in self._ended:
            ended = accounting(job_id)
            if ended in ENDS:
                self._ended[job_id] = ended
            else:
                told = [match[1] for match in ENDED.finditer(_read_end(output(job, ticket)))]
                self._ended[job_id] = DUE_TO.get(told[-1], "") if told else ""
        return self._ended[job_id]

    def _status(self, job: "Job", ticket: Ticket) -> int | None:
        """How the job's process ended, as the shell around it noted it."""
        found = []
        for file in sorted(output(job, ticket).parent.glob(f"{ticket['job_id']}_*_status")):
            with open(file) as f:
                text = f.read().strip()
            found.append(int(text) if text.isdigit() else 0)
        return next((status for status in found if status), found[0] if found else None)


def _read_end(file: Path) -> str:
    """The end of a job's output, from its last start on."""
    try:
        text = file.read_bytes()[-16384:].decode(errors="replace")
    except FileNotFoundError:
        return ""
    return text.rpartition("Starting with SlurmJobEnvironment")[2]


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
