# SPDX-License-Identifier: Apache-2.0
"""The shared look at SLURM's queue: one `squeue` for all who wait, whoever of them asks, and `sacct` where it answers.

Every waiter of a repository reads `runs/.squeue.json`; who finds it older than SCM_SLURM_POLL seconds (default 15) asks again, one at a
time. A scheduler that does not answer ends nothing: what was seen before stands until it does. `sacct` is never needed, as many clusters
have none: it is asked once for a job that squeue has forgotten.
"""

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.files import Lock, read_json, write_json

OURS = re.compile(r"@[0-9a-f]{8}$")  # how the names of our jobs end
# States of a job that will not run again. Not here: COMPLETING, and all that SLURM starts again (REQUEUED, REQUEUE_HOLD, SPECIAL_EXIT …).
FINAL = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY REVOKED TIMEOUT".split()  # noqa: SIM905
)
STARTED = frozenset(("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"))
LASTING_S = 60.0  # preempted for so long: the cluster cancels what it preempts, and will not start it again
FORGET_S = 86400.0
ANSWER_S = 30.0


FILTERS = ("SQUEUE_", "SCANCEL_", "SACCT_", "SINFO_")  # defaults of options, which users set for themselves
# SLURM's words for what passes: the controller is away or busy, or the user has as many jobs in the queue as are allowed.
PASSES = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Communication connection failure",
    "Transport endpoint is not connected",
    "Resource temporarily unavailable",
    "temporarily unable to accept job",
    "backup controller in standby",
    "MaxSubmitJob",
    "job submit limit",
)


def passes(words: str) -> bool:
    """Whether SLURM's refusal is one for now."""
    return any(known.lower() in words.lower() for known in PASSES)


def unfiltered() -> dict[str, str]:
    """The environment without what has SLURM's programs show or cancel less than they are asked for, such as SQUEUE_PARTITION.

    A job that squeue does not show is taken for one that has ended.
    """
    return {key: value for key, value in os.environ.items() if not key.startswith(FILTERS)}


def query_s() -> float:
    """Seconds between two looks at the queue, of all waiters together."""
    text = os.environ.get("SCM_SLURM_POLL") or "15"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:
        raise PipelineError(f"SCM_SLURM_POLL={text}: expected seconds above 0 and below an hour, such as 15")
    return seconds


@dataclass(frozen=True)
class Seen:
    """A job as squeue has shown it last."""

    state: str
    node: str
    reason: str
    name: str
    since: float
    """When it was first seen in this state."""
    last: float
    """When it was shown last."""
    missing: int = 0
    """Looks since then that did not show it."""

    @property
    def over(self) -> bool:
        """Whether it has ended, and SLURM will not start it again."""
        if self.state == "PREEMPTED" and self.last - self.since > LASTING_S:
            return True
        # Once may be a scheduler that has just been started.
        return self.state in FINAL or self.missing >= 2

    @property
    def queued(self) -> str:
        """How it waits, such as `waits in the queue (Resources)`; empty if it does not."""
        if self.over or self.missing or self.state in STARTED:
            return ""
        reason = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"waits in the queue{reason}" if self.state == "PENDING" else f"waits: {self.state.lower()}{reason}"


@dataclass(frozen=True)
class Look:
    """What is known of the queue."""

    asked: float = 0.0
    """When squeue was asked last."""
    time: float = 0.0
    """When it was asked last and answered."""
    trouble: str = ""
    """Why it did not answer since."""
    jobs: Mapping[str, Seen] = field(default_factory=dict)

    def named(self, name: str) -> list[str]:
        """The ids of the jobs of that name."""
        return [job for job, seen in self.jobs.items() if seen.name == name]


class Scheduler:
    """SLURM as the waiters see it."""

    def __init__(self) -> None:
        self.cache = paths.root() / "runs" / ".squeue.json"
        self._lock = Lock(self.cache.with_suffix(".lock"))
        self._version: tuple[int, int] | None = None
        self._known = Look()

    def known(self) -> Look:
        """The last look, whosever it was."""
        try:
            status = self.cache.stat()
        except FileNotFoundError:
            return Look()
        version = (status.st_mtime_ns, status.st_ino)
        if version != self._version:
            values = read_json(self.cache) or {}
            jobs = {job: Seen(**seen) for job, seen in values.pop("jobs", {}).items()}
            self._known, self._version = Look(**values, jobs=jobs), version
        return self._known

    def look(self) -> Look:
        """The last look if it is young enough, or if somebody else is about to replace it; else a new one."""
        if not self._due(self.known()) or not self._lock.acquire(wait=False):
            return self._known
        try:
            if self._due(self.known()):
                self._ask()
            return self.known()
        finally:
            self._lock.release()

    @staticmethod
    def _due(known: Look) -> bool:
        return abs(time.time() - known.asked) >= query_s()  # abs: clocks of two machines differ

    def _ask(self) -> None:
        """One squeue for all jobs of this user. What is written before counts even if this process is killed meanwhile."""
        before, now = self._known, time.time()
        self._write(Look(now, before.time, before.trouble, before.jobs))
        # By number: the name that getpass has is LOGNAME's, which `su` leaves as it was.
        command = ["squeue", "-h", "-r", "-t", "all", "-u", str(os.getuid()), "-o", "%i|%T|%N|%r|%j"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=ANSWER_S, env=unfiltered()
            )
        except subprocess.TimeoutExpired:
            return self._write(Look(now, before.time, f"no answer in {ANSWER_S:.0f} s", before.jobs))
        except OSError as error:
            return self._write(Look(now, before.time, f"squeue: {error.strerror}", before.jobs))
        if done.returncode != 0:
            words = " ".join(done.stderr.split())[:200] or f"squeue ended with status {done.returncode}"
            return self._write(Look(now, before.time, words, before.jobs))
        rows = (line.split("|", 4) for line in done.stdout.splitlines() if line.count("|") >= 4)
        shown: dict[str, Seen] = {}
        for job, state, node, reason, name in rows:
            if OURS.search(name):
                old = before.jobs.get(job)
                since = old.since if old is not None and old.state == state else now
                shown[job] = Seen(state, node, reason, name, since, now)
        # SLURM forgets a job some minutes after its end, some clusters at once; who waits for it may come later.
        for job, old in before.jobs.items():
            if job not in shown and now - old.last < FORGET_S:
                shown[job] = Seen(old.state, old.node, old.reason, old.name, old.since, old.last, old.missing + 1)
        return self._write(Look(now, now, "", shown))

    def _write(self, look: Look) -> None:
        write_json(self.cache, {**vars(look), "jobs": {job: vars(seen) for job, seen in look.jobs.items()}})
        self.known()


def accounting(job_id: str) -> str | None:
    """The state that sacct has of a job; None where there is no accounting, or no answer."""
    command = ["sacct", "-n", "-X", "-P", "-j", job_id, "-o", "State"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=unfiltered())
    except (subprocess.SubprocessError, OSError):
        return None
    rows = done.stdout.split("\n")[:-1]
    return rows[-1].partition(" ")[0] if rows else None  # CANCELLED by 1000


def cancel(job_id: str, tries: int = 3) -> str:
    """scancel; returns why it did not work, or nothing. A scheduler that is busy is asked again."""
    words = ""
    for attempt in range(tries):
        if attempt:
            time.sleep(3.0)
        try:
            done = subprocess.run(
                ["scancel", job_id], capture_output=True, text=True, check=False, timeout=ANSWER_S, env=unfiltered()
            )
        except (subprocess.SubprocessError, OSError) as error:
            words = f"{type(error).__name__}: {error}"
            continue
        words = "" if done.returncode == 0 else " ".join(done.stderr.split()) or f"status {done.returncode}"
        if not words or "Invalid job id" in words or "already completing or completed" in words:
            return ""
    return words
