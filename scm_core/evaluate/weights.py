# SPDX-License-Identifier: Apache-2.0
"""Published weights files: found, or fetched, verified, and read."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scm_core.disk import file_digest
from scm_core.published import DINOV2, FOLDER_VARIABLE, INCEPTION, WEIGHTS, WeightsFile, weights_folder

__all__ = [
    "DINOV2",
    "FOLDER_VARIABLE",
    "INCEPTION",
    "WEIGHTS",
    "Opener",
    "VerifiedWeights",
    "WeightsFile",
    "fill",
    "find_published",
    "find_weights",
    "load_tensors",
    "open_url",
    "verified",
    "weights_folder",
]

CHUNK = 1 << 20

Opener = Callable[[str], BinaryIO]


class VerifiedWeights(NamedTuple):
    """A weights file on disk and the SHA-256 (64 hex digits) that it was found to have."""

    path: Path
    sha256: str


def open_url(url: str) -> BinaryIO:
    """Open a URL for reading; `OSError` if that fails."""
    return urlopen(Request(url, headers={"User-Agent": "scm-repro"}), timeout=60)


def find_weights(
    name: str, path: str | Path | None = None, sha256: str | None = None, opener: Opener = open_url
) -> VerifiedWeights:
    """Return the weights file of extractor `name`, verified: `path`, else from `weights_folder()`, else fetched into it.

    A known extractor's file must have the published SHA-256. `sha256` replaces that for a file of the user's own, at
    `path`; of an extractor that is not known every file is taken, unless `sha256` is given. Raises `FileNotFoundError`
    for a file that is neither there nor to be fetched and `ValueError` for one with another digest.
    """
    known = WEIGHTS.get(name)
    if sha256 is not None and (path is None or not re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise ValueError(f"sha256={sha256!r}: must be the 64 hex digits of the weights file that weights_path names")
    expected = sha256.lower() if sha256 is not None else known.sha256 if known is not None else None
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: extractor {name} needs its weights there")
        remedy = "give the right file or the right sha256" if known is None or sha256 is not None else _replace(known)
        return verified(path, expected, f"extractor {name}", remedy)
    if known is None:
        raise ValueError(f"extractor {name} needs a weights file: none is published for it")
    return find_published(known, f"extractor {name}", opener)


def find_published(known: WeightsFile, what: str, opener: Opener = open_url) -> VerifiedWeights:
    """Return a published file, verified, from `weights_folder()`, or fetched into it; `what` is it for, in messages.

    Raises `FileNotFoundError` for a file that is neither there nor to be fetched and `ValueError` for one with another digest.
    """
    path = weights_folder() / known.file
    if path.exists():
        return verified(path, known.sha256, what, _replace(known))
    return VerifiedWeights(_fetch(known, what, path, opener), known.sha256)


def _replace(known: WeightsFile) -> str:
    return (
        f"remove it and put {Path(known.file).name} from {known.urls[0]} there, or use other weights on purpose by giving their "
        "sha256"
    )


def verified(path: Path, expected: str | None, what: str, remedy: str) -> VerifiedWeights:
    """Return the file with its SHA-256; `ValueError` with `what` it is for and the `remedy` if another one is expected."""
    found = file_digest(path)
    if expected is not None and found != expected:
        raise ValueError(f"{path} has SHA-256 {found}, {expected} expected for {what}: {remedy}")
    return VerifiedWeights(path, found)


def _fetch(known: WeightsFile, what: str, path: Path, opener: Opener) -> Path:
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
        f"{path}, the weights of {what}, is missing and could not be fetched ({'; '.join(refusals)}): put "
        f"{path.name} there, from {known.urls[0]} (SHA-256 {known.sha256}), or name the folder that has {known.file} in "
        f"{FOLDER_VARIABLE}"
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


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the named tensors in a .safetensors file, or in a .pth file that holds nothing else; `ValueError` for others.

    A .pth file is a pickle: torch's restricted unpickler reads it, which builds tensors and runs no code of the file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): get it again") from error
    except Exception as error:  # torch raises a different type for each way a file can be wrong
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is no tensors-only weights file ({reason}): get it again") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(
            f"{path} is no tensors-only weights file: it must hold a dictionary of tensors and nothing else"
        )
    return dict(tensors)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Make `tensors`, as float32, the weights of `network` (which may lie on the meta device) without gradients.

    Raises `ValueError` that names what is missing, unexpected or of another shape; `path` is named as their source.
    """
    expected = network.state_dict()
    # How many batches a normalisation has seen: of no effect in eval mode, and absent from files made without torch.
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    other = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    complaints = [
        f"{what} {', '.join(sorted(found)[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"
        for what, found in (
            ("without", expected.keys() - counters - tensors.keys()),
            ("with unexpected", tensors.keys() - expected.keys()),
            ("of other shapes:", other),
        )
        if found
    ]
    if complaints:
        raise ValueError(f"{path} holds weights of another network: {'; '.join(complaints)}")
    converted = dict.fromkeys(counters, torch.tensor(0)) | {
        name: value.float() if value.is_floating_point() else value for name, value in tensors.items()
    }
    nn.Module.load_state_dict(network, converted, assign=True)
    network.requires_grad_(False)
