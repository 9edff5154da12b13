# SPDX-License-Identifier: Apache-2.0
"""The store of images and latents: what is read equals what was written, whoever wrote it, and what is damaged is refused."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from scm_core import claims, disk
from scm_core.data import ImageSet, ShardWriter, load_images, save_images, writing
from scm_core.data.images import KIND
from scm_core.data.shards import Field, Sharded, files_of, open_store, read_index
from scm_core.disk import StoreError, file_digest

COUNT, PER_SHARD, BATCH = 50, 8, 3
FIELDS = {"images": Field("uint8", (3, 4, 5)), "depth": Field("float32", (2,))}
CONTEXT = multiprocessing.get_context("fork")


def items(part: range) -> dict[str, np.ndarray]:
    """Each item's numbers are a function of its index alone."""
    made = [np.random.default_rng(index) for index in part]
    return {
        "images": np.stack([rng.integers(0, 256, (3, 4, 5), dtype=np.uint8) for rng in made]),
        "depth": np.stack([rng.normal(size=2).astype(np.float32) for rng in made]),
    }


def writer(folder: Path, **changed: object) -> ShardWriter:
    return ShardWriter(folder, "test", **{"fields": FIELDS, "count": COUNT, "per_shard": PER_SHARD, **changed})  # type: ignore[arg-type]


def finished(folder: Path, fill: Callable[[range], Mapping[str, np.ndarray]] = items) -> Path:
    store = writer(folder)
    store.fill(fill, BATCH)
    store.finish({"labels": np.arange(COUNT)}, {"name": "x"})
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in folder.iterdir()}


@pytest.fixture
def small() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(12) % 4, "small")


@pytest.fixture
def children() -> Iterator[list[multiprocessing.Process]]:
    started: list[multiprocessing.Process] = []
    yield started
    for child in started:
        child.kill()
        child.join()


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """By index in any order, negative and repeated ones too, by slices within and over shards, one by one and all in order."""
    store = open_store(finished(tmp_path / "s"), "test", verify=True)
    expected = items(range(COUNT))
    assert (store.arrays["labels"].tolist(), store.meta) == (list(range(COUNT)), {"name": "x"})
    for name, field in store.fields.items():
        whole = torch.from_numpy(expected[name])
        assert (len(field), field.shape, field.ndim, field.dtype) == (COUNT, whole.shape, whole.ndim, whole.dtype)
        order = torch.randint(-COUNT, COUNT, (200,), generator=torch.Generator().manual_seed(1))
        assert torch.equal(field[order], whole[order])
        assert torch.equal(field[torch.tensor([9, 15, 8])], whole[[9, 15, 8]])  # of one shard
        assert field[torch.empty(0, dtype=torch.int64)].shape == (0, *whole.shape[1:])
        for part in (slice(None), slice(3, 7), slice(5, 31), slice(-4, None), slice(1, 40, 6), slice(7, 3)):
            assert torch.equal(field[part], whole[list(range(*part.indices(COUNT)))])
        assert torch.equal(field[-1], whole[-1])
        assert torch.equal(torch.cat(list(field.split(7))), whole)
        field[order].zero_()  # a copy: the file stays
        assert torch.equal(field[:], whole)
        for wrong in (torch.tensor([0, COUNT]), torch.tensor([-COUNT - 1])):
            with pytest.raises(IndexError, match=rf"expected indices in -{COUNT}…{COUNT - 1}"):
                field[wrong]
        with pytest.raises(IndexError, match="expected an int64 tensor"):
            field[torch.tensor([0.0])]


def test_shards_are_plain_npy_files(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    names = {f"{field}-{k:05d}.npy" for field in FIELDS for k in range(7)}
    assert {path.name for path in folder.iterdir()} == names | {"labels.npy", "index.json"}
    loaded = [np.load(folder / f"depth-{k:05d}.npy", allow_pickle=False) for k in range(7)]
    assert [len(part) for part in loaded] == [8] * 6 + [2]
    assert np.array_equal(np.concatenate(loaded), items(range(COUNT))["depth"])


def test_the_size_of_shards_follows_from_the_items() -> None:
    """128 MiB, but never more than 256 files: so many hold any data set within the descriptors that a process has."""

    def plan(count: int, *shape: int, dtype: str = "uint8", fields: int = 1) -> tuple[int, int]:
        store = object.__new__(ShardWriter)
        store._prepare = lambda made_from: None  # type: ignore[method-assign]
        ShardWriter.__init__(store, "x", "test", {f"f{i}": Field(dtype, shape) for i in range(fields)}, count)
        return store.per_shard, store.shards

    assert plan(5000, 1, 32, 32) == (131072, 1)
    assert plan(50_000, 3, 32, 32) == (43690, 2)
    assert plan(1_281_167, 3, 64, 64) == (10922, 118)
    assert plan(1_281_167, 4, 64, 64, dtype="float32", fields=2) == (5005, 256)
    assert plan(1_281_167, 3, 512, 512) == (5005, 256)


def test_many_processes_make_one_store(tmp_path: Path, children: list[multiprocessing.Process]) -> None:
    """Each shard is made once, by one of them, and the store is that of one process byte for byte."""
    calls = tmp_path / "calls"
    calls.mkdir()

    def slow(part: range) -> Mapping[str, np.ndarray]:
        (calls / f"{part.start}-{os.getpid()}").touch()
        time.sleep(0.01)
        return items(part)

    def work(rank: int) -> None:
        writer(tmp_path / "many").fill(slow, BATCH, shard=(rank, 3))

    children += [CONTEXT.Process(target=work, args=(rank,)) for rank in (1, 2)]  # type: ignore[misc]
    for child in children:
        child.start()
    done: list[int] = []
    store = writer(tmp_path / "many")
    store.fill(slow, BATCH, shard=(0, 3), progress=done.append)
    store.finish({"labels": np.arange(COUNT)}, {"name": "x"})
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    starts = [int(path.name.split("-")[0]) for path in calls.iterdir()]
    assert sorted(starts) == [s for k in range(7) for s in range(8 * k, min(8 * k + 8, COUNT), BATCH)]
    assert done[-1] == COUNT
    assert digests(tmp_path / "many") == digests(finished(tmp_path / "one"))


@pytest.mark.parametrize("after", [0, 5, 17])
def test_a_killed_writer_loses_one_shard(tmp_path: Path, children: list[multiprocessing.Process], after: int) -> None:
    """What is left is not made again, and the store equals an uninterrupted one byte for byte."""

    def dying(part: range) -> Mapping[str, np.ndarray]:
        made.value += 1
        if made.value > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return items(part)

    made = CONTEXT.Value("i", 0)
    children.append(CONTEXT.Process(target=lambda: writer(tmp_path / "s").fill(dying, BATCH)))  # type: ignore[arg-type]
    children[0].start()
    children[0].join(30)
    assert children[0].exitcode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        open_store(tmp_path / "s", "test")

    again: list[int] = []

    def counted(part: range) -> Mapping[str, np.ndarray]:
        again.append(part.start)
        return items(part)

    assert writer(tmp_path / "s").done() == after // 3 * PER_SHARD  # of three batches each
    finished(tmp_path / "s", counted)
    assert min(again) == after // 3 * PER_SHARD
    assert digests(tmp_path / "s") == digests(finished(tmp_path / "whole"))


def test_a_failing_source_leaves_no_half_shard(tmp_path: Path) -> None:
    def failing(part: range) -> Mapping[str, np.ndarray]:
        if part.start >= 11:
            raise ValueError("picture 11 does not decode")
        return items(part)

    with pytest.raises(ValueError, match="picture 11 does not decode"):
        finished(tmp_path, failing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth-00000.npy", "images-00000.npy", "unfinished"]
    finished(tmp_path)
    assert open_store(tmp_path, "test", verify=True)


def test_a_shard_that_was_cut_is_made_again(tmp_path: Path) -> None:
    store = writer(tmp_path)
    store.fill(items, BATCH)
    os.truncate(tmp_path / "images-00002.npy", 200)
    assert store.done() == COUNT - PER_SHARD
    finished(tmp_path)
    assert open_store(tmp_path, "test", verify=True)


def test_a_finished_store_stays_and_can_be_given_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tmp_path / "s")
    before = digests(tmp_path / "s")
    store = writer(tmp_path / "s")
    assert store.finished
    assert store.done() == COUNT
    store.fill(lambda part: pytest.fail("nothing is missing"), BATCH)
    store.finish({}, {"name": "another"})
    store.move(tmp_path / "linked")
    assert digests(tmp_path / "s") == digests(tmp_path / "linked") == before
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError("no links here")))
    store.move(tmp_path / "moved")
    assert digests(tmp_path / "moved") == before
    assert not list((tmp_path / "s").iterdir())


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    writer(tmp_path, made_from={"list": "a"})
    remedy = rf"was begun as a store of other items or with other data; remove {tmp_path} and start again"
    for changed in ({"made_from": {"list": "b"}}, {"count": 51}, {"per_shard": 7}, {"fields": {"x": FIELDS["depth"]}}):
        with pytest.raises(StoreError, match=remedy):
            writer(tmp_path, **{"made_from": {"list": "a"}, **changed})
    (tmp_path / "unfinished" / "plan.json").write_text("{")
    with pytest.raises(StoreError, match=r"plan\.json: is corrupt"):
        writer(tmp_path, made_from={"list": "a"})
    finished(tmp_path / "done")
    with pytest.raises(StoreError, match="holds a store of other items"):
        writer(tmp_path / "done", count=51)


def test_items_of_another_shape_or_type_are_refused(tmp_path: Path) -> None:
    for name, change in (
        ("images", lambda a: a[:, :1]), ("images", lambda a: a[:2]), ("depth", lambda a: a.astype(np.float64)),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=rf"{name} of items 0…2: expected "):
            finished(tmp_path, lambda part, name=name, change=change: {**items(part), name: change(items(part)[name])})  # type: ignore[misc]
    with pytest.raises(StoreError, match="shard 0 of 7 is missing; fill the store first"):
        writer(tmp_path).finish({}, {})
    with pytest.raises(ValueError, match="at least one item, got 0"):
        writer(tmp_path / "none", count=0)
    with pytest.raises(ValueError, match="batch must be ≥ 1"):
        writer(tmp_path).fill(items, 0)


def test_a_small_disk_is_found_out_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    fields = {"images": Field("uint8", (3, 512, 512))}
    with pytest.raises(
        StoreError, match=r"the store of 1281167 items needs 1007\.6 GB, 1\.0 MB are free; free some space"
    ):
        ShardWriter(tmp_path, KIND, fields, 1_281_167)


def test_a_full_disk_is_said_and_loses_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    store = writer(tmp_path)
    calls: list[int] = []

    def some(part: range) -> Mapping[str, np.ndarray]:
        calls.append(part.start)
        if part.start == 16:
            monkeypatch.setattr(writing._Hashed, "write", full)
        return items(part)

    with pytest.raises(
        StoreError,
        match=r"writing shard 2 failed: No space left on device; free some space there and start again: the shards that are there stay",
    ):
        store.fill(some, BATCH)
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    finished(tmp_path)
    assert open_store(tmp_path, "test", verify=True)


def test_who_is_waited_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PATIENCE", 0.0)
    store, said = writer(tmp_path), []
    with claims.claimed(tmp_path / "unfinished" / "00003.lock", "shard 3", ""):

        def notify(message: str) -> None:
            said.append(message)
            raise InterruptedError

        store.notify = notify
        with pytest.raises(InterruptedError):
            store.fill(items, BATCH)
    assert said == [f"{tmp_path}: waiting for shard 3, which pid {os.getpid()} on {os.uname().nodename} is making"]
    assert store.done() == COUNT - PER_SHARD


def test_images_survive_the_disk(small: ImageSet, tmp_path: Path) -> None:
    save_images(small, tmp_path / "set")
    loaded = load_images(tmp_path / "set", verify=True)
    assert isinstance(loaded.images, Sharded)
    assert torch.equal(loaded.images[:], small.images)
    assert torch.equal(loaded.labels, small.labels)
    assert (loaded.name, loaded.num_labels, loaded.shape, loaded.digest) == ("small", 4, (3, 4, 5), small.digest)


def test_the_files_are_the_same_each_time(small: ImageSet, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_images(small, tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_damaged_stores_are_refused(small: ImageSet, tmp_path: Path) -> None:
    path, index = tmp_path / "images-00000.npy", tmp_path / "index.json"
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing: .* holds no image set; make it first"):
        load_images(tmp_path)

    save_images(small, tmp_path)
    good, text = path.read_bytes(), index.read_text()
    path.write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"images-00000\.npy is truncated or changed"):
        load_images(tmp_path)

    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"images-00000\.npy is corrupt"):
        load_images(tmp_path, verify=True)

    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"images-00000\.npy is missing"):
        load_images(tmp_path)

    path.write_bytes(good)
    for wrong, message in ((text[:-9], "corrupt"), ("[]", "not an index"), ("{}", "not an index")):
        index.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path)
    known = json.loads(text)
    for key in ("count", "per_shard", "fields", "arrays", "meta"):
        index.write_text(json.dumps({k: v for k, v in known.items() if k != key}))
        with pytest.raises(ValueError, match=rf"index\.json is incomplete \(KeyError\('{key}'\)\)"):
            load_images(tmp_path)
    for change, message in (({"count": 13}, "says otherwise"), ({"per_shard": 6}, "more or fewer")):
        index.write_text(json.dumps({**known, **change}))
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path)


def test_another_kind_is_refused(small: ImageSet, tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(ValueError, match="holds test, image set expected"):
        load_images(tmp_path)
    store = ShardWriter(tmp_path / "x", KIND, {"images": Field("uint8", (3, 4, 5))}, 12)
    store.fill(lambda part: {"images": small.images[part.start : part.stop].numpy()}, 5)
    store.finish({}, {"name": "x"})
    with pytest.raises(ValueError, match="needs a name, images and labels"):
        load_images(tmp_path / "x")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    store = writer(tmp_path)
    store.fill(items, BATCH)
    with pytest.raises(ValueError, match="would be pickled"):
        store.finish({"objects": np.array([{}], dtype=object)}, {})
    finished(tmp_path)
    index = read_index(tmp_path, "test")
    for name in ("labels.npy", "images-00000.npy"):
        good = (tmp_path / name).read_bytes()
        np.save(tmp_path / name, np.array([{}], dtype=object), allow_pickle=True)
        entry = files_of(index)[name]
        entry["bytes"] = (tmp_path / name).stat().st_size  # type: ignore[index]
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=rf"{name} is no readable \.npy file of plain numbers"):
            open_store(tmp_path, "test")
        entry["bytes"] = len(good)  # type: ignore[index]
        (tmp_path / name).write_bytes(good)
