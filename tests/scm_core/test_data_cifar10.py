# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 from an archive in the layout of its binary version."""

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scm_core.data.sources import cifar10 as module
from scm_core.data.sources.cifar10 import ARCHIVE, cifar10, read_archive
from scm_core.disk import file_digest
from tests.scm_core.replicas import cifar10_archive

PER_BATCH = 12


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(module, "PER_BATCH", PER_BATCH)
    return tmp_path / "data"


def publish(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file at `path` be the published one."""
    known = replace(ARCHIVE, sha256=file_digest(path), size=path.stat().st_size)
    monkeypatch.setattr(module, "ARCHIVE", known)


def test_the_training_set_in_order(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches one after the other, whatever their order in the archive; red, green, blue; no image of the test batch."""
    images, labels = cifar10_archive(data / ARCHIVE.file, PER_BATCH)
    publish(data / ARCHIVE.file, monkeypatch)
    found = cifar10()
    assert found.name == "cifar10"
    assert np.array_equal(found.images[:].numpy(), images)
    assert np.array_equal(found.labels.numpy(), labels)


def test_it_is_fetched_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10_archive(tmp_path / "there.tar.gz", PER_BATCH)
    publish(tmp_path / "there.tar.gz", monkeypatch)
    asked = []

    def opener(url: str) -> io.BufferedReader:
        asked.append(url)
        return open(tmp_path / "there.tar.gz", "rb")

    assert cifar10(opener).digest == cifar10(opener).digest
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert [path.name for path in (data / "cifar10").iterdir()] == ["cifar-10-binary.tar.gz"]


def test_half_a_download_is_never_accepted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10_archive(tmp_path / "there.tar.gz", PER_BATCH)
    publish(tmp_path / "there.tar.gz", monkeypatch)
    half = (tmp_path / "there.tar.gz").read_bytes()[:1000]
    with pytest.raises(
        FileNotFoundError, match=r"the data of source cifar10, is missing and could not be fetched .*SCM_DATA"
    ):
        cifar10(lambda url: io.BytesIO(half))
    assert not list((data / "cifar10").iterdir())
    (data / ARCHIVE.file).write_bytes(half)
    with pytest.raises(
        ValueError, match=r"has SHA-256 [0-9a-f]{64}, [0-9a-f]{64} expected for source cifar10: remove it and put"
    ):
        cifar10()


def test_pickles_are_not_read(data: Path) -> None:
    (data / "cifar10").mkdir(parents=True)
    (data / module.PYTHON).touch()

    def offline(url: str) -> io.BytesIO:
        raise OSError("no network")

    with pytest.raises(
        FileNotFoundError,
        match=r"put cifar-10-binary\.tar\.gz there.*cifar-10-python\.tar\.gz holds the images as pickles",
    ):
        cifar10(offline)


def changed(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """The archive with other members."""
    out = path.with_name("changed.tar.gz")
    with tarfile.open(path) as old, tarfile.open(out, "w:gz") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            kept = change(member.name.split("/")[1], file.read())
            if kept is not None:
                info = tarfile.TarInfo(f"{module.TOP}/{kept[0]}")
                info.size = len(kept[1])
                new.addfile(info, io.BytesIO(kept[1]))
    return out


def test_another_layout_is_refused(data: Path) -> None:
    path = data / "a.tar.gz"
    cifar10_archive(path, PER_BATCH)
    faults = [
        (
            lambda name, raw: None if name == "data_batch_4.bin" else (name, raw),
            r"has no cifar-10-batches-bin/data_batch_4\.bin",
        ),
        (
            lambda name, raw: (name, raw[:-1] if name == "data_batch_3.bin" else raw),
            r"data_batch_3\.bin has 36875 bytes, 12 records",
        ),
        (lambda name, raw: (name, raw.replace(b"frog", b"toad")), "names airplane .* toad .*, not CIFAR-10's classes"),
        (
            lambda name, raw: (name, b"\x0a" + raw[1:] if "batch_1" in name else raw),
            "holds the label 10, where there are 10 classes",
        ),
    ]
    for change, words in faults:
        with pytest.raises(ValueError, match=words):
            read_archive(changed(path, change))
    cut = shutil.copy(path, data / "cut.tar.gz")
    with open(cut, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cut\.tar\.gz: is no readable archive"):
        read_archive(Path(cut))


def test_what_is_published_is_stated_in_full() -> None:
    assert (len(ARCHIVE.sha256), ARCHIVE.size) == (64, 170_052_171)
    assert ARCHIVE.urls[0].startswith("https://")
