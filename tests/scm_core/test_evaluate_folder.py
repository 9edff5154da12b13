# SPDX-License-Identifier: Apache-2.0
"""Folders of PNG images: pixels, order and digest; every file that may not be measured is named."""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scm_core.disk import StoreError
from scm_core.evaluate.folder import ImageFolder, KeptImages


def pixels(count: int, channels: int = 3, height: int = 6, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def png(image: Tensor) -> bytes:
    """A PNG file from the standard's own description (ISO/IEC 15948): signature, IHDR, one IDAT of unfiltered rows, IEND."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels, height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(row.flatten().tolist()) for row in image.permute(1, 2, 0))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


def write(folder: Path, images: Tensor, names: list[str] | None = None) -> Path:
    for name, image in zip(names or [f"{i}.png" for i in range(len(images))], images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(image))
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_natural_order(tmp_path: Path, channels: int) -> None:
    """0, 1, 2, …, 11: not 0, 1, 10, 11, 2; and the pixels of files that Pillow did not write."""
    images = pixels(12, channels)
    folder = ImageFolder(write(tmp_path / "images", images), count=12)
    assert len(folder) == 12
    assert folder.shape == (channels, 6, 5)
    assert folder.names == [f"{i}.png" for i in range(12)]
    assert torch.equal(folder(range(12)), images)
    assert torch.equal(folder(range(9, 11)), images[9:11])
    assert folder(range(1)).dtype == torch.uint8


def test_order_in_subfolders_and_of_equal_numbers(tmp_path: Path) -> None:
    names = ["10/a.png", "9/b.png", "9/a10.png", "9/a9.png", "01.png", "1.png", "1/x.PNG", "b.png"]
    write(tmp_path, pixels(8), names)
    (tmp_path / ".DS_Store").write_text("left out")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_text("left out")
    assert ImageFolder(tmp_path).names == [
        "1/x.PNG", "01.png", "1.png", "9/a9.png", "9/a10.png", "9/b.png", "10/a.png", "b.png",
    ]  # fmt: skip


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", pixels(2))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path / "set").names == ["class/0.png", "class/1.png"]
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="reached a second time"):
        ImageFolder(tmp_path / "set")


def test_digest(tmp_path: Path) -> None:
    """SHA-256 over names and digests, as its docstring says; a pixel, a name or a file more changes it, a copy does not."""
    images = pixels(3)
    folder = ImageFolder(write(tmp_path / "a", images))
    lines = b"".join(f"{i}.png\0".encode() + hashlib.sha256(png(images[i])).digest() for i in range(3))
    assert folder.digest == hashlib.sha256(lines).hexdigest()
    assert ImageFolder(write(tmp_path / "copy", images)).digest == folder.digest
    assert ImageFolder(write(tmp_path / "names", images, ["0.png", "1.png", "3.png"])).digest != folder.digest
    assert ImageFolder(write(tmp_path / "more", torch.cat([images, images[:1]]))).digest != folder.digest
    images[2, 0, 0, 0] += 1
    assert ImageFolder(write(tmp_path / "pixel", images)).digest != folder.digest


def test_a_file_that_changes_after_the_digest(tmp_path: Path) -> None:
    images = pixels(3)
    folder = ImageFolder(write(tmp_path, images))
    assert folder.digest == folder.digest
    (tmp_path / "1.png").write_bytes(png(images[0]))
    assert torch.equal(folder(range(1)), images[:1])
    with pytest.raises(ValueError, match=r"1\.png: was changed since"):
        folder(range(3))


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def sixteen_bit_rgb() -> bytes:
    """Which Pillow opens as RGB with 8 bits, without a word."""
    header = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(30) for _ in range(6)))
    parts = (b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 6)).save(buffer, "JPEG")
    return buffer.getvalue()


RGB = Image.fromarray(np.arange(90, dtype=np.uint8).reshape(6, 5, 3))
WRONG: dict[str, tuple[Callable[[], bytes], str]] = {
    "palette": (lambda: saved(RGB.convert("P")), "without transparency, got 8 bits palette"),
    "alpha": (lambda: saved(RGB.convert("RGBA")), "got 8 bits RGB with alpha"),
    "grey alpha": (lambda: saved(RGB.convert("LA")), "got 8 bits greyscale with alpha"),
    "transparent colour": (lambda: saved(RGB, transparency=(0, 1, 2)), "got 8 bits RGB with a transparent colour"),
    "16-bit grey": (lambda: saved(Image.new("I;16", (5, 6))), "got 16 bits greyscale"),
    "16-bit RGB": (sixteen_bit_rgb, "got 16 bits RGB"),
    "1-bit": (lambda: saved(RGB.convert("1")), "got 1 bits greyscale"),
    "animation": (
        lambda: saved(RGB, save_all=True, append_images=[Image.new("RGB", (5, 6))]),
        "got 8 bits RGB, animated",
    ),
    "JPEG by content": (jpeg, "is a JPEG, whose compression every metric"),
    "text": (lambda: b"not an image", "is no readable PNG"),
    "empty": (lambda: b"", "is no readable PNG"),
    "truncated": (lambda: png(pixels(1)[0])[:-20], "is no readable PNG"),
    "only a header": (lambda: png(pixels(1)[0])[:33], "is no readable PNG"),
    "larger": (lambda: png(pixels(1, 3, 7, 5)[0]), "expected RGB 5×6 like 0.png, got RGB 5×7"),
    "grey among RGB": (lambda: png(pixels(1, 1)[0]), "expected RGB 5×6 like 0.png, got greyscale 5×6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(tmp_path: Path, case: str) -> None:
    """In reading and in the digest alike."""
    content, words = WRONG[case]
    folder = ImageFolder(write(tmp_path, pixels(3)))
    (tmp_path / "1.png").write_bytes(content())
    for use in (lambda: folder(range(3)), lambda: ImageFolder(tmp_path).digest):
        with pytest.raises(ValueError, match=words) as caught:
            use()
        assert str(caught.value).startswith(f"{tmp_path / '1.png'}: ")
        assert "\n" not in str(caught.value)
    assert len(folder(range(2, 3))) == 1


def test_a_wrong_first_file_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, pixels(2))
    (tmp_path / "0.png").write_bytes(jpeg())
    with pytest.raises(ValueError, match=r"0\.png: is a JPEG"):
        ImageFolder(tmp_path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """Wherever pixels may depend on it: PNG's parts have checksums, which Pillow does not look at when it only loads the pixels."""
    content, parts = (
        png(pixels(1, 1, 4, 4)[0]),
        len(png(pixels(1, 1, 4, 4)[0])) - 12,
    )  # the last 12 bytes are an empty IEND
    folder = ImageFolder(write(tmp_path, pixels(1, 1, 4, 4)))
    for position in range(parts):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (tmp_path / "0.png").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"0\.png: "):
            folder(range(1))


@pytest.mark.parametrize(
    ("name", "words"),
    [("7.jpg", "is a JPEG, whose"), ("7.JPEG", "is a JPEG, whose"), ("labels.json", "no PNG"), ("7.webp", "no PNG")],
)
def test_foreign_files_are_refused(tmp_path: Path, name: str, words: str) -> None:
    write(tmp_path / "class", pixels(2))
    (tmp_path / "class" / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{name}: .*{words}"):
        ImageFolder(tmp_path)


def test_no_folder_no_images_too_few(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is missing: expected a folder of PNG images"):
        ImageFolder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no image in it"):
        ImageFolder(tmp_path)
    write(tmp_path, pixels(3))
    with pytest.raises(ValueError, match="expected a folder of PNG images, got a file"):
        ImageFolder(tmp_path / "0.png")
    for count in (2, 4):
        with pytest.raises(ValueError, match=f"expected {count} images, got 3"):
            ImageFolder(tmp_path, count)
    for indices in (range(2, 4), range(-1, 1), range(0)):
        with pytest.raises(ValueError, match="indices in 0…2"):
            ImageFolder(tmp_path)(indices)


def test_a_subfolder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not left out: fewer images would be measured than there are."""
    write(tmp_path, pixels(2), ["a/0.png", "b/0.png"])
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"/b: cannot be read: Permission denied; make"):
        ImageFolder(tmp_path)


def test_a_file_that_went_away(tmp_path: Path) -> None:
    folder = ImageFolder(write(tmp_path, pixels(3)))
    os.unlink(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png: cannot be read: No such file"):
        folder(range(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_kept_images_are_an_image_folder(tmp_path: Path, channels: int) -> None:
    images = pixels(11, channels)
    kept = KeptImages(tmp_path / "kept", "a" * 64)
    assert kept.missing(range(1))
    kept.write(range(4, 11), images[4:])
    KeptImages(tmp_path / "kept", "a" * 64).write(range(4), images[:4])
    assert not kept.missing(range(11))
    assert kept.missing(range(12))
    assert torch.equal(ImageFolder(tmp_path / "kept", 11)(range(11)), images)


def test_kept_images_of_something_else_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "mine", pixels(2))
    with pytest.raises(StoreError, match="mine: holds other files, not those of aaaa"):
        KeptImages(tmp_path / "mine", "a" * 64)
    KeptImages(tmp_path / "kept", "a" * 64).write(range(2), pixels(2))
    with pytest.raises(
        StoreError, match=r"kept: holds the images of aaaaaaaaaaaaaaaa…, not those of bbbb.*name an empty"
    ):
        KeptImages(tmp_path / "kept", "b" * 64)
    with pytest.raises(StoreError, match=r"0\.png: keeping images failed: File exists"):
        KeptImages(tmp_path / "mine" / "0.png", "b" * 64)
