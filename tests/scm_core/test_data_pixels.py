# SPDX-License-Identifier: Apache-2.0
"""Decoding and cropping: ADM's rule pixel for pixel, and files that are not what their names say."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from scm_core.data.sources.pixels import ImageError, centre_crop, decode, pixels
from tests.scm_core.replicas import encoded

SIZES = [
    (500, 375),
    (375, 500),
    (64, 64),
    (63, 200),
    (128, 128),
    (127, 255),
    (256, 129),
    (1025, 771),
    (20, 31),
    (65, 64),
    (16, 900),
]


def by_the_rule(image: Image.Image, side: int) -> np.ndarray:
    """The rule once more, in terms of sizes alone and of NumPy's slices; the filters are Pillow's."""
    width, height = image.size
    halvings = 0
    while min(width >> halvings, height >> halvings) >= 2 * side:
        halvings += 1
    for k in range(1, halvings + 1):
        image = image.resize((width >> k, height >> k), resample=Image.Resampling.BOX)
    shorter = min(image.size)
    size = tuple(side if length == shorter else int(np.rint(length * (side / shorter))) for length in image.size)
    array = np.array(image.resize(size, resample=Image.Resampling.BICUBIC))
    rows, columns = array.shape[0] - side, array.shape[1] - side
    return array[rows // 2 : rows // 2 + side, columns // 2 : columns // 2 + side]


@pytest.mark.parametrize("side", [32, 64, 512])
@pytest.mark.parametrize("size", SIZES)
def test_the_crop_is_adms(size: tuple[int, int], side: int) -> None:
    for mode in ("RGB", "L"):
        image = Image.open(io.BytesIO(encoded(3, size, mode, "PNG")))
        found = centre_crop(image, side)
        assert found.size == (side, side)
        assert np.array_equal(np.array(found), by_the_rule(image, side))


def test_halving_averages_blocks_and_the_centre_is_kept() -> None:
    """By hand: 16×8 halves to 8×4, of which the middle 4×4 are columns 2…5; Pillow rounds rows and columns one after the other."""
    values = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.uint8)
    blocks = values.reshape(4, 2, 8, 2).mean(axis=(1, 3))
    found = np.array(centre_crop(Image.fromarray(values), 4)).astype(float)
    assert np.abs(found - blocks[:, 2:6]).max() <= 1


def test_pixels_are_channels_first() -> None:
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    ImageDraw.Draw(image).rectangle((0, 0, 7, 3), fill=(200, 20, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    found = pixels(buffer.getvalue(), 3, 8)
    assert found.shape == (3, 8, 8)
    assert found[:, 0, 0].tolist() == [200, 20, 30]
    assert found[:, 7, 0].tolist() == [10, 20, 30]


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_what_imagenet_holds_beside_rgb_jpegs() -> None:
    """CMYK, grey, and a PNG under a JPEG's name become RGB; the CMYK file looks as the RGB one that it was made from."""
    rgb = Image.open(io.BytesIO(encoded(1, (64, 64), "RGB", "PNG")))
    cmyk = decode(saved(rgb.convert("CMYK"), "JPEG", quality=98), 3)
    assert cmyk.mode == "RGB"
    assert np.abs(np.array(cmyk).astype(int) - np.array(rgb).astype(int)).mean() < 5
    grey = np.array(decode(saved(rgb.convert("L")), 3))
    assert (grey == grey[..., :1]).all()
    assert np.array_equal(grey[..., 0], np.array(rgb.convert("L")))
    assert np.array_equal(np.array(decode(saved(rgb), 3)), np.array(rgb))
    assert decode(saved(rgb), 1).mode == "L"


def test_sixteen_bits_are_rounded_to_eight() -> None:
    values = np.array([[0, 128, 129, 257, 65535, 65406, 32767, 385]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        found = np.array(decode(saved(Image.fromarray(values), kind), 1))
        assert np.array_equal(found, np.rint(values / 257).astype(np.uint8))


def test_orientation_tags_are_not_applied() -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode(saved(image, "JPEG", exif=exif), 3).size == (8, 4)


def test_transparency_and_animations_are_refused_or_dropped() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    assert np.array(decode(saved(clear), 3))[0, 0].tolist() == [10, 20, 30]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert np.array(decode(saved(palette), 3))[0, 0].tolist() == [9, 8, 7]
    clear.putpixel((2, 2), (1, 2, 3, 254))
    for data in (saved(clear), saved(palette, transparency=1), saved(Image.new("LA", (4, 4), (7, 0)))):
        with pytest.raises(ImageError, match="has transparent pixels: put it on a background first"):
            decode(data, 3)
        assert decode(data, 3, strict=False).mode == "RGB"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="has 2 frames: keep one of them"):
        decode(moving, 3)
    assert np.array(decode(moving, 3, strict=False))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_broken_files_are_refused(kind: str) -> None:
    good = encoded(0, (64, 64), "RGB", kind)
    for bad in (good[: len(good) // 2], good[:20], b"", b"no image", bytes(len(good))):
        with pytest.raises(ImageError, match="does not decode"):
            pixels(bad, 3, 32)
    with pytest.raises(ImageError, match=r"has pixels of an unknown kind \(F\)"):
        decode(saved(Image.new("F", (4, 4)), "TIFF"), 3)
