# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is written is read; what is damaged is named and the one before is used; a failing write harms nothing."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scm_core.train import checkpoint as module
from scm_core.train.checkpoint import MANIFEST, META, POINTER, TENSORS, CheckpointError, CheckpointStore


def tensors(value: float) -> dict[str, Tensor]:
    return {
        "net/weight": torch.full((4, 3, 3, 3), value).to(memory_format=torch.channels_last),
        "optimizer/step": torch.tensor(value),
        "double": torch.full((2,), value, dtype=torch.float64),
        "integer": torch.tensor([int(value)]),
    }


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> CheckpointStore:
    """A store with checkpoints 10, 20 and 30, two of which are kept."""
    result = CheckpointStore(tmp_path / "checkpoints", keep=2, warn=warnings.append)
    for iteration in (10, 20, 30):
        result.save(iteration, tensors(iteration), {"nimg": iteration * 64})
    return result


def test_round_trip(store: CheckpointStore, warnings: list[str]) -> None:
    """Values, types and counters come back bit for bit, whatever their order in memory."""
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta == {"iteration": 30, "nimg": 1920}
    assert loaded.path.name == "step-00000030"
    for name, expected in tensors(30).items():
        assert torch.equal(loaded.tensors[name], expected)
        assert loaded.tensors[name].dtype == expected.dtype
    assert not warnings


def test_the_last_ones_are_kept(store: CheckpointStore) -> None:
    """`keep` checkpoints, no temporary folder, and the pointer on the newest."""
    assert sorted(path.name for path in store.folder.iterdir()) == [POINTER, "step-00000020", "step-00000030"]
    assert (store.folder / POINTER).read_text() == "step-00000030"


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    """A run that never got to a checkpoint starts from the beginning."""
    assert CheckpointStore(tmp_path / "none").load() is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "flipped bit in the tensors": (flip, TENSORS, "damaged"),
    "flipped bit in the counters": (flip, META, "damaged"),
    "truncated tensors": (truncate, TENSORS, "truncated"),
    "empty tensors": (lambda path: path.write_bytes(b""), TENSORS, "truncated"),
    "missing tensors": (Path.unlink, TENSORS, "missing"),
    "missing counters": (Path.unlink, META, "missing"),
    "missing manifest": (Path.unlink, MANIFEST, "missing"),
    "truncated manifest": (truncate, MANIFEST, "damaged"),
    "manifest that is no object": (lambda path: path.write_text("[1]"), MANIFEST, "damaged"),
    "manifest that is no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), MANIFEST, "damaged"),
    "manifest that lists nothing": (lambda path: path.write_text("{}"), MANIFEST, "does not list"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    store: CheckpointStore, warnings: list[str], kind: str
) -> None:
    """Never silently, never from the start: one warning with the file's name, and the checkpoint before."""
    act, name, word = DAMAGE[kind]
    act(store.folder / "step-00000030" / name)
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 20
    assert len(warnings) == 1
    assert str(store.folder / "step-00000030" / name) in warnings[0]
    assert word in warnings[0]
    assert "falling back" in warnings[0]


def test_a_deleted_checkpoint_is_noticed(store: CheckpointStore, warnings: list[str]) -> None:
    """The newest one's folder is gone: the pointer knows, and it is said."""
    (store.folder / "step-00000030").rename(store.folder.parent / "elsewhere")
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 20
    assert len(warnings) == 1
    assert str(store.folder / "step-00000030") in warnings[0]
    assert "missing" in warnings[0]


def test_none_valid_is_an_error(store: CheckpointStore) -> None:
    """All damaged: CheckpointError with folder and remedy instead of starting over."""
    for path in store.paths():
        flip(path / TENSORS)
    with pytest.raises(
        CheckpointError,
        match=r"none of its 2 checkpoints \(step-00000030 the newest\) is valid; restore .* or delete the folder",
    ):
        store.load()


def test_all_deleted_is_an_error(store: CheckpointStore) -> None:
    """The checkpoints are gone but the pointer says that there were some: CheckpointError instead of starting over."""
    for path in store.paths():
        path.rename(store.folder.parent / f"elsewhere-{path.name}")
    with pytest.raises(CheckpointError, match="step-00000030"):
        store.load()


def test_what_a_killed_writer_left_is_ignored_and_removed(store: CheckpointStore, warnings: list[str]) -> None:
    """A temporary folder is no checkpoint, and the next save of that iteration replaces it."""
    stale = store.folder / ".tmp-step-00000040"
    stale.mkdir()
    (stale / TENSORS).write_bytes(b"half")
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 30
    store.save(40, tensors(40), {})
    assert not stale.exists()
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 40
    assert not warnings


@pytest.mark.parametrize("point", ["tensors", "counters", "rename", "fsync"])
def test_a_failing_write_leaves_the_old_ones_valid(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, warnings: list[str], point: str
) -> None:
    """No space left, at any point of writing: the error comes through, and the checkpoints before are as they were."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if point == "tensors":
            patch.setattr(module, "write_tensors", full)
        elif point == "counters":
            patch.setattr(Path, "write_text", full)
        elif point == "rename":
            patch.setattr(os, "rename", full)
        else:
            patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device; free some space"):
            store.save(40, tensors(40), {})
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 30
    assert not warnings
    store.save(40, tensors(40), {})  # and when there is space again
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 40


def test_the_same_iteration_again_replaces_a_damaged_one(store: CheckpointStore) -> None:
    """After a fallback the run comes to the damaged iteration again and writes it anew."""
    flip(store.folder / "step-00000030" / TENSORS)
    store.save(30, tensors(31), {})
    loaded = store.load()
    assert loaded is not None
    assert torch.equal(loaded.tensors["net/weight"], tensors(31)["net/weight"])


def test_nothing_is_unpickled(store: CheckpointStore) -> None:
    """The files are safetensors and JSON: no torch archive, no pickle."""
    folder = store.folder / "step-00000030"
    assert sorted(path.name for path in folder.iterdir()) == sorted([TENSORS, META, MANIFEST])
    header = int.from_bytes((folder / TENSORS).read_bytes()[:8], "little")
    assert "net/weight" in json.loads((folder / TENSORS).read_bytes()[8 : 8 + header])
    json.loads((folder / META).read_text())


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        CheckpointStore(tmp_path, keep=0)
