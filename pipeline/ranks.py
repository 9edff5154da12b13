# SPDX-License-Identifier: Apache-2.0
"""The processes of a training that several share: the job's own, and those that run the same stage beside it.

The job's process is the first. It starts the others on its machine, each by the job's own command with RANK set, as `torchrun` does;
under torchrun, and as tasks of a SLURM job (`pipeline/rendezvous.py`), they are there already. Only the first has a staging folder, a
tracker and a display; the others train and end.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import manifest, paths, rendezvous
from pipeline.errors import PipelineError, StoppedError

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job
    from scm_core.train.distributed import Ranks

GRACE_S = 30.0  # for the others to end after the first has


class RankDone(Exception):
    """The training is over, and what follows it is the first process's."""


class LostError(PipelineError):
    """The connection to the other processes broke: one of them is gone, and knows why, or its node is."""


class Silent:
    """The tracker of a process that is not the first."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def log_model(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing."""

    def set_tag(self, key: str, value: str) -> None:
        """Nothing."""


@contextlib.contextmanager
def together(job: "Job", count: int) -> Iterator["Ranks"]:
    """The place of this process among the `count` that share a training of `job`. The first starts the others, where nobody has."""
    from scm_core.train.distributed import connected

    present = int(os.environ.get("WORLD_SIZE", "1"))
    if present not in (1, count):
        raise PipelineError(
            f"{job.name}: params.yaml asks for processes: {count}, but WORLD_SIZE is {present}; make them the same, or start one process"
        )
    if present == count:
        with _explained(job), connected() as ranks:
            yield ranks
        return
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "pipeline", "run", *job.arguments]
    others = [
        subprocess.Popen(command, cwd=paths.root(), env={**os.environ, **known, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(1, count)
    ]
    own = {**known, "RANK": "0", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    try:
        with connected() as ranks:
            yield ranks
        for other in others:
            other.wait(GRACE_S)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for other in others:
            other.kill()
            other.wait()


@contextlib.contextmanager
def _explained(job: "Job") -> Iterator[None]:
    """In a SLURM job a connection that breaks becomes a LostError; in its first task an error with the cause, once that is known."""
    from scm_core.train.distributed import is_lost

    try:
        yield
    except Exception as error:
        here = rendezvous.place(os.environ)
        if here is None or not is_lost(error):
            raise
        if here.rank:
            raise LostError(rendezvous.brief(error)) from error
        raise rendezvous.why_lost(job, here, error) from error


def run_rank(job: "Job", params: "Params") -> int:
    """Take part in the training of a job as the process that RANK says; returns the exit status."""
    try:
        _train(job, params)
    except StoppedError as stopped:
        return stopped.status
    except PipelineError as error:
        print(f"error: process {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    return 0


def run_task(name: paths.JobName, here: rendezvous.Place, find: "Callable[[], tuple[Job, Params]]") -> int:
    """The same as a task of a SLURM job, other than the first; returns the exit status.

    What it says is in a log of its own; why it failed, in the job's too. After a stop it ends with 0: any other status would have SLURM
    kill the first task, which asks for the job to be started again.
    """
    try:
        rendezvous.join(here)
        _train(*find())
    except StoppedError as stopped:
        print(stopped, flush=True)
    except LostError as error:
        print(f"error: {error}", flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        rendezvous.leave_word(here, str(error), lost=True)
        # Its end is the first task's to say, or SLURM's: a task that fails now would be taken for the cause.
        time.sleep(rendezvous.PATIENCE_S + GRACE_S)
        return 1
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, PipelineError):
            traceback.print_exc()
            text = f"{type(error).__name__}: {text or 'no message'}"
        words = f"{text} (log: {paths.relative(paths.log_file(name, here.rank))})"
        rendezvous.leave_word(here, words, lost=False)
        with paths.log_file(name).open("a", encoding="utf-8") as log:
            log.write(f"error: {here}: {words}\n")
        print(f"error: {text}", flush=True)
        return 1
    return 0


def _train(job: "Job", params: "Params") -> None:
    """A process other than the first: the stage, with a staging folder that nobody keeps, until the training in it is over."""
    import importlib

    from pipeline.execute import context_of, set_threads

    set_threads(job.resources.threads_each)
    inputs = manifest.read_inputs(job)
    mark = manifest.fingerprint(job, params, inputs)
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(RankDone):
        context = context_of(job, params, inputs, mark, Path(out), Silent(), show=False)
        importlib.import_module(f"pipeline.stages.{job.stage}").run(context)
        raise PipelineError(f"{job.name}: has no training that several processes could share")
