# SPDX-License-Identifier: Apache-2.0
"""ImageNet in each of its forms, with four classes; what is missing or damaged is refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from scm_core.data.sources import imagenet as module
from scm_core.data.sources.imagenet import TAR, check_classes, imagenet
from scm_core.data.sources.listing import BrokenImagesError, Encoded
from scm_core.data.sources.pixels import pixels
from tests.scm_core.replicas import PER_CLASS, WNIDS, class_tars, imagenet_files, tar_bytes, write_parquet, write_tree

FILES = imagenet_files()
COUNT = len(FILES)


def tree(folder: Path) -> None:
    write_tree(folder / "train", FILES)


def kaggle(folder: Path) -> None:
    write_tree(folder / "ILSVRC/Data/CLS-LOC/train", FILES)


def one_tar(folder: Path) -> None:
    folder.mkdir()
    (folder / TAR).write_bytes(tar_bytes(class_tars(FILES)))


def tars(folder: Path) -> None:
    write_tree(folder, class_tars(FILES))


def parquet(folder: Path) -> None:
    write_parquet(folder / "data", FILES)


def opened(folder: Path, labels: int = 4, side: int = 32) -> Encoded:
    return imagenet(folder, f"imagenet-{side}", 3, side, labels)


@pytest.mark.parametrize("form", [tree, kaggle, one_tar, tars])
def test_folders_and_tars_give_the_same_set_in_the_same_order(form: Callable[[Path], None], tmp_path: Path) -> None:
    """Classes by their WordNet ids, images by their names within."""
    form(tmp_path / "imagenet")
    source = opened(tmp_path / "imagenet")
    assert source.names == sorted(FILES)
    assert source.labels.tolist() == [k for k in range(4) for _ in range(PER_CLASS)]
    expected = np.stack([pixels(FILES[name], 3, 32, strict=False) for name in sorted(FILES)])
    assert np.array_equal(source.images(range(COUNT)), expected)
    assert np.array_equal(source.images(range(3, 9)), expected[3:9])
    assert source.made_from == opened(tmp_path / "imagenet", side=32).made_from


def test_parquet_gives_the_same_images_in_its_own_order(tmp_path: Path) -> None:
    parquet(tmp_path / "imagenet")
    source = opened(tmp_path / "imagenet")
    stems = [name.split("_n")[0] for name in source.names]
    assert sorted(stems) == sorted(Path(name).stem for name in FILES)
    assert stems != sorted(stems)
    made = source.images(range(COUNT))
    backwards = np.concatenate([source.images(range(i, i + 1)) for i in reversed(range(COUNT))])[::-1]
    assert np.array_equal(made, backwards)
    for row, (stem, label) in enumerate(zip(stems, source.labels.tolist(), strict=True)):
        wnid = stem.split("_")[0]
        assert WNIDS[label] == wnid
        assert np.array_equal(made[row], pixels(FILES[f"{wnid}/{stem}.JPEG"], 3, 32, strict=False))


@pytest.mark.parametrize("form", [tree, one_tar, tars, parquet])
def test_a_missing_class_is_refused(
    form: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in FILES if name.startswith(WNIDS[2])]:
        monkeypatch.delitem(FILES, name)
    form(tmp_path / "i")
    with pytest.raises(
        ValueError, match=r"(has|have) 3 (classes \(n01440764 … n15075141\)|labels), labels: 4 expected"
    ):
        opened(tmp_path / "i")


def test_the_real_classes_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A thousand others are refused, and so is another number of images."""
    others = [f"n{k:08d}" for k in range(1000)]
    with pytest.raises(ValueError, match="x: its 1000 classes are not those of ILSVRC2012"):
        check_classes(others, 1000, "x")
    tree(tmp_path / "i")
    monkeypatch.setattr(module, "CLASSES", 4)
    monkeypatch.setattr(module, "WNIDS_SHA256", "a76b9e61d3f3b2d1f8ac9c0e9a5ee0a9a4bb7bb86c9d1fefbf7ef6bb6f3b0a4e")
    with pytest.raises(ValueError, match="classes are not those of ILSVRC2012"):
        opened(tmp_path / "i")
    listed = "".join(f"{wnid}\n" for wnid in WNIDS).encode()
    monkeypatch.setattr(module, "WNIDS_SHA256", __import__("hashlib").sha256(listed).hexdigest())
    with pytest.raises(ValueError, match="has 20 images, the training set of ILSVRC2012 has 1281167"):
        opened(tmp_path / "i")
    monkeypatch.setattr(module, "IMAGES", 20)
    assert len(opened(tmp_path / "i").names) == 20


def test_nothing_there_says_what_to_bring(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"holds no ImageNet; put there .*ILSVRC2012_img_train\.tar, its class tars"
        ):
            opened(folder)


def test_broken_images_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "i")
    bad = sorted(FILES)[3], sorted(FILES)[17]
    for name in bad:
        (tmp_path / "i/train" / name).write_bytes(FILES[name][:99])
    source = opened(tmp_path / "i")
    words = rf"train: 2 images cannot be used: {bad[0]} does not decode \(.*; {bad[1]} does not"
    with pytest.raises(BrokenImagesError, match=words) as error:
        source.images(range(COUNT))
    assert set(error.value.whys) == set(bad)
    assert len(source.images(range(4, 17))) == 13
    (tmp_path / "i/train" / bad[0]).unlink()
    with pytest.raises(BrokenImagesError, match=rf"{bad[0]} cannot be read \(No such file"):
        source.images(range(5))


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    one_tar(tmp_path / "one")
    path = tmp_path / "one" / TAR
    whole = path.read_bytes()
    for length in (len(whole) // 2, 700, 100):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"ILSVRC2012_img_train\.tar: (is cut off|n\d+\.tar: there is no image|has \d classes)"
        ):
            opened(tmp_path / "one")
    tars(tmp_path / "many")
    source = opened(tmp_path / "many")
    path = tmp_path / "many" / f"{WNIDS[1]}.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(BrokenImagesError, match=rf"is cut off \({WNIDS[1]}\.tar ends before it does\)"):
        source.images(range(COUNT))
    with pytest.raises(ValueError, match=rf"{WNIDS[1]}\.tar: (is cut off|there is no image)"):
        opened(tmp_path / "many")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    tree(tmp_path / "i")
    (tmp_path / "i/train" / WNIDS[0] / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"n01440764: notes\.txt is no image by its name"):
        opened(tmp_path / "i")
    (tmp_path / "i/train" / WNIDS[0] / "notes.txt").rename(tmp_path / "i/train" / WNIDS[0] / ".hidden")
    assert len(opened(tmp_path / "i").names) == COUNT
    shutil.rmtree(tmp_path / "i/train" / WNIDS[3])
    (tmp_path / "i/train" / WNIDS[3]).mkdir()
    with pytest.raises(ValueError, match="n15075141: there is no image in it"):
        opened(tmp_path / "i")


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = write_parquet(tmp_path / "i", FILES)
    first, second = sorted(folder.iterdir())
    good = first.read_bytes()
    second.rename(folder / "kept")
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is missing \(1 of 2 shards are\)"):
        opened(folder)
    (folder / "kept").rename(second)
    first.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"train-00000-of-00002\.parquet: is no readable Parquet file"):
        opened(folder)
    first.write_bytes(good)
    source = opened(folder)
    middle = len(good) // 3
    first.write_bytes(good[:middle] + bytes(200) + good[middle + 200 :])
    with pytest.raises(BrokenImagesError, match=r"images? cannot be used"):
        source.images(range(COUNT))
    table = pq.read_table(second)
    for change, words in (
        (lambda t: t.set_column(1, "label", pa.array([4] * t.num_rows)), r"row 0 has the label 4, expected 0…3"),
        (
            lambda t: t.set_column(1, "label", pa.array([0] * t.num_rows)),
            r"has the label 0, where class n\d+ is number \d",
        ),
        (lambda t: t.drop_columns(["label"]), r"has no columns image \{bytes, path\} and label"),
        (lambda t: t.rename_columns(["picture", "label"]), r"has no columns image \{bytes, path\} and label"),
    ):
        first.write_bytes(good)
        pq.write_table(change(table), second)
        with pytest.raises(ValueError, match=words):
            opened(folder)
    (folder / "train-a.parquet").touch()
    with pytest.raises(ValueError, match=r"train-a\.parquet: its name is not train-00000-of-00294\.parquet"):
        opened(folder)


def test_labels_are_what_tensors_index_with(tmp_path: Path) -> None:
    tree(tmp_path / "i")
    assert opened(tmp_path / "i").labels.dtype == torch.int64
