# SPDX-License-Identifier: Apache-2.0
"""Damage to any file of a checkpoint, at any place: found, named, the checkpoint before used; never a run from step 0 instead."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core.objectives import Terms
from scm_core.train.checkpoint import MANIFEST, META, TENSORS, CheckpointError, CheckpointStore
from scm_core.train.loop import Continuation, Hooks, train

FILES = (TENSORS, META, MANIFEST)


def positions(size: int) -> list[int]:
    """Places in a file: its ends, its middle, and twenty others."""
    return [0, 1, 7, 8, 9, size // 2, size - 2, size - 1, *random.Random(size).sample(range(size), 20)]


@pytest.fixture
def stored(run: Any, trainer: Any) -> CheckpointStore:
    """Checkpoints 4 and 8 of a run, as the training loop writes them."""
    state, _ = trainer()
    for iteration in (4, 8):
        state.iteration = iteration
        run.store().save(iteration, state.tensors(), {**state.meta(), "monitor": {}, "identity": {}})
    return run.store()


def never(*args: object) -> Terms:
    raise AssertionError("trained a step")


def load(store: CheckpointStore) -> tuple[int, list[str]]:
    """The iteration that is gone on from, and what is warned of."""
    warnings: list[str] = []
    loaded = CheckpointStore(store.folder, warn=warnings.append).load()
    assert loaded is not None
    return loaded.meta["iteration"], warnings


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere(stored: CheckpointStore, name: str) -> None:
    """One bit in any file of the newest checkpoint: it is not used, and the file that has it is named."""
    file = stored.folder / "step-00000008" / name
    data = file.read_bytes()
    for index, position in enumerate(positions(len(data))):
        flipped = bytearray(data)
        flipped[position] ^= 1 << index % 8
        file.write_bytes(flipped)
        iteration, warnings = load(stored)
        assert iteration == 4, (position, index % 8)
        assert len(warnings) == 1
        # a digest or a size in the manifest that is wrong reads as if the file were
        names = FILES if name == MANIFEST else (name,)
        assert any(f"{file.parent / other}: " in warnings[0] for other in names), warnings[0]
    file.write_bytes(data)
    assert load(stored) == (8, [])


@pytest.mark.parametrize("name", FILES)
def test_cut_off_or_longer(stored: CheckpointStore, name: str) -> None:
    """A file that ends anywhere before its end, or after it."""
    file = stored.folder / "step-00000008" / name
    data = file.read_bytes()
    for changed in (*(data[:size] for size in positions(len(data))), data + b"\0", data + data):
        file.write_bytes(changed)
        iteration, warnings = load(stored)
        assert iteration == 4, len(changed)
        assert len(warnings) == 1
        assert f"{file}: " in warnings[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["folder", "link to nothing", "link to itself"])
def test_no_file_at_all(stored: CheckpointStore, name: str, damage: str) -> None:
    """Something else in the place of a file."""
    file = stored.folder / "step-00000008" / name
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.symlink_to("nowhere" if damage == "link to nothing" else name)
    iteration, warnings = load(stored)
    assert iteration == 4
    assert [str(file) in warning for warning in warnings] == [True]


def test_damage_costs_time_only(run: Any, same: Callable[[Any], None]) -> None:
    """A run whose newest checkpoint was damaged goes on from the one before and ends as if nothing had been; that one stays until then."""
    run.go()
    file = run.store().folder / "step-00000016" / TENSORS
    file.write_bytes(file.read_bytes()[:-1])
    run.go()
    same(run)
    assert [path.name for path in run.store().paths()] == ["step-00000012", "step-00000016"]
    assert (run.store().folder / "bad-step-00000016").is_dir()


def test_all_damaged(stored: CheckpointStore, trainer: Any) -> None:
    """CheckpointError with the remedy; not one step is made, and nothing is written."""
    for index, path in enumerate(stored.paths()):
        (path / FILES[index]).write_bytes(b"?")
    before = sorted(path.name for path in stored.folder.iterdir())
    state, _ = trainer()
    with pytest.raises(
        CheckpointError,
        match=r"none of its 2 checkpoints .* restore one from a backup, or delete the folder to start over",
    ):
        train(state, never, never, CheckpointStore(stored.folder, warn=lambda text: None))  # type: ignore[arg-type]
    assert [path.name for path in stored.paths()] == ["step-00000004", "step-00000008"]
    assert {path.name for path in stored.folder.iterdir()} - set(before) <= {".lock"}


def change_missing(tensors: dict[str, Tensor], key: str) -> None:
    del tensors[key]


def change_extra(tensors: dict[str, Tensor], key: str) -> None:
    tensors[f"{key}/other"] = torch.zeros(2)


def change_shape(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key][None]


def change_type(tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = tensors[key].double()


@pytest.mark.parametrize("kind", ["net/conv_in.weight", "optimizer/net/conv_in.weight/exp_avg", "ema", "logvar/"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_missing, "tensor {key!r} is missing"),
        (change_extra, "tensor '{key}/other' is unknown here"),
        (change_shape, "tensor {key!r} has shape"),
        (change_type, "tensor {key!r} has dtype"),
    ],
)
def test_a_tensor_that_does_not_fit(run: Any, trainer: Any, kind: str, change: Any, words: str) -> None:
    """A valid checkpoint of something else: the tensor is named, no step is made, and no weight is changed."""
    state, _ = trainer()
    tensors = dict(state.tensors())
    key = min(name for name in tensors if name.startswith(kind))
    change(tensors, key)
    run.store().save(4, {name: tensor + 1 for name, tensor in tensors.items()}, {**state.meta(), "identity": {}})
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(CheckpointError) as caught:
        train(state, never, never, run.store(), Hooks(message=lambda text: None))  # type: ignore[arg-type]
    assert words.format(key=key) in str(caught.value)
    assert str(run.store().folder / "step-00000004") in str(caught.value)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name])


def test_what_killed_writers_left(stored: CheckpointStore) -> None:
    """Temporary folders, of this iteration or of others, do not hinder the next checkpoint, and go with it."""
    for name in (".tmp-step-00000012", ".tmp-step-00000007"):
        (stored.folder / name / "folder").mkdir(parents=True)
        (stored.folder / name / TENSORS).write_bytes(b"half")
    (stored.folder / ".latest.host-0123456789abcdef.tmp").write_text("step-000")
    assert load(stored) == (8, [])
    stored.save(12, {"x": torch.ones(2)}, {})
    assert load(stored) == (12, [])
    assert sorted(path.name for path in stored.folder.iterdir()) == ["latest", "step-00000008", "step-00000012"]


def test_settings_that_changed(run: Any, trainer: Any) -> None:
    """A run with other settings than its checkpoint's says which, and makes no step; nor does it touch the checkpoint."""
    state, objective = trainer()
    identity = {"training": {"lr": 0.01, "betas": (0.9, 0.99)}, "code": "1a2b3c4d"}
    run.store().save(4, state.tensors(), {**state.meta(), "identity": identity})
    now = {"training": {"lr": 0.02, "betas": (0.9, 0.99)}, "code": "1a2b3c4d"}
    with pytest.raises(
        CheckpointError, match=r"step-00000004: made with other settings: training\.lr 0\.01 → 0\.02; `resume\.allow_"
    ):
        train(state, never, never, run.store(), continuation=Continuation(now))  # type: ignore[arg-type]
    assert json.loads((run.store().folder / "step-00000004" / META).read_text())["identity"]["training"]["lr"] == 0.01
    messages: list[str] = []
    train(state, objective, run.data, run.store(), Hooks(message=messages.append), continuation=Continuation(now, True))
    assert any("training.lr 0.01 → 0.02" in text for text in messages)
