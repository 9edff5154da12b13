# SPDX-License-Identifier: Apache-2.0
"""A small training run in a forked child that can be killed, and what it leaves: its log and its last checkpoint."""

import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from scm_core.data import BatchOrder
from scm_core.guidance import data_velocity
from scm_core.nn.build import build_network
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch, Objective, Terms
from scm_core.objectives.consistency import ConsistencyObjective
from scm_core.train.checkpoint import CheckpointStore
from scm_core.train.loop import Hooks, train
from scm_core.train.state import TrainSettings, TrainState

CONFIG = {
    "architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 1, "dropout": 0.2,
}  # fmt: skip
ITERATIONS, BATCH, EVERY = 16, 4, 4  # checkpoints at 4, 8, 12, 16


def data(iteration: int) -> Batch:
    """Batches of ten samples that straddle epochs."""
    x0 = 0.5 * torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(77))
    indices = BatchOrder(10, BATCH, seed=1).indices(iteration)
    return Batch(x0[indices], indices % 3, indices)


def consistency_training() -> tuple[TrainState, Objective]:
    """A network with dropout and labels, a weighting head, warmup, an average."""
    torch.manual_seed(0)
    net, head = build_network(CONFIG), LogVarHead(math.log(32))
    torch.nn.init.ones_(net.get_parameter("out_gain"))
    settings = TrainSettings(ITERATIONS, BATCH, 1e-2, 3, ema_sigma_rel=0.1, checkpoint_every=EVERY, head_lr=1e-2)
    objective = ConsistencyObjective(net, head, data_velocity, 0.5, -1.0, 1.4, warmup=10)
    return TrainState(net, settings, {"logvar": head}), objective


class Run(NamedTuple):
    """A run's folder: the checkpoints, and one line for each step that was made, whichever process made it."""

    folder: Path

    @staticmethod
    def data(iteration: int) -> Batch:
        return data(iteration)

    def store(self, warn: Callable[[str], None] = lambda message: None) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints", warn=warn)

    def go(self) -> None:
        """Train to the end, or go on with it."""
        state, objective = consistency_training()
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

        def recorded(batch: Batch, generator: Any, iteration: int) -> Terms:
            terms = objective(batch, generator, iteration)
            line = json.dumps([iteration, batch.indices.tolist(), terms.loss.item().hex()])
            os.write(log, f"{line}\n".encode())  # not buffered: what a killed process did stays recorded
            return terms

        try:
            train(state, recorded, data, self.store(), Hooks(message=lambda text: None))
        finally:
            os.close(log)

    def steps(self) -> dict[int, set[str]]:
        """What was recorded of each iteration; more than one line if attempts differ."""
        result: dict[int, set[str]] = {}
        path = self.folder / "log"
        for line in path.read_text().splitlines() if path.exists() else []:
            result.setdefault(json.loads(line)[0], set()).add(line)
        return result

    def result(self) -> dict[str, Tensor]:
        """Weights, moments and averages at the end."""
        loaded = self.store().load()
        assert loaded is not None
        assert loaded.meta["iteration"] == ITERATIONS
        assert any(name.startswith("ema") for name in loaded.tensors)
        return loaded.tensors

    @staticmethod
    def fork(work: Callable[[], object]) -> int:
        """The id of a child that does `work` and ends: with status 0, or 1 and a traceback if it raises."""
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    @staticmethod
    def wait_for(child: int, seconds: float = 60) -> int:
        """A child's exit status; minus the signal if it was killed. A child that hangs is killed, and it is an error."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError(f"the child did not end within {seconds} s")


class Uninterrupted(NamedTuple):
    """What every interrupted run has to end with."""

    steps: dict[int, set[str]]
    result: dict[str, Tensor]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    torch.set_num_threads(1)
    run = Run(tmp_path_factory.mktemp("uninterrupted"))
    assert run.wait_for(run.fork(run.go)) == 0
    steps = run.steps()
    assert sorted(steps) == list(range(ITERATIONS))
    return Uninterrupted(steps, run.result())


@pytest.fixture
def same(uninterrupted: Uninterrupted) -> Callable[[Run], None]:
    """A check that a run, resumed, made the steps of the uninterrupted one, each time it made them, and ended with its numbers."""

    def check(run: Run) -> None:
        assert run.steps() == uninterrupted.steps
        result = run.result()
        assert result.keys() == uninterrupted.result.keys()
        for name, expected in uninterrupted.result.items():
            assert torch.equal(result[name], expected), name

    return check


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def trainer() -> Callable[[], tuple[TrainState, Objective]]:
    """What makes the network, state and objective of a run."""
    return consistency_training


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[], Run]:
    """Runs in folders of their own."""

    def new() -> Run:
        return Run(Path(tempfile.mkdtemp(dir=tmp_path)))

    return new
