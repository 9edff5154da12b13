# SPDX-License-Identifier: Apache-2.0
"""A full disk, a limit on files, a folder that may not be written: the old checkpoints stay valid, one sentence says what to do."""

import errno
import os
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core.train import writer
from scm_core.train.checkpoint import CheckpointError, CheckpointStore

LARGE = {"x": torch.arange(300_000.0)}  # 1.2 MB


def failing(store: CheckpointStore, tensors: dict[str, Tensor], asynchronous: bool) -> str:
    """The sentence that the failed writing of checkpoint 12 gives: at once, or at the next check."""
    if not asynchronous:
        with pytest.raises(CheckpointError) as caught:
            store.save(12, tensors, {})
        return str(caught.value)
    store.save_async(12, tensors, {})
    with pytest.raises(CheckpointError) as caught:
        store.wait()
    return str(caught.value)


def still_valid(store: CheckpointStore) -> None:
    """Checkpoints 4 and 8, and nothing else."""
    warnings: list[str] = []
    loaded = CheckpointStore(store.folder, warn=warnings.append).load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 8
    assert torch.equal(loaded.tensors["x"], torch.full((10,), 8.0))
    assert not warnings
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest", "step-00000004", "step-00000008"]


def filled(folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder)
    for iteration in (4, 8):
        store.save(iteration, {"x": torch.full((10,), float(iteration))}, {})
    return store


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(small_disk: Path, asynchronous: bool) -> None:
    """A real one: reason, file and remedy; the half-written one gives its space back; with space again, saving works again."""
    store = filled(small_disk / "checkpoints")
    message = failing(store, LARGE, asynchronous)
    assert message == (
        f"{store.folder / '.tmp-step-00000012' / 'state.safetensors'}: writing checkpoint 12 failed: No space left on device; free some "
        "space there and start the run again: it goes on from step-00000008"
    )
    still_valid(store)
    store.save(12, {"x": torch.ones(1000)}, {})
    assert store.paths()[-1].name == "step-00000012"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_becomes_read_only(small_disk: Path, asynchronous: bool) -> None:
    """As file systems do that have found an error."""
    store = filled(small_disk / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = failing(store, LARGE, asynchronous)
    assert ".tmp-step-00000012" in message
    assert "Read-only file system; make the folder writable and start the run again" in message
    still_valid(store)
    with (
        pytest.raises(CheckpointError, match=r"\.lock: locking .* failed: Read-only file system; make"),
        store.locked(),
    ):
        pass


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_may_not_grow(run: Any, asynchronous: bool) -> None:
    """A limit on the size of files (`ulimit -f`), in a child of its own."""
    store = filled(run.folder / "checkpoints")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        message = failing(store, LARGE, asynchronous)
        assert "state.safetensors: writing checkpoint 12 failed: File too large; raise the limit" in message

    assert run.wait_for(run.fork(limited)) == 0
    still_valid(store)


def test_a_folder_of_somebody_else(run: Any) -> None:
    """No right to write: for root too, who gives up his rights in a child."""
    with tempfile.TemporaryDirectory() as name:  # where other users get to
        folder = Path(name)
        folder.chmod(0o755)
        store = filled(folder / "checkpoints")
        store.folder.chmod(0o555)

        def unprivileged() -> None:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            for asynchronous in (False, True):
                message = failing(store, LARGE, asynchronous)
                assert (
                    "Permission denied; make the folder writable and start the run again: it goes on from step-00000008"
                    in message
                )
            with (
                pytest.raises(CheckpointError, match=r"\.lock: locking .* Permission denied; make the folder"),
                store.locked(),
            ):
                pass
            still_valid(store)  # reading needs no right to write

        try:
            assert run.wait_for(run.fork(unprivileged)) == 0
        finally:
            store.folder.chmod(0o755)


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_any_fsync_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> None:
    """Disks report late that they are full or broken: what is published before that is valid, whatever is left over is cleared away."""
    store, fsync, calls = filled(tmp_path / "checkpoints"), os.fsync, []

    def late(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", late)
        message = failing(store, {"x": torch.zeros(3)}, True)
    assert os.strerror(number) in message
    assert len(calls) == call
    newest = store.load()
    assert newest is not None
    assert newest.meta["iteration"] in (8, 12)
    assert f"goes on from {newest.path.name}" in message
    assert not list(store.folder.glob(".tmp-*"))
    store.save(16, {"x": torch.zeros(3)}, {})
    assert store.paths()[-1].name == "step-00000016"


def test_a_run_stops_at_the_step_after(run: Any, same: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be written stops the run with one sentence; with space again it goes on to the same end."""
    writes = []

    def full(path: Path, mode: str, buffering: int) -> Any:
        writes.append(path)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return open(path, mode, buffering)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "open", full, raising=False)
        with pytest.raises(
            CheckpointError, match=r"writing checkpoint 12 failed: No space left on device; free some space there"
        ):
            run.go()
    assert len(writes) == 3
    assert 11 <= max(run.steps()) <= 15  # at once, or while one of the next steps is made
    run.go()
    same(run)
