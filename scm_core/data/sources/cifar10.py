# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 (Krizhevsky 2009) from its published archive of the binary version, which holds plain bytes where the Python one has pickles."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import torch

from scm_core.data.images import ImageSet
from scm_core.disk import BadFileError
from scm_core.published import DATA_HOME, Opener, PublishedFile, find_published, open_url

# Its MD5 is c32a1d4ab5d03f1284b67883e8d87530, on the page that it is published on. The SHA-256 stands in projects that know nothing of each
# other, among them ankane's torchvision for Ruby (lib/torchvision/datasets/cifar10.rb) and gomlx/gomlx (examples/cifar).
ARCHIVE = PublishedFile(
    file="cifar10/cifar-10-binary.tar.gz",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    size=170_052_171,
    licence="none stated; for research, with a citation of Krizhevsky 2009",
)
PYTHON = "cifar10/cifar-10-python.tar.gz"
TOP = "cifar-10-batches-bin"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES, PER_BATCH = 5, 10_000
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # a byte of label; rows of red, then green, then blue


def cifar10(opener: Opener = open_url) -> ImageSet:
    """Return the 50,000 training images, 3×32×32, in the order of the five batches.

    The archive is looked for in `SCM_DATA` (`published.DATA_HOME`), else fetched into it. Raises `FileNotFoundError` for one that is
    neither there nor to be fetched, and `BadFileError` for other bytes or another layout.
    """
    try:
        found = find_published(ARCHIVE, "source cifar10", opener, DATA_HOME)
    except FileNotFoundError as error:
        if (DATA_HOME.folder / PYTHON).exists():
            what = f"{DATA_HOME.folder / PYTHON} holds the images as pickles, which are not read"
            raise FileNotFoundError(f"{error}; {what}") from error
        raise
    return read_archive(found.path)


def read_archive(path: Path) -> ImageSet:
    """Return the training images in an archive of that layout; `BadFileError` if it has another."""
    parts = []
    try:
        with tarfile.open(path, "r:gz") as archive:
            names = _member(archive, "batches.meta.txt", path).decode().split()
            if tuple(names) != CLASSES:
                raise BadFileError(
                    f"{path}: batches.meta.txt names {' '.join(names)}, not CIFAR-10's classes: get it again"
                )
            for k in range(1, BATCHES + 1):
                name = f"data_batch_{k}.bin"
                content = _member(archive, name, path)
                if len(content) != PER_BATCH * RECORD:
                    raise BadFileError(
                        f"{path}: {name} has {len(content)} bytes, {PER_BATCH} records of {RECORD} expected: get it again"
                    )
                parts.append(np.frombuffer(content, np.uint8).reshape(PER_BATCH, RECORD))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BadFileError(f"{path}: is no readable archive ({error}): get it again") from error
    records = np.concatenate(parts)
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    if int(labels.max()) >= len(CLASSES):
        raise BadFileError(f"{path}: holds the label {int(labels.max())}, where there are 10 classes: get it again")
    return ImageSet(torch.from_numpy(records[:, 1:].reshape(-1, *SHAPE).copy()), labels, "cifar10")


def _member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    try:
        file = archive.extractfile(f"{TOP}/{name}")
    except KeyError:
        file = None
    if file is None:
        raise BadFileError(f"{path}: has no {TOP}/{name}: it is another archive, get {Path(ARCHIVE.file).name}")
    return file.read()
