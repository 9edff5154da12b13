# SPDX-License-Identifier: Apache-2.0
"""The processes of a training that several share: the job's own, and those that run the same stage beside it.

The job's process is the first. It starts the others on its machine, each by the job's own command with RANK set, as `torchrun` does;
under torchrun they are there already. Only the first has a staging folder, a tracker and a display; the others train and end.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import manifest, paths
from pipeline.errors import PipelineError, StoppedError

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job
    from scm_core.train.distributed import Ranks

GRACE_S = 30.0  # for the others to end after the first has


class RankDone(Exception):
    """The training is over, and what follows it is the first process's."""


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
        with connected() as ranks:
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


def run_rank(job: "Job", params: "Params") -> int:
    """Take part in the training of a job as the process that RANK says; returns the exit status."""
    import importlib

    from pipeline.execute import context_of, set_threads

    set_threads(job.resources.threads_each)
    try:
        inputs = manifest.read_inputs(job)
        mark = manifest.fingerprint(job, params, inputs)
        with tempfile.TemporaryDirectory() as out:
            context = context_of(job, params, inputs, mark, Path(out), Silent(), show=False)
            importlib.import_module(f"pipeline.stages.{job.stage}").run(context)
    except RankDone:
        return 0
    except StoppedError as stopped:
        return stopped.status
    except PipelineError as error:
        print(f"error: process {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    raise PipelineError(f"{job.name}: has no training that several processes could share")
