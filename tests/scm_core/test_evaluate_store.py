# SPDX-License-Identifier: Apache-2.0
"""The feature store: one pass, the same digits whoever computes and whatever kills it, nothing damaged taken for good."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core import claims
from scm_core.evaluate.folder import ImageFolder
from scm_core.evaluate.manifest import ImagesManifest, SampleManifest, identities
from scm_core.evaluate.store import FeatureStore, StoreError

CHUNK = 4
SIZE = 6  # images 3×6×6


@dataclasses.dataclass(frozen=True)
class Projection:
    """A fixed random projection of the pixels; its own identity."""

    dim: int
    seed: int = 0

    @property
    def identity(self) -> "Projection":
        return self

    def to_json(self) -> dict[str, Any]:
        return {"name": "projection", "dim": self.dim, "seed": self.seed}

    def matrix(self) -> Tensor:
        return torch.randn(3 * SIZE * SIZE, self.dim, generator=torch.Generator().manual_seed(self.seed))

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() / 255).flatten(1) @ self.matrix()


EXTRACTORS = {"small": Projection(5), "large": Projection(32, seed=1)}


def images(indices: range) -> Tensor:
    """Each from its own index."""
    shape = (3, SIZE, SIZE)
    draw = (torch.randint(256, shape, generator=torch.Generator().manual_seed(i)).to(torch.uint8) for i in indices)
    return torch.stack(list(draw))


class Recorded:
    """`images`, with a line in a file for every call, whichever process makes it; each takes `seconds`."""

    def __init__(self, file: Path, seconds: float = 0.0) -> None:
        self.file, self.seconds = file, seconds

    def __call__(self, indices: range) -> Tensor:
        time.sleep(self.seconds)
        line = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(line, f"{indices.start} {indices.stop}\n".encode())
        os.close(line)
        return images(indices)

    def calls(self) -> list[range]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [range(*map(int, line.split())) for line in lines]


def manifest(**changed: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_sha256": "a" * 64, "sampler": "heun", "steps": 18, "times": None, "guidance": 1.25, "sigma_data": 0.5,
        "noise": "index", "first_index": 0, "labels": "none", "decoder_sha256": None, "dtype": "float32", "code": None,
        "chunk": CHUNK, "extractors": identities(EXTRACTORS),
    }  # fmt: skip
    return SampleManifest(**values | changed).to_json()


def opened(folder: Path, count: int, warnings: list[str] | None = None) -> FeatureStore:
    return FeatureStore(folder, manifest(), count, CHUNK, warn=(warnings if warnings is not None else []).append)


def expected(name: str, count: int) -> Tensor:
    """What one pass over whole chunks gives, without a store."""
    starts = range(0, count, CHUNK)
    return torch.cat([EXTRACTORS[name](images(range(i, i + CHUNK))) for i in starts])[:count]


def same(store: FeatureStore, count: int) -> None:
    for name in EXTRACTORS:
        assert torch.equal(store.features(name, count), expected(name, count))


def listed(store: FeatureStore) -> dict[str, bytes]:
    """The contents of the chunks by name: bitwise equal stores have equal ones."""
    return {path.name: path.read_bytes() for path in store.path.glob("chunk-*")}


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened for 20 s"
        time.sleep(0.005)


@pytest.fixture
def filled(tmp_path: Path) -> FeatureStore:
    """Three chunks, of which ten samples are wanted."""
    store = opened(tmp_path / "cache", 10)
    store.fill(images, EXTRACTORS)
    return store


def test_features_are_those_of_the_images_in_order(filled: FeatureStore) -> None:
    for name, extractor in EXTRACTORS.items():
        features = filled.features(name)
        assert features.dtype == torch.float32
        exact = (images(range(10)).double() / 255).flatten(1) @ extractor.matrix().double()
        torch.testing.assert_close(features.double(), exact, rtol=1e-5, atol=1e-5)
        assert [len(part) for part in filled.parts(name)] == [4, 4, 2]
        assert torch.equal(torch.cat(list(filled.parts(name))), features)
    same(filled, 10)


def test_more_samples_extend_a_store(tmp_path: Path) -> None:
    """Nothing twice, and the digits of the first ones do not depend on how many there are: the cut chunk was whole."""
    recorded, before = Recorded(tmp_path / "calls"), {}
    for count, chunks in ((3, 1), (4, 1), (10, 3), (10, 3), (17, 5)):
        store, seen = opened(tmp_path / "cache", count), []
        store.fill(recorded, EXTRACTORS, progress=seen.append)
        assert recorded.calls() == [range(i, i + CHUNK) for i in range(0, chunks * CHUNK, CHUNK)]
        assert seen == [min(i + CHUNK, count) for i in range(0, count, CHUNK)]
        assert before.items() <= listed(store).items()
        before = listed(store)
        same(store, count)
    same(store, 6)


def test_the_key_names_the_folder_and_other_ingredients_another(tmp_path: Path) -> None:
    store = opened(tmp_path, 4)
    store.fill(images, EXTRACTORS)
    assert store.path == tmp_path / SampleManifest(**{k: v for k, v in manifest().items() if k != "kind"}).key
    other = FeatureStore(tmp_path, manifest(guidance=1.0), 4, CHUNK)
    assert other.path != store.path
    with pytest.raises(StoreError, match=r"of the 1 chunks of 4 samples 1 are missing, from 0 on; fill the store"):
        other.features("small")


def test_a_set_that_ends_has_a_short_last_chunk(tmp_path: Path) -> None:
    """A folder of images: one pass over each, and no index beyond its end."""
    other = opened(tmp_path / "cache", 10)
    other.fill(images, EXTRACTORS, keep_images=tmp_path / "images")
    folder = ImageFolder(tmp_path / "images", 10)
    described = ImagesManifest(
        images_sha256=folder.digest, size=len(folder), chunk=CHUNK, extractors=identities(EXTRACTORS)
    ).to_json()
    store = FeatureStore(tmp_path / "cache", described, 10, CHUNK)
    store.fill(folder, EXTRACTORS)
    assert torch.equal(store.features("small")[:8], other.features("small")[:8])
    torch.testing.assert_close(store.features("small")[8:], other.features("small")[8:])  # a batch of 2, not 4
    with pytest.raises(ValueError, match="count: expected at most the 10 images of the set, got 11"):
        FeatureStore(tmp_path / "cache", described, 11, CHUNK)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_processes(tmp_path: Path, processes: Any, count: int) -> None:
    """Each chunk is computed once, by one of them; the files are the same bytes, and each process finds them complete."""
    recorded, samples = Recorded(tmp_path / "calls", 0.01), 30

    def work(rank: int) -> dict[str, bytes]:
        store = opened(tmp_path / "cache", samples)
        store.fill(recorded, EXTRACTORS)
        same(store, samples)
        return listed(store)

    results = processes(work, count)
    alone = opened(tmp_path / "alone", samples)
    alone.fill(images, EXTRACTORS)
    assert all(result == listed(alone) for result in results)
    assert sorted(call.start for call in recorded.calls()) == list(range(0, 32, CHUNK))
    store = opened(tmp_path / "cache", samples)
    assert sorted(path.name for path in store.path.iterdir()) == sorted([*listed(alone), "claims", "manifest.json"])
    assert list((store.path / "claims").iterdir()) == []


def test_a_process_takes_its_share_first(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "calls")
    opened(tmp_path / "cache", 24).fill(recorded, EXTRACTORS, shard=(1, 3))
    assert [call.start // CHUNK for call in recorded.calls()] == [1, 4, 0, 2, 3, 5]
    for shard in ((2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="shard: expected"):
            opened(tmp_path / "cache", 24).fill(recorded, EXTRACTORS, shard=shard)


def test_killed_at_any_moment(tmp_path: Path, processes: Any) -> None:
    """SIGKILL, ten times: what is there is valid and never made again; the end is that of an uninterrupted pass, bit for bit."""
    recorded, samples, moments = Recorded(tmp_path / "calls", 0.005), 200, random.Random(0)
    store = opened(tmp_path / "cache", samples)
    rounds: list[tuple[set[int], int]] = []  # the chunks that were there, and how many had been begun
    for _ in range(10):
        before = len(recorded.calls())
        (process,) = processes.start(lambda rank: opened(tmp_path / "cache", samples).fill(recorded, EXTRACTORS), 1)
        calls = before + moments.randint(0, 2)
        until(lambda calls=calls: len(recorded.calls()) > calls)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        there = {int(name[6:14]) for name in listed(store)}
        if there:
            assert there == set(range(len(there)))
            same(store, len(there) * CHUNK)
        rounds.append((there, len(recorded.calls())))
    store.fill(recorded, EXTRACTORS)
    for there, begun in rounds:
        assert not there & {call.start // CHUNK for call in recorded.calls()[begun:]}
    assert len({len(there) for there, _ in rounds}) > 3, "killed where it matters: between the first chunk and the last"
    same(store, samples)
    alone = opened(tmp_path / "alone", samples)
    alone.fill(images, EXTRACTORS)
    assert listed(store) == listed(alone)
    assert {path.name for path in store.path.iterdir()} == {*listed(alone), "claims", "manifest.json"}


def test_killed_while_writing(tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst moments: before each rename and each fsync. What it left behind is no chunk, and is cleared away."""
    for call in range(1, 9):
        store = opened(tmp_path / f"cache-{call}", 8)

        def work(rank: int, store: FeatureStore = store, call: int = call) -> None:
            left = [call]

            def stop(*arguments: Any) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            fsync, replace = os.fsync, os.replace
            os.fsync = lambda *a: (stop(), fsync(*a))[1]
            os.replace = lambda *a: (stop(), replace(*a))[1]
            store.fill(images, EXTRACTORS)

        (process,) = processes.start(work, 1)
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
        assert len(listed(store)) == [0, 0, 0, 0, 0, 1, 1, 1][call - 1]
        store.fill(images, EXTRACTORS)
        same(store, 8)
        assert list(store.path.glob(".chunk*")) == []


def test_what_a_dead_process_left_is_taken_over(tmp_path: Path, processes: Any) -> None:
    """While it lives, the others wait for its chunk; when it is killed, one of them makes it."""
    recorded, folder = Recorded(tmp_path / "calls"), tmp_path / "cache"

    def hang(indices: range) -> Tensor:
        (tmp_path / "hanging").touch()
        time.sleep(60)
        return images(indices)

    (stuck,) = processes.start(lambda rank: opened(folder, 12).fill(hang, EXTRACTORS), 1)
    until((tmp_path / "hanging").exists)
    (other,) = processes.start(lambda rank: opened(folder, 12).fill(recorded, EXTRACTORS), 1)
    until(lambda: len(recorded.calls()) == 2)
    time.sleep(0.2)
    assert [call.start for call in recorded.calls()] == [4, 8]
    assert other.is_alive()
    with pytest.raises(StoreError, match=rf"is being filled by pid {stuck.pid} on .*; wait for it"):
        opened(folder, 12).drop()
    assert len(listed(opened(folder, 12))) == 2
    stuck.kill()
    stuck.join()
    other.join(20)
    assert other.exitcode == 0
    assert [call.start for call in recorded.calls()] == [4, 8, 0]
    same(opened(folder, 12), 12)


def test_a_chunk_that_was_published_before_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the lock another process may have made it: it is looked for again, and not made twice."""
    recorded, exclusive = Recorded(tmp_path / "calls"), claims.exclusive
    monkeypatch.setattr(claims, "exclusive", lambda path: (fill(), exclusive(path))[1])

    def fill() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(claims, "exclusive", exclusive)
            opened(tmp_path / "cache", 8).fill(recorded, EXTRACTORS)

    opened(tmp_path / "cache", 8).fill(recorded, EXTRACTORS)
    assert [call.start for call in recorded.calls()] == [0, 4]


def test_who_is_waited_for_is_said(tmp_path: Path, processes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a while, in case it hangs."""
    started, release, warnings = tmp_path / "started", tmp_path / "release", []

    def slow(indices: range) -> Tensor:
        started.touch()
        until(release.exists)
        return images(indices)

    def warn(message: str) -> None:
        warnings.append(message)
        release.touch()

    (process,) = processes.start(lambda rank: opened(tmp_path / "cache", 4).fill(slow, EXTRACTORS), 1)
    until(started.exists)
    monkeypatch.setattr(claims, "PATIENCE", 0.1)
    store = FeatureStore(tmp_path / "cache", manifest(), 4, CHUNK, warn)
    store.fill(images, EXTRACTORS)
    assert f"{store.path}: waiting for chunk 0, which pid {process.pid} on " in warnings[0]


def test_a_failure_is_not_passed_on(tmp_path: Path, processes: Any) -> None:
    """A process whose images fail says so; another one, waiting for it, makes the chunk."""

    def fail(indices: range) -> Tensor:
        (tmp_path / "started").touch()
        time.sleep(0.1)
        raise ZeroDivisionError

    (process,) = processes.start(lambda rank: opened(tmp_path / "cache", 4).fill(fail, EXTRACTORS), 1)
    until((tmp_path / "started").exists)
    store = opened(tmp_path / "cache", 4)
    store.fill(images, EXTRACTORS)
    same(store, 4)
    process.join(20)
    assert process.exitcode == 1
    assert "ZeroDivisionError" in processes.errors(0)


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-7],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "a bit of the length": lambda content: flipped(content, 0),
    "a bit of the header": lambda content: flipped(content, 40),
    "a bit of a number": lambda content: flipped(content, len(content) - 4),
    "another file": lambda content: b"hello",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_is_refused_and_made_again_aloud(tmp_path: Path, damage: str) -> None:
    warnings: list[str] = []
    recorded = Recorded(tmp_path / "calls")
    store = opened(tmp_path / "cache", 10, warnings)
    store.fill(recorded, EXTRACTORS)
    before = listed(store)
    path = sorted(store.path.glob("chunk-00000001-*"))[0]
    path.write_bytes(DAMAGES[damage](before[path.name]))
    parts = store.parts("small")
    assert torch.equal(next(parts), expected("small", 4))  # chunk by chunk: what comes before is not held up
    with pytest.raises(StoreError) as caught:
        next(parts)
    words = f"{path}: truncated or changed (its SHA-256 is not the one in its name)"
    assert str(caught.value) == f"{words}; fill the store again, which sets it aside and computes it anew"
    with pytest.raises(StoreError):
        store.features("large")
    store.fill(recorded, EXTRACTORS)
    assert warnings == [f"{words}; kept as bad-{path.name}, and computed again"]
    assert [call.start for call in recorded.calls()] == [0, 4, 8, 4]
    assert listed(store) == before
    assert (store.path / f"bad-{path.name}").read_bytes() == DAMAGES[damage](before[path.name])


def test_two_processes_that_find_one_damaged_chunk(tmp_path: Path, processes: Any) -> None:
    recorded, folder = Recorded(tmp_path / "calls", 0.05), tmp_path / "cache"
    store = opened(folder, 12)
    store.fill(recorded, EXTRACTORS)
    before = listed(store)
    path = sorted(store.path.glob("chunk-*"))[1]
    path.write_bytes(before[path.name][:-1])

    def work(rank: int) -> list[str]:
        warnings: list[str] = []
        opened(folder, 12, warnings).fill(recorded, EXTRACTORS)
        return warnings

    assert len([warning for warnings in processes(work, 3) for warning in warnings]) == 1
    assert len(recorded.calls()) == 4
    assert listed(store) == before


def renamed(path: Path, index: int) -> Path:
    return path.with_name(f"chunk-{index:08d}-{path.stem.rpartition('-')[2]}.safetensors")


def test_a_chunk_in_the_place_of_another(tmp_path: Path, filled: FeatureStore) -> None:
    """Of other samples, or of another set: its digits are sound, and not those that are asked for."""
    first, second, _ = sorted(filled.path.glob("chunk-*"))
    content = second.read_bytes()
    second.unlink()
    shutil.copy(first, renamed(first, 1))
    with pytest.raises(StoreError, match=rf"holds chunk 0 of the store {filled.key}; fill the store again"):
        filled.features("small")
    filled.fill(images, EXTRACTORS)
    same(filled, 10)
    assert second.read_bytes() == content
    other = FeatureStore(tmp_path, manifest(first_index=10), 4, CHUNK)
    other.fill(lambda indices: images(range(indices.start + 10, indices.stop + 10)), EXTRACTORS)
    (foreign,) = other.path.glob("chunk-*")
    second.unlink()
    shutil.copy(foreign, filled.path / renamed(foreign, 1).name)
    with pytest.raises(StoreError, match=rf"holds chunk 0 of the store {other.key}"):
        filled.features("small")


def test_two_contents_of_one_chunk_are_refused(tmp_path: Path, filled: FeatureStore) -> None:
    """What two machines leave that do not see each other's locks and compute different digits: neither is preferred in silence."""
    twin = opened(tmp_path / "twin", 4)
    twin.fill(lambda indices: images(indices) ^ 1, EXTRACTORS)
    (path,) = twin.path.glob("chunk-*")
    shutil.copy(path, filled.path)
    for use in (lambda: filled.features("small"), lambda: filled.fill(images, EXTRACTORS)):
        with pytest.raises(
            StoreError, match=r"chunk 0 is there twice with different contents.*; delete one of the two"
        ):
            use()


def test_a_folder_with_another_manifest(tmp_path: Path, filled: FeatureStore) -> None:
    file = filled.path / "manifest.json"
    text = file.read_text()
    assert json.loads(text) == json.loads(json.dumps(manifest()))
    file.write_text(text.replace('"guidance": 1.25', '"guidance": 1.5'))
    with pytest.raises(StoreError, match=rf"{file}: is the manifest of another set \(guidance 1.5 → 1.25\); delete"):
        opened(tmp_path / "cache", 10)
    file.write_text(text[:-9])
    with pytest.raises(StoreError, match=rf"{file}: damaged .*; delete {filled.path} and fill it again"):
        opened(tmp_path / "cache", 10)
    file.write_text("[1]")
    with pytest.raises(StoreError, match="another set"):
        opened(tmp_path / "cache", 10)
    file.write_text(json.dumps(json.loads(text)))  # the same manifest in other words
    same(opened(tmp_path / "cache", 10), 10)


def test_other_extractors_than_the_manifest_says(tmp_path: Path) -> None:
    store = opened(tmp_path, 4)
    for extractors, words in (
        ({"small": EXTRACTORS["small"]}, "large.* removed"),
        (EXTRACTORS | {"third": Projection(2)}, "third.* added"),
        (EXTRACTORS | {"small": Projection(5, seed=9)}, r"small\.seed 0 → 9"),
    ):
        with pytest.raises(ValueError, match=rf"extractors: expected those of the manifest, got others \(.*{words}"):
            store.fill(images, extractors)
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_disagree(tmp_path: Path) -> None:
    for chunk in (0, 5, 4.0, True):
        with pytest.raises(ValueError, match=r"chunk: expected a whole number ≥ 1, that of the manifest"):
            FeatureStore(tmp_path, manifest(), 4, chunk)  # type: ignore[arg-type]
    for count in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="count: expected a number of samples ≥ 1"):
            opened(tmp_path, count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"manifest\.extractors: expected the extractors' identities"):
        FeatureStore(tmp_path, {"chunk": 4}, 4, 4)
    with pytest.raises(ValueError, match=r"manifest\.size: expected the number of images of the set, got '5'"):
        FeatureStore(tmp_path, manifest() | {"size": "5"}, 4, CHUNK)
    with pytest.raises(ValueError, match=r"manifest\.guidance: expected a finite number, got nan"):
        FeatureStore(tmp_path, manifest() | {"guidance": float("nan")}, 4, CHUNK)
    assert list(tmp_path.iterdir()) == []


BAD_IMAGES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "in [-1, 1]": (lambda x: x / 127.5 - 1, r"expected uint8 in 0…255, got torch.float32 in -1…1; round them"),
    "int64": (lambda x: x.long(), r"expected uint8 in 0…255, got torch.int64 in 0…255"),
    "two channels": (lambda x: x[:, :2], r"expected shape \(4, 1 or 3, H, W\), got \(4, 2, 6, 6\)"),
    "RGBA": (lambda x: torch.cat([x, x[:, :1]], 1), r"got \(4, 4, 6, 6\)"),
    "one too few": (lambda x: x[1:], r"got \(3, 3, 6, 6\); give one image for each index"),
    "one too many": (lambda x: torch.cat([x, x[:1]]), r"got \(5, 3, 6, 6\)"),
    "without channels": (lambda x: x[:, 0], r"got \(4, 6, 6\)"),
    "nothing": (lambda x: x[..., :0], r"got \(4, 3, 6, 0\)"),
    "an array": (lambda x: x.numpy(), "expected a tensor, got ndarray"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_wrong_images_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    change, words = BAD_IMAGES[case]
    store = opened(tmp_path / "cache", 10)

    def wrong(indices: range) -> Any:
        # black and white, so that the range in the message is known
        return change((images(indices) > 127).to(torch.uint8) * 255) if indices.start == 4 else images(indices)

    with pytest.raises(ValueError, match=rf"^images of samples 4…7: .*{words}"):
        store.fill(wrong, EXTRACTORS, keep_images=tmp_path / "kept")
    assert sorted(name[:14] for name in listed(store)) == ["chunk-00000000"]
    assert len(ImageFolder(tmp_path / "kept")) == 4
    assert list(store.path.glob(".chunk*")) == []


@dataclasses.dataclass(frozen=True)
class Changing(Projection):
    """Features that are wrong for the images of samples 4 … 7, in a way that a function says."""

    change: Callable[[Tensor], Tensor] = lambda x: x

    def __call__(self, images_: Tensor) -> Tensor:
        features = super().__call__(images_)
        return self.change(features) if torch.equal(images_, images(range(4, 8))) else features


def spoilt(features: Tensor) -> Tensor:
    features = features.clone()
    features[1, 2], features[3, 0] = torch.nan, -torch.inf
    return features


BAD_FEATURES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "not finite": (spoilt, "NaN or infinite for 5, 7; look at these images"),
    "all NaN": (lambda x: x * torch.nan, "NaN or infinite for 4, 5, 6, 7;"),
    "float64": (lambda x: x.double(), r"expected float32 \(4, D\), got torch.float64 \(4, 5\)"),
    "one too few": (lambda x: x[1:], r"expected float32 \(4, D\), got torch.float32 \(3, 5\)"),
    "maps": (lambda x: x[:, :, None], r"got torch.float32 \(4, 5, 1\)"),
}


@pytest.mark.parametrize("case", BAD_FEATURES)
def test_wrong_features_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    change, words = BAD_FEATURES[case]
    store = opened(tmp_path / "cache", 10)
    with pytest.raises(ValueError, match=rf"^features small of samples 4…7: .*{words}"):
        store.fill(images, EXTRACTORS | {"small": Changing(5, change=change)}, keep_images=tmp_path / "kept")
    assert sorted(name[:14] for name in listed(store)) == ["chunk-00000000"]
    assert len(ImageFolder(tmp_path / "kept")) == 4
    store.fill(images, EXTRACTORS)
    same(store, 10)


class Pooled(Projection):
    """Takes images of any size and colour; `widened` gives another number of features than its identity had before."""

    widened = 0

    def __call__(self, images_: Tensor) -> Tensor:
        features = super().__call__(images_[..., :SIZE, :SIZE].expand(-1, 3, -1, -1))
        return torch.nn.functional.pad(features, (0, self.widened))


class Widened(Pooled):
    widened = 2


POOLED = {"small": Pooled(5), "large": Pooled(32, seed=1)}
LAYOUT = "images 3×6×6 with features 32 of large, 5 of small"


def larger(indices: range) -> Tensor:
    """Two columns more from sample 8 on."""
    return torch.nn.functional.pad(images(indices), (0, 2 if indices.start >= 8 else 0))


def test_sizes_that_change_between_chunks(tmp_path: Path, filled: FeatureStore) -> None:
    """Refused within one process, and by the next one; with the features' number it is the same."""
    store = opened(tmp_path / "one", 12)
    words = f"are of images 3×6×8 with features 32 of large, 5 of small, where the chunks before have {LAYOUT}"
    with pytest.raises(StoreError, match=rf"samples 8…11 {words}; give all samples of a set one size"):
        store.fill(larger, POOLED)
    assert len(listed(store)) == 2
    with pytest.raises(StoreError, match=rf"samples 12…15 are of images 1×6×6 .* have {LAYOUT}; give"):
        opened(tmp_path / "cache", 16).fill(lambda indices: images(indices)[:, :1], POOLED)
    with pytest.raises(StoreError, match=r"samples 12…15 are of images 3×6×6 with features 32 of large, 7 of small"):
        opened(tmp_path / "cache", 16).fill(images, POOLED | {"small": Widened(5)})
    same(filled, 10)
    assert len(listed(filled)) == 3


def test_sizes_that_differ_between_processes(tmp_path: Path, filled: FeatureStore) -> None:
    """Side by side neither has seen the other's: found by whoever reads both."""
    elsewhere = opened(tmp_path / "two", 12)
    elsewhere.fill(lambda indices: torch.nn.functional.pad(images(indices), (0, 2)), POOLED)
    sorted(filled.path.glob("chunk-*"))[2].unlink()
    shutil.copy(sorted(elsewhere.path.glob("chunk-*"))[2], filled.path)
    words = (
        f"a chunk of images 3×6×8 with features .*, where .* have {LAYOUT}; delete the store and fill it from one set"
    )
    for use in (lambda: filled.features("small"), lambda: filled.fill(images, EXTRACTORS)):
        with pytest.raises(StoreError, match=words):
            use()


def test_no_images_on_disk_unless_asked(tmp_path: Path, filled: FeatureStore) -> None:
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".png"] == []
    recorded, kept = Recorded(tmp_path / "calls"), tmp_path / "kept"
    filled.fill(recorded, EXTRACTORS, keep_images=kept)  # the features are there, the images are made again
    assert torch.equal(ImageFolder(kept, 10)(range(10)), images(range(10)))
    assert sorted(path.name for path in kept.glob("*.png"))[::9] == ["000000.png", "000009.png"]
    (kept / "000005.png").unlink()
    longer = opened(tmp_path / "cache", 14)
    longer.fill(recorded, EXTRACTORS, keep_images=kept)
    assert [call.start for call in recorded.calls()] == [0, 4, 8, 4, 8, 12]  # 8: two of its images were beyond the end
    assert torch.equal(ImageFolder(kept, 14)(range(14)), images(range(14)))
    same(longer, 14)
    with pytest.raises(StoreError, match=r"kept: holds the images of .*; name an empty folder"):
        FeatureStore(tmp_path / "cache", manifest(guidance=1.0), 4, CHUNK).fill(images, EXTRACTORS, keep_images=kept)


def test_images_kept_by_several_processes(tmp_path: Path, processes: Any) -> None:
    recorded, kept = Recorded(tmp_path / "calls", 0.01), tmp_path / "kept"
    processes(lambda rank: opened(tmp_path / "cache", 18).fill(recorded, EXTRACTORS, keep_images=kept), 2)
    assert sorted(call.start for call in recorded.calls()) == [0, 4, 8, 12, 16]
    assert torch.equal(ImageFolder(kept, 18)(range(18)), images(range(18)))


def test_dropped_features_leave_the_manifest(tmp_path: Path, filled: FeatureStore) -> None:
    size = sum(len(content) for content in listed(filled).values())
    path = sorted(filled.path.glob("chunk-*"))[1]
    path.write_bytes(b"damaged")
    (filled.path / ".chunk-00000009-x.host-1.tmp").write_bytes(bytes(100))
    filled.warn = lambda message: None
    filled.fill(images, EXTRACTORS)
    assert filled.bytes() == size + len(b"damaged") + 100
    assert filled.drop() == size + len(b"damaged") + 100
    assert filled.bytes() == filled.drop() == 0
    assert sorted(path.name for path in filled.path.iterdir()) == ["claims", "manifest.json"]
    with pytest.raises(StoreError, match=r"of the 3 chunks of 10 samples 3 are missing, from 0 on; fill the store"):
        filled.features("small")
    filled.fill(images, EXTRACTORS)
    same(filled, 10)


def test_unknown_names_and_missing_samples(filled: FeatureStore) -> None:
    with pytest.raises(ValueError, match="has no features 'inception'; the manifest names large, small"):
        filled.features("inception")
    with pytest.raises(StoreError, match="of the 5 chunks of 17 samples 2 are missing, from 3 on; fill the store"):
        filled.features("small", 17)
    sorted(filled.path.glob("chunk-*"))[1].unlink()
    with pytest.raises(StoreError, match="of the 3 chunks of 10 samples 1 are missing, from 1 on"):
        filled.features("small")
    assert torch.equal(filled.features("small", 4), expected("small", 4))
    filled.fill(images, EXTRACTORS)
    same(filled, 12)


WIDE = {"wide": Projection(8000)}  # 128 kB a chunk
DISK = "256k"  # of `small_disk`


def wide(folder: Path, count: int) -> FeatureStore:
    return FeatureStore(folder, manifest(extractors=identities(WIDE)), count, CHUNK)


def whole_and_no_more(store: FeatureStore, chunks: int) -> None:
    """So many valid chunks, and nothing half written that takes space."""
    assert torch.equal(
        store.features("wide", chunks * CHUNK)[-CHUNK:], WIDE["wide"](images(range(4 * chunks - 4, 4 * chunks)))
    )
    assert len(listed(store)) == chunks
    assert store.bytes() == sum(map(len, listed(store).values()))


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """A real one: what, why and the remedy in one sentence; what was there stays; with space again it goes on."""
    store = wide(small_disk, 12)
    with pytest.raises(StoreError) as caught:
        store.fill(images, WIDE)
    assert str(caught.value) == (
        f"{store.path}: writing chunk 1 failed: No space left on device; free some space there and start again: the chunks that are "
        "there stay"
    )
    whole_and_no_more(store, 1)
    with pytest.raises(StoreError, match=r"writing chunk 1 failed: No space left"):
        store.fill(images, WIDE, keep_images=tmp_path / "kept")
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    store.fill(images, WIDE)
    whole_and_no_more(store, 3)


def test_a_disk_that_is_full_before_it_begins(small_disk: Path) -> None:
    with contextlib.suppress(OSError), open(small_disk / "ballast", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert shutil.disk_usage(small_disk).free == 0
    with pytest.raises(StoreError, match=r"opening the store failed: No space left on device; free some space there"):
        wide(small_disk, 4).fill(images, WIDE)
    with pytest.raises(
        StoreError, match=r"kept: keeping images failed: No space left on device; free some space there"
    ):
        wide(small_disk.parent / "cache", 4).fill(images, WIDE, keep_images=small_disk / "kept")


def test_a_disk_that_becomes_read_only(small_disk: Path) -> None:
    store = wide(small_disk, 4)
    store.fill(images, WIDE)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    whole_and_no_more(store, 1)
    store.fill(images, WIDE)  # there is nothing to write
    with pytest.raises(StoreError, match=r"failed: Read-only file system; make the folder writable and start again"):
        wide(small_disk, 8).fill(images, WIDE)
    with pytest.raises(StoreError, match="removing features failed: Read-only file system"):
        store.drop()


def test_a_file_that_may_not_grow(tmp_path: Path, processes: Any) -> None:
    """A limit on the size of files (`ulimit -f`), in a process of its own."""
    wide(tmp_path, 4).fill(images, WIDE)

    def limited(rank: int) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(StoreError) as caught:
            wide(tmp_path, 8).fill(images, WIDE)
        return str(caught.value)

    (message,) = processes(limited, 1)
    assert "writing chunk 1 failed: File too large; raise the limit on the size of a file and start again" in message
    whole_and_no_more(wide(tmp_path, 4), 1)


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_any_fsync_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> None:
    """Disks report late that they are full or broken: of a file and of the folder, for the manifest and for a chunk."""
    store, fsync, calls = opened(tmp_path, 4), os.fsync, []

    def late(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", late)
        with pytest.raises(StoreError, match=os.strerror(number)):
            store.fill(images, EXTRACTORS)
    assert len(calls) == call
    assert list(store.path.glob(".*")) == []
    store.fill(images, EXTRACTORS)
    same(store, 4)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(
        StoreError, match=r"chunk-00000000\.lock: claiming chunk 0 failed: Operation not supported; use a file system"
    ):
        opened(tmp_path, 4).fill(images, EXTRACTORS)
    assert listed(opened(tmp_path, 4)) == {}


def test_several_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    """A claim belongs to whoever opened it, not to the process: threads may fill too."""
    from concurrent.futures import ThreadPoolExecutor

    recorded = Recorded(tmp_path / "calls", 0.005)
    with ThreadPoolExecutor(3) as threads:
        work = [threads.submit(opened(tmp_path / "cache", 24).fill, recorded, EXTRACTORS) for _ in range(3)]
        for each in work:
            each.result(20)
    assert len(recorded.calls()) == 6
    same(opened(tmp_path / "cache", 24), 24)
