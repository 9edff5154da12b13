# SPDX-License-Identifier: Apache-2.0
"""What runs in a submitted job's process: it finds its job again by name, runs it, and leaves an exit note."""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from pipeline.files import Lock
    from pipeline.params import Params
    from pipeline.registry import Job

STARTED = time.time()  # of this process, as far as a job's is concerned: it is imported when submitit starts the job
SLACK_S = 60.0  # SLURM's clock is not finer, and the process has started later than the job
OUTLIVE_S = 600.0


@dataclass(frozen=True)
class JobEntry:
    """The identity of a job, which is all that a launcher pickles: parameters are read again where it runs."""

    root: str
    scale: str
    stage: str
    axes: tuple[tuple[str, str], ...]
    fingerprint: str
    attempt: str
    launcher: str
    limit_s: float = 0.0
    """Its time limit on the cluster; 0: none."""
    signal_s: float = 0.0
    """How long before that the cluster sends SIGUSR2."""

    def __call__(self) -> None:
        """Runs the job; the process ends with status 0, 1 (the note says why), or 130 (cancelled)."""
        os.environ["SCM_ROOT"] = self.root
        os.chdir(self.root)
        if self.launcher == "local":
            # Its own session: Ctrl-C in a terminal reaches the waiter, which decides; a closed terminal stops nothing.
            with contextlib.suppress(PermissionError):
                os.setsid()
            # On SLURM, SIGTERM comes before a preemption's requeue and submitit passes over it; here it is a cancel.
            signal.signal(signal.SIGTERM, _cancelled)
            signal.signal(signal.SIGINT, _cancelled)
        from pipeline import execute, paths, ranks, rendezvous
        from pipeline.errors import PipelineError, StoppedError
        from pipeline.files import Lock

        job_id = rendezvous.job_id(os.environ) or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
        # By name, not looked up: params.yaml may have become invalid, or lost the job, since it was submitted.
        name = SimpleNamespace(scale=self.scale, name=self.job_name)
        here = rendezvous.place(os.environ) if self.launcher == "slurm" else None
        rank = here.rank if here else 0
        if here and not rank:
            rendezvous.announce(here)
        title = f"--- {here or name.name}, attempt {self.attempt}, {time.strftime('%F %T')}"
        _redirect(str(paths.log_file(name, rank)), title)
        if here and rank:
            sys.exit(ranks.run_task(name, here, self._find))
        lock = Lock(paths.lock_file(name, "run"))
        if not (lock.acquire(wait=False) or (_restarted() and _outlive(lock, execute.holder(name)))):
            execute.note(name, self.attempt, "error", f"{name.name}: is already running ({execute.holder(name)})")
            sys.exit(1)
        try:
            try:
                if here:
                    rendezvous.join(here)
                job, loaded = self._find()
            except PipelineError as error:
                execute.note(name, self.attempt, "error", f"{name.name}: {error}")
                raise
            execute.run_stage(job, loaded, self.launcher, self.attempt, job_id, expected=self.fingerprint)
        except StoppedError as stopped:
            print(f"{stopped}", flush=True)
            if self.launcher == "slurm":
                from scm_core.train.signals import pass_on

                pass_on(*stopped.signals)  # submitit's handler asks SLURM for another start, and ends the process
            sys.exit(stopped.status)
        except PipelineError as error:
            print(f"error: {error}", flush=True)
            sys.exit(1)
        except KeyboardInterrupt:
            print(f"{name.name}: cancelled", flush=True)
            sys.exit(130)

    def _find(self) -> "tuple[Job, Params]":
        from pipeline import params, paths, registry

        loaded = params.load(paths.root() / params.PARAMS_FILE, self.scale)
        return registry.find(loaded, self.stage, dict(self.axes)), loaded

    def checkpoint(self, *args: Any, **kwargs: Any) -> "DelayedSubmission":
        """What submitit runs at a time-out or preemption: the same job, which resumes from its checkpoints.

        Raises `PipelineError` where the time limit came before anything was saved: the next start would not get further.
        """
        from submitit.helpers import DelayedSubmission

        from pipeline import paths
        from pipeline.errors import PipelineError

        name = SimpleNamespace(scale=self.scale, name=self.job_name)
        used = time.time() - STARTED
        late = self.limit_s and used > self.limit_s - self.signal_s - SLACK_S
        if late and not _saved_since(str(paths.job_folder(name) / "work"), STARTED):
            raise PipelineError(
                f"{name.name}: ran into its time limit of {self.limit_s / 60:.0f} minutes before it had saved anything; give it more time, "
                "or checkpoints that come earlier (checkpoint_every)"
            )
        return DelayedSubmission(self)

    @property
    def job_name(self) -> str:
        """As in the registry."""
        return "-".join((self.stage, *(value for _, value in self.axes)))


def _saved_since(folder: str, start: float) -> bool:
    """Whether something in a folder is newer. What a thread or another process renames or removes meanwhile is passed over."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(os.path.join(parent, name)).st_mtime >= start:
                    return True
    return False


def _restarted() -> bool:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def _outlive(lock: "Lock", holder: str) -> bool:
    """Waits for the lock of an earlier start of this job: a file server keeps that of a dead node for a while."""
    print(f"waiting for the lock of an earlier start ({holder})", flush=True)
    deadline = time.monotonic() + OUTLIVE_S
    while time.monotonic() < deadline:
        time.sleep(2.0)
        if lock.acquire(wait=False):
            return True
    return False


def _cancelled(signum: int, frame: FrameType | None) -> NoReturn:
    # A second signal during the clean-up must not cut it short; the waiter's SIGKILL is the last resort.
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(signum).name)


def _redirect(log: str, title: str) -> None:
    """Sends stdout and stderr, those of libraries written in C too, to the job's log."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    print(title, flush=True)
