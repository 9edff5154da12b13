# SPDX-License-Identifier: Apache-2.0
"""From an image file's bytes to uint8 pixels of one size: decoding, and ADM's centre crop."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MODES = {1: "L", 3: "RGB"}
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
PLAIN = ("1", "L", "RGB", "CMYK", "YCbCr")  # modes that Pillow converts without a loss that matters


class ImageError(ValueError):
    """An image file that cannot be used; the message says why, and not which."""


def decode(data: bytes, channels: int, strict: bool = True) -> Image.Image:
    """Return the image in a file's bytes as greyscale (`channels` 1) or RGB (3), 8 bits each.

    What the file is is read from its content, not its name (ImageNet has a PNG and CMYK files among its .JPEG). Orientation tags are not
    applied and colour profiles not either, as in ADM's and EDM's preprocessing. Sixteen bits are rounded to eight. `strict` refuses what
    would change its looks: transparent pixels, further frames of an animation; without it the colours below the transparency and the
    first frame are taken, which is what published statistics of ImageNet rest on. Raises ImageError for these and for broken files.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            if strict and image.format not in ("JPEG", "MPO") and frames > 1:  # MPO: a camera's JPEG with a preview
                raise ImageError(f"has {frames} frames: keep one of them")
            image.load()
            return _converted(image, MODES[channels], strict)
    except ImageError:
        raise
    except BROKEN as error:
        raise ImageError(f"does not decode ({' '.join(str(error).split()) or type(error).__name__})") from error


def _converted(image: Image.Image, mode: str, strict: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, in 32 with some versions of Pillow
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError("has more than 16 bits per pixel")
        image = Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
    if strict and ("A" in image.mode or "a" in image.mode or "transparency" in image.info):
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise ImageError("has transparent pixels: put it on a background first")
        image = image.convert("RGBA").convert("RGB")
    elif image.mode not in PLAIN and image.mode not in ("P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "LAB", "HSV"):
        raise ImageError(f"has pixels of an unknown kind ({image.mode})")
    return image if image.mode == mode else image.convert(mode)


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """Return the centre `side`×`side` pixels after resizing, by the rule of ADM (Dhariwal & Nichol 2021).

    While the shorter side is at least twice the wanted one, both sides are halved (rounded down) by box averages; then the shorter side is
    made `side` by bicubic interpolation (the other in proportion, rounded), smaller images included; then the centre is cut out, of an odd
    surplus the smaller half from the top and the left.
    """
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pixels(data: bytes, channels: int, side: int, strict: bool = True) -> np.ndarray:
    """Return the image in a file's bytes as uint8 (C, side, side); raises as `decode`."""
    array = np.asarray(centre_crop(decode(data, channels, strict), side))
    return np.ascontiguousarray(array.reshape(side, side, channels).transpose(2, 0, 1))
