# SPDX-License-Identifier: Apache-2.0
"""People's own images: folders and ZIPs, with and without labels."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from scm_core.data.sources.folder import images
from scm_core.data.sources.listing import BrokenImagesError, Encoded
from scm_core.data.sources.pixels import pixels
from tests.scm_core.replicas import encoded, write_tree, write_zip

FILES = {
    f"{name}/{k}.png": encoded(3 * i + k, (50, 40), "RGB", "PNG") for i, name in enumerate("bac") for k in range(3)
}
FLAT = {name.replace("/", "-"): data for name, data in FILES.items()}
LABELS = {name: k % 4 for k, name in enumerate(sorted(FLAT))}


def opened(path: Path, labels: int = 3, channels: int = 3) -> Encoded:
    return images(path, "mine-32", channels, 32, labels)


def written(kind: str, path: Path, files: Mapping[str, bytes], labels: Mapping[str, int] | None = None) -> Path:
    if kind == "zip":
        return write_zip(path.with_suffix(".zip"), files, labels)
    path.mkdir()
    write_tree(path, files)
    if labels is not None:
        (path / "dataset.json").write_text(json.dumps({"labels": list(labels.items())}))
    return path


@pytest.fixture(params=["folder", "zip"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_subfolders_are_classes(kind: str, tmp_path: Path) -> None:
    source = opened(written(kind, tmp_path / "x", {**FILES, ".hidden": b"", "a/.thumbs/t.db": b""}))
    assert source.names == sorted(FILES)
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(source.images(range(9)), np.stack([pixels(FILES[name], 3, 32) for name in sorted(FILES)]))
    grey = opened(written(kind, tmp_path / "y", FILES), channels=1)
    assert grey.images(range(2)).shape == (2, 1, 32, 32)


def test_dataset_json_gives_labels(kind: str, tmp_path: Path) -> None:
    source = opened(written(kind, tmp_path / "x", FLAT, LABELS), labels=4)
    assert source.labels.tolist() == [LABELS[name] for name in source.names]
    assert opened(written(kind, tmp_path / "y", FILES, dict.fromkeys(FILES, 2)), labels=3).labels.tolist() == [2] * 9


def test_unlabelled_images(kind: str, tmp_path: Path) -> None:
    assert opened(written(kind, tmp_path / "x", FLAT), labels=0).labels.tolist() == [0] * 9


def test_a_compressed_zip_is_read_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in FILES.items():
            file.writestr(name, data)
        file.writestr("__MACOSX/a/._0.png", b"x")
    stored = opened(write_zip(tmp_path / "y.zip", FILES))
    assert np.array_equal(opened(tmp_path / "x.zip").images(range(9)), stored.images(range(9)))


def test_what_does_not_fit_is_refused(kind: str, tmp_path: Path) -> None:
    def refused(
        words: str, files: Mapping[str, bytes], labels: Mapping[str, int] | None = None, classes: int = 3
    ) -> None:
        refused.count = getattr(refused, "count", 0) + 1  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=words):
            opened(written(kind, tmp_path / f"x{refused.count}", files, labels), classes)  # type: ignore[attr-defined]

    refused("there is no image in it", {})
    refused(r"has 3 class folders \(a, b, c\), labels: 4 expected", FILES, classes=4)
    refused(r"a-0\.png lies in no class folder and there is no dataset\.json", FLAT)
    refused(r"notes\.txt(:| ) ?is no image by its name", {**FILES, "a/notes.txt": b""})
    refused(r"dataset\.json gives a-0\.png the label 4, expected 0…3", FLAT, {**LABELS, "a-0.png": 4}, 4)
    refused(r"dataset\.json gives a-0\.png the label '1', expected", FLAT, {**LABELS, "a-0.png": "1"}, 4)  # type: ignore[dict-item]
    refused(
        r"dataset\.json has no label of a-0\.png \(1 missing\)",
        FLAT,
        {k: v for k, v in LABELS.items() if k != "a-0.png"},
        4,
    )
    refused(r"z\.png is missing \(1 of dataset\.json's images are\)", FLAT, {**LABELS, "z.png": 0}, 4)


def test_a_description_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, FLAT)
    for text, words in (
        ('{"labels": null}', "must hold"),
        ("[]", "must hold"),
        ("{", "is no JSON"),
        ('{"labels": [1]}', "must hold"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=rf"dataset\.json {words}"):
            opened(tmp_path)
    assert len(opened(tmp_path, labels=0).names) == 9


def test_missing_and_damaged_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is missing: expected a folder or a ZIP of images"):
        opened(tmp_path / "none")
    path = write_zip(tmp_path / "x.zip", FILES)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.zip: is no readable ZIP"):
        opened(path)
    path.write_bytes(whole)
    source = opened(path)
    place = whole.find(FILES["b/1.png"]) + 60
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(
        BrokenImagesError, match=r"1 image cannot be used: b/1\.png cannot be taken from the ZIP \(Bad CRC-32"
    ):
        source.images(range(9))


def test_a_link_that_comes_back_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, FILES)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is reached a second time through a link"):
        opened(tmp_path)
