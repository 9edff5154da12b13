# SPDX-License-Identifier: Apache-2.0
"""A folder or a ZIP of images as a source: people's own data."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scm_core.data.sources.listing import SUFFIXES, Container, Encoded, Files, Zipped, image_names, labels_of
from scm_core.disk import BadFileError

DESCRIPTION = "dataset.json"


def images(path: str | Path, name: str, channels: int, side: int, labels: int) -> Encoded:
    """Return the images in a folder or ZIP at `path`, sorted by name, each centre-cropped to `side`×`side` with `channels` 1 or 3.

    `labels` 0: unlabelled. Else labels are those of `dataset.json` at the top ({"labels": [["a/b.png", 3], …]}, as EDM2's dataset tool
    writes it), or without one the subfolders at the top are the classes, in the order of their names. Names that begin with a dot are left
    out. Raises FileNotFoundError for a missing path and BadFileError, which names the file, for whatever else does not fit.
    """
    path = Path(path)
    container: Container
    description: Callable[[], Any]
    if path.is_dir():
        names = sorted(image_names(path))
        container = Files(path, names)
        file = path / DESCRIPTION
        description = lambda: json.loads(file.read_bytes()) if file.exists() else None  # noqa: E731
    elif path.is_file():
        names = sorted(_members(path))
        container = Zipped(path, names)
        description = lambda: _of_zip(path)  # noqa: E731
    else:
        raise FileNotFoundError(f"{path} is missing: expected a folder or a ZIP of images")
    if not names:
        raise BadFileError(f"{path}: there is no image in it; expected files such as {', '.join(sorted(SUFFIXES))}")
    values = [0] * len(names) if not labels else _labels(path, names, labels, description)
    return Encoded(name, container, names, labels_of(values), (channels, side, side), str(path))


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as file:
            members = [m for m in file.infolist() if not m.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise BadFileError(f"{path}: is no readable ZIP ({error}): write or get it again") from error
    names = []
    for member in members:
        parts = member.filename.split("/")
        if parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts if part not in (".", "..")):
            continue
        if member.filename == DESCRIPTION:
            continue
        if os.path.splitext(member.filename)[1].lower() not in SUFFIXES:
            raise BadFileError(f"{path}: {member.filename} is no image by its name; keep nothing but images in it")
        if member.flag_bits & 1:
            raise BadFileError(f"{path}: {member.filename} is encrypted; write the ZIP without a password")
        names.append(member.filename)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadFileError(f"{path}: {twice} is in it twice; write it again")
    return names


def _of_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read(DESCRIPTION)) if DESCRIPTION in file.namelist() else None


def _labels(path: Path, names: Sequence[str], labels: int, description: Callable[[], Any]) -> list[int]:
    try:
        described = description()
    except ValueError as error:
        raise BadFileError(f"{path}: {DESCRIPTION} is no JSON ({error}); write it again") from error
    if described is not None:
        return _described(path, names, labels, described)
    flat = next((name for name in names if "/" not in name), None)
    if flat is not None:
        raise BadFileError(
            f"{path}: {flat} lies in no class folder and there is no {DESCRIPTION}; sort the images into a folder for each class, or set "
            "labels: 0"
        )
    classes = sorted({name.split("/", 1)[0] for name in names})
    if len(classes) != labels:
        shown = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
        raise BadFileError(f"{path}: has {len(classes)} class folders ({shown}), labels: {labels} expected")
    index = {name: k for k, name in enumerate(classes)}
    return [index[name.split("/", 1)[0]] for name in names]


def _described(path: Path, names: Sequence[str], labels: int, described: Any) -> list[int]:
    pairs = described.get("labels") if isinstance(described, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadFileError(f'{path}: {DESCRIPTION} must hold {{"labels": [[name, label], …]}}; set labels: 0 for none')
    known = {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
    missing = [name for name in names if name not in known]
    if missing:
        raise BadFileError(f"{path}: {DESCRIPTION} has no label of {missing[0]} ({len(missing)} missing); add them")
    for name in names:
        label = known[name]
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < labels:
            raise BadFileError(f"{path}: {DESCRIPTION} gives {name} the label {label!r}, expected 0…{labels - 1}")
    absent = sorted(set(known) - set(names))
    if absent:
        raise BadFileError(f"{path}: {absent[0]} is missing ({len(absent)} of {DESCRIPTION}'s images are); add them")
    return [known[name] for name in names]
