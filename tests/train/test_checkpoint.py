# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is written is read; what is damaged is named and the one before is used; a failing write harms nothing."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scm_core.train import checkpoint as module
from scm_core.train.checkpoint import MANIFEST, META, POINTER, TENSORS, CheckpointError, CheckpointStore
from scm_core.train.writer import DTYPES, Buffers, write_tensors


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


def test_only_valid_ones_count(store: CheckpointStore, warnings: list[str]) -> None:
    """A run resumed from 20, because 30 and 40 are damaged, keeps 20 beside its next one; the damaged ones are set aside."""
    store.save(40, tensors(40), {})
    store.save(20, tensors(20), {})  # as if 20 and 30 were not yet pruned
    for iteration in (30, 40):
        (store.folder / f"step-{iteration:08d}").mkdir(exist_ok=True)
        (store.folder / f"step-{iteration:08d}" / MANIFEST).write_text("{")
    warnings.clear()
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 20
    store.save(25, tensors(25), {})
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000025"]
    assert (store.folder / POINTER).read_text() == "step-00000025"
    assert (store.folder / "bad-step-00000030" / MANIFEST).read_text() == "{"
    assert len(warnings) == 2  # those of `load`
    store.save(30, tensors(30), {})
    assert [path.name for path in store.paths()] == ["step-00000025", "step-00000030"]


def test_an_older_damaged_one_does_not_count_either(store: CheckpointStore) -> None:
    """20 valid, 30 damaged, and the next checkpoint is 50: 20 stays, 30 does not."""
    flip(store.folder / "step-00000030" / META)
    assert store.load() is not None
    store.save(50, tensors(50), {})
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000050"]


def test_newer_ones_are_of_another_future(store: CheckpointStore, warnings: list[str]) -> None:
    """Whoever writes 25 did not go on from 30: the next load gives 25, and 30 is said to be set aside."""
    store.save(25, tensors(25), {})
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 25
    assert [str(store.folder / "step-00000030") in warning for warning in warnings] == [True]
    assert (store.folder / "bad-step-00000030").is_dir()


def test_iterations_are_numbers(tmp_path: Path) -> None:
    """The newest is the one with the largest number, however many digits; what somebody else put there is none."""
    store = CheckpointStore(tmp_path)
    (tmp_path / "step-00000050.backup").mkdir()
    for iteration in (99_999_998, 100_000_000, 100_000_001):
        store.save(iteration, tensors(1), {})
    assert [path.name for path in store.paths()] == ["step-100000000", "step-100000001"]
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 100_000_001


@pytest.mark.parametrize("pointer", [b"", b"step-0000003p", b"\xff\x00", b"/etc"])
def test_a_damaged_pointer_harms_nothing(store: CheckpointStore, warnings: list[str], pointer: bytes) -> None:
    """It only knows whether the newest one was deleted: the newest that is there is used, and the damage is said."""
    (store.folder / POINTER).write_bytes(pointer)
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 30
    assert len(warnings) == 1
    assert f"{store.folder / POINTER}: damaged" in warnings[0]
    for path in store.paths():
        path.rename(store.folder.parent / f"elsewhere-{path.name}")
    with pytest.raises(CheckpointError, match="says that there were checkpoints"):
        store.load()


class Gate:
    """Stands in for the writing of the tensors: waits until it is opened, then writes or fails."""

    def __init__(self) -> None:
        self.entered, self.opened, self.error = threading.Event(), threading.Event(), None

    def __call__(self, tensors: dict[str, Tensor], path: Path) -> str:
        self.entered.set()
        assert self.opened.wait(20)
        if self.error is not None:
            raise self.error
        return write_tensors(tensors, path)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, store: CheckpointStore) -> Iterator[Gate]:
    result = Gate()
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tensors", result)
        yield result
        result.opened.set()
        store._background.join()


def test_the_copy_is_of_the_call(store: CheckpointStore, gate: Gate) -> None:
    """`save_async` returns before anything is written; what training does to the tensors afterwards is not in the checkpoint."""
    state = tensors(40)
    meta = {"nimg": 40}
    store.save_async(40, state, meta)
    assert gate.entered.wait(20)
    assert store.writing()
    assert [path.name for path in store.paths()] == ["step-00000020", "step-00000030"]
    meta["nimg"] = 41
    for tensor in state.values():
        tensor.add_(1)
    store.check()
    gate.opened.set()
    store.wait()
    assert not store.writing()
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta == {"iteration": 40, "nimg": 40}
    for name, expected in tensors(40).items():
        assert torch.equal(loaded.tensors[name], expected), name


def test_a_write_waits_for_the_one_before(store: CheckpointStore, gate: Gate) -> None:
    """The copies are in use until it has ended: another `save_async` or `save` does not start before."""
    for again in (store.save_async, store.save):
        gate.opened.clear()
        gate.entered.clear()
        iteration = 40 if again == store.save_async else 60
        store.save_async(iteration, tensors(iteration), {})
        assert gate.entered.wait(20)
        opener = threading.Timer(0.1, gate.opened.set)
        opener.start()
        again(iteration + 10, tensors(iteration + 10), {})
        opener.join()
        assert gate.opened.is_set()
        assert (store.folder / f"step-{iteration:08d}").is_dir()
        store.wait()
    loaded = store.load()
    assert loaded is not None
    assert torch.equal(loaded.tensors["net/weight"], tensors(70)["net/weight"])


@pytest.mark.parametrize("ask", ["check", "wait", "save_async", "save", "locked"])
def test_a_failed_write_is_said_once(store: CheckpointStore, gate: Gate, ask: str) -> None:
    """By whatever is called next; one sentence with file, reason and remedy. Afterwards the store works as before."""
    gate.error = OSError(errno.EROFS, "Read-only file system")  # type: ignore[assignment]
    gate.opened.set()
    words = (
        r"\.tmp-step-00000040/state\.safetensors: writing checkpoint 40 failed: Read-only file system; make the folder writable "
        r"and start the run again: it goes on from step-00000030$"
    )
    if ask == "locked":
        with pytest.raises(CheckpointError, match=words), store.locked():
            store.save_async(40, tensors(40), {})
    else:
        store.save_async(40, tensors(40), {})
        store._background.join()
        with pytest.raises(CheckpointError, match=words):
            getattr(store, ask)(*((50, tensors(50), {}) if "save" in ask else ()))
    gate.error = None
    assert not list(store.folder.glob(".tmp-*"))
    store.check()
    store.save_async(40, tensors(40), {})
    store.wait()
    loaded = store.load()
    assert loaded is not None
    assert loaded.meta["iteration"] == 40


def test_an_error_of_the_run_is_not_hidden(store: CheckpointStore, gate: Gate) -> None:
    """An exception inside `locked` comes through, after the write in progress has ended."""
    threading.Timer(0.1, gate.opened.set).start()

    def run() -> None:
        with store.locked():
            store.save_async(40, tensors(40), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert (store.folder / "step-00000040").is_dir()


def test_the_copies_take_the_state_once() -> None:
    """The memory of the first filling is used by the next; what changes its form, or goes, gives its memory back."""
    buffers = Buffers()
    buffers.fill(tensors(1))
    first = dict(buffers.tensors)
    buffers.fill(tensors(2))
    for name, expected in tensors(2).items():
        assert buffers.tensors[name] is first[name]
        assert torch.equal(first[name], expected)
        assert first[name].is_contiguous()
    changed = {"net/weight": torch.zeros(3), "double": torch.zeros(2), "integer": torch.ones(1, dtype=torch.int64)}
    buffers.fill(changed)
    assert buffers.tensors.keys() == changed.keys()
    assert [buffers.tensors[name] is first[name] for name in changed] == [False, False, True]
    assert buffers.tensors["double"].dtype == torch.float32


def test_the_format_is_that_of_safetensors(tmp_path: Path) -> None:
    """Every type, empty and scalar tensors, any order in memory: the library reads back the same; the digest is the file's."""
    generator = torch.Generator().manual_seed(0)
    expected = {f"{dtype}": (100 * torch.randn(3, 5, generator=generator)).to(dtype) for dtype in DTYPES}
    expected |= {
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "strided": torch.arange(10)[::3],
        'ä → "ß"': torch.ones(3, requires_grad=True),
        "long": torch.arange(3_000_000, dtype=torch.int32),  # several pieces
    }
    digest = write_tensors(expected, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    for name, entry in header.items():  # every tensor can be used where it lies in the file
        assert (begin + entry["data_offsets"][0]) % expected[name].element_size() == 0


def test_a_type_that_the_format_lacks_is_named(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match=r"tensor 'z': expected one of F64, .*, got torch.complex64"):
        store.save(40, {"z": torch.zeros(1, dtype=torch.complex64)}, {})
