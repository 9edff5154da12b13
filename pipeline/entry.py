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

    from pipeline.params import Params
    from pipeline.registry import Job


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

    def __call__(self) -> None:
        """Runs the job; the process ends with status 0, 1 (the note says why), or 130 (cancelled)."""
        os.environ["SCM_ROOT"] = self.root
        os.chdir(self.root)
        job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
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

        # By name, not looked up: params.yaml may have become invalid, or lost the job, since it was submitted.
        name = SimpleNamespace(scale=self.scale, name="-".join((self.stage, *(value for _, value in self.axes))))
        here = rendezvous.place(os.environ) if self.launcher == "slurm" else None
        rank = here.rank if here else 0
        if here and not rank:
            rendezvous.announce(here)
        title = f"--- {here or name.name}, attempt {self.attempt}, {time.strftime('%F %T')}"
        _redirect(str(paths.log_file(name, rank)), title)
        if here and rank:
            sys.exit(ranks.run_task(name, here, self._find))
        lock = Lock(paths.lock_file(name, "run"))
        if not lock.acquire(wait=False):
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
        """What submitit runs after a time-out or preemption: the same job, which resumes from its checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


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
