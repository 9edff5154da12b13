# SPDX-License-Identifier: Apache-2.0
"""Published files that are fetched once: where they come from, which bytes are the right ones, where they are kept.

It imports the standard library alone: one may ask what is missing without loading torch.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.request import Request, urlopen

from scm_core.disk import BadFileError, file_digest

CHUNK = 1 << 20

Opener = Callable[[str], BinaryIO]


class Home(NamedTuple):
    """Where files of a kind are looked for and kept: the folder that `variable` names, else scm/<name> in the user's cache."""

    variable: str
    name: str
    noun: str
    """What such a file is, in messages."""
    otherwise: str = ""
    """What may be done instead of putting the right file there."""

    @property
    def folder(self) -> Path:
        """The folder, whether it is there or not; the user's cache is XDG_CACHE_HOME."""
        named = os.environ.get(self.variable)
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scm" / self.name


WEIGHTS_HOME = Home("SCM_WEIGHTS", "weights", "the weights", ", or use other weights on purpose by giving their sha256")
DATA_HOME = Home("SCM_DATA", "data", "the data")


@dataclass(frozen=True)
class PublishedFile:
    """A published file: its name below its home's folder, `urls` that give the same bytes, their SHA-256 and number, its licence."""

    file: str
    urls: tuple[str, ...]
    sha256: str
    size: int
    licence: str


class VerifiedFile(NamedTuple):
    """A file on disk and the SHA-256 (64 hex digits) that it was found to have."""

    path: Path
    sha256: str


INCEPTION = "inception-v3-compat"  # torch-fidelity's name for it
DINOV2 = "scm-dinov2-vit-l-14"

# of the networks of features
WEIGHTS = {
    # Ported from TensorFlow's inception-2015-12-05.tgz. Both publishers put the first eight digits of the digest into the
    # file's name; all of it stands in snap-research/discoscene (models/inception_model.py) and HyperGAN/HyperGAN
    # (docs/cifar-recipe.md).
    INCEPTION: PublishedFile(
        file="weights-inception-2015-12-05-6726825d.pth",
        urls=(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        ),
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        licence="Apache-2.0",
    ),
    # Its publisher gives no digest. This one stands in projects that know nothing of each other, among them
    # modelingevolution/roma-matcher-compose (up-0.1.0.sh) and DimNeuroLab/where-does-complexity-live (its docs).
    DINOV2: PublishedFile(
        file="dinov2_vitl14_pretrain.pth",
        urls=("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",),
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        size=1_217_586_395,
        licence="Apache-2.0",
    ),
}


def open_url(url: str) -> BinaryIO:
    """Open a URL for reading; `OSError` if that fails."""
    return urlopen(Request(url, headers={"User-Agent": "scm-repro"}), timeout=60)


def find_published(
    known: PublishedFile, what: str, opener: Opener = open_url, home: Home = WEIGHTS_HOME
) -> VerifiedFile:
    """Return a published file, verified, from its home's folder, or fetched into it; `what` is it for, in messages.

    Raises `FileNotFoundError` for a file that is neither there nor to be fetched and `BadFileError` for one with another digest.
    """
    path = home.folder / known.file
    if path.exists():
        return verified(path, known.sha256, what, replace_by(known, home))
    return VerifiedFile(_fetch(known, what, path, opener, home), known.sha256)


def locate(file: str | Path, root: Path | None = None) -> Path:
    """Where a file of the user's lies: at the path (relative ones from `root`), or of that name in the folder of weights (SCM_WEIGHTS).

    `FileNotFoundError` with both places if it is in neither.
    """
    path = Path(file).expanduser()
    places = [(root or Path()) / path, WEIGHTS_HOME.folder / path]
    for place in places:
        if place.exists():
            return place
    where = " or ".join(map(str, dict.fromkeys(places)))
    raise FileNotFoundError(
        f"{file} is missing: put it at {where} ({WEIGHTS_HOME.variable} names the folder of weights)"
    )


def replace_by(known: PublishedFile, home: Home = WEIGHTS_HOME) -> str:
    """The remedy for a file with other bytes."""
    return f"remove it and put {Path(known.file).name} from {known.urls[0]} there{home.otherwise}"


def verified(path: Path, expected: str | None, what: str, remedy: str) -> VerifiedFile:
    """Return the file with its SHA-256; `BadFileError` with `what` it is for and the `remedy` if another one is expected."""
    found = file_digest(path)
    if expected is not None and found != expected:
        raise BadFileError(f"{path} has SHA-256 {found}, {expected} expected for {what}: {remedy}")
    return VerifiedFile(path, found)


def _fetch(known: PublishedFile, what: str, path: Path, opener: Opener, home: Home) -> Path:
    """Download into a temporary file beside `path`, verify, rename: any number of processes may do so at once."""
    refusals = []
    for url in known.urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            logging.getLogger(__name__).warning("fetching %s (%d MB) into %s", url, known.size // 10**6, path.parent)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
                part = Path(folder) / path.name
                found = _download(url, part, known.size, opener)
                if found == known.sha256:
                    os.replace(part, path)
                    return path
            refusals.append(f"{url} gave a file of SHA-256 {found}")
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            refusals.append(f"{url}: {error}")
    raise FileNotFoundError(
        f"{path}, {home.noun} of {what}, is missing and could not be fetched ({'; '.join(refusals)}): put "
        f"{path.name} there, from {known.urls[0]} (SHA-256 {known.sha256}), or name the folder that has {known.file} in "
        f"{home.variable}"
    )


def _download(url: str, path: Path, size: int, opener: Opener) -> str:
    """Copy what `url` gives to `path`, at most one chunk more than `size` bytes, and return its SHA-256."""
    digest = hashlib.sha256()
    written = 0
    with opener(url) as source, open(path, "wb") as target:
        while written <= size and (chunk := source.read(CHUNK)):
            target.write(chunk)
            digest.update(chunk)
            written += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()
