# SPDX-License-Identifier: Apache-2.0
"""Two trainers on one folder: the second is told who the first is; the lock ends with its process, however it ends."""

import os
import re
import signal
import socket
import time
from typing import Any

import pytest
import torch

from scm_core.train import checkpoint as module
from scm_core.train.checkpoint import LOCK, CheckpointError, CheckpointStore
from scm_core.train.writer import write_tensors


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened for 20 s"
        time.sleep(0.005)


def holding(run: Any, also: Any = lambda: None) -> int:
    """A child that holds the lock of the run's folder until it is killed."""
    ready = run.folder / "ready"

    def hold() -> None:
        with run.store().locked():
            also()
            ready.touch()
            time.sleep(60)

    child = run.fork(hold)
    until(ready.exists)
    return child


def test_a_second_trainer_is_refused(run: Any, same: Any) -> None:
    """Before it reads or writes anything, with the holder's pid and host; after the holder was killed it may."""
    child = holding(run)
    try:
        words = f"in use by another trainer, pid {child} on {re.escape(socket.gethostname())}; wait until it has ended, or stop it"
        with pytest.raises(CheckpointError, match=f"{re.escape(str(run.store().folder))}: {words}"):
            run.go()
        assert run.steps() == {}
        assert run.store().load() is None  # reading needs no lock
    finally:
        os.kill(child, signal.SIGKILL)
    assert run.wait_for(child) == -signal.SIGKILL
    run.go()
    same(run)


def test_a_child_does_not_keep_the_lock(run: Any) -> None:
    """A data loader's worker that survives a killed trainer does not hold its folder."""
    worker = run.folder / "worker"
    child = holding(run, lambda: worker.write_text(str(run.fork(lambda: time.sleep(60)))))
    os.kill(child, signal.SIGKILL)
    assert run.wait_for(child) == -signal.SIGKILL
    alive = int(worker.read_text())
    try:
        os.kill(alive, 0)
        with run.store().locked():
            pass
    finally:
        os.kill(alive, signal.SIGKILL)


def test_the_lock_ends_with_the_block(run: Any) -> None:
    """Also with an exception, and also for stores of one process, which exclude each other; it says the holder of now."""
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), run.store().locked():
            raise ZeroDivisionError
    other = run.store()
    with run.store().locked(), pytest.raises(CheckpointError, match=f"pid {os.getpid()} on "), other.locked():
        pass
    assert (run.store().folder / LOCK).read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_the_lock_covers_a_write_in_progress(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that fails while a checkpoint is being written holds the folder until it is written."""

    def slowly(tensors: Any, path: Any) -> str:
        time.sleep(0.2)
        with pytest.raises(CheckpointError, match="in use"), CheckpointStore(run.store().folder).locked():
            pass
        return write_tensors(tensors, path)

    monkeypatch.setattr(module, "write_tensors", slowly)
    store = run.store()

    def fail() -> None:
        with store.locked():
            store.save_async(4, {"x": torch.ones(3)}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    store.check()
    assert [path.name for path in store.paths()] == ["step-00000004"]
