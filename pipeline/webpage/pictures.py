# SPDX-License-Identifier: Apache-2.0
"""Pictures inside the page: figures, and galleries of samples by an index.

The index is grids.json, beside the pictures or above them:

    {"format": 1,
     "grids": [{"slot": "latent_guided", "size": "M", "method": "scd", "steps": 1, "guidance": 1.5, "seed": 0,
                "file": "grids/scd-M-1-1.5.png",
                "arrangement": "columns are the classes 0 to 9", "run": "student-latent_guided-M-scd-20c87d1b"}, …]}

`file` is relative to the folder of the index, and a file that the same job makes. `guidance` is null for an unguided model. `seed` is
the index of the first sample's noise: grids of one model with the same seed show the same noise in the same place. `arrangement` (what
rows and columns are) and `run` (whose samples they are) may be left out. Stage `gallery` writes it; any other job may, whose outputs the
page reads. The gallery has one part for each (slot, size, method), the numbers of steps side by
side, and a slider over guidance.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import PipelineError

INDEX = "grids.json"
FIGURE_BYTES, GRID_BYTES = 700_000, 250_000  # a picture larger than this is compressed with loss
ALL_GRIDS_BYTES = 5_000_000  # what grids may take together
QUALITIES = ((85, 1.0), (75, 1.0), (75, 0.7), (70, 0.5), (60, 0.35))  # of WebP, and the share of the side


@dataclass(frozen=True)
class Picture:
    """A picture as the page holds it. `width` and `height` are those of the file, in pixels."""

    source: str
    width: int
    height: int
    reduced: bool
    """Whether the page's copy is compressed with loss."""


@dataclass(frozen=True)
class Grid:
    """Samples of one model at one guidance scale and number of steps."""

    steps: int
    guidance: float | None
    picture: Picture
    what: str
    """Alternative text."""

    @property
    def scale(self) -> str:
        """The guidance scale as text."""
        return "unguided" if self.guidance is None else f"{self.guidance:g}"


@dataclass(frozen=True)
class Gallery:
    """All grids of a model: a row of numbers of steps for each guidance scale."""

    name: str
    slot: str
    scales: list[str]
    columns: list[tuple[int, list[Grid | None]]]
    """Number of steps, and the grid at each scale; None where there is none."""
    run: str
    arrangement: str
    seeds: list[int]


def picture(file: Path, limit: int) -> Picture:
    """The file's bytes, if there are not too many, else as WebP: with the best quality that fits. PipelineError for what is no picture."""
    content = file.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, (width, height) = image.format, image.size
            if kind not in ("PNG", "WEBP", "JPEG"):
                raise PipelineError(f"{file.name}: is a picture of kind {kind}; expected PNG, WebP or JPEG")
            reduced = len(content) > limit
            if reduced:
                kind, content = "WEBP", _smaller(image.convert("RGB"), limit)
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow's, for a broken PNG
        raise PipelineError(f"{file.name}: cannot be read as a picture ({error}); make it again") from error
    text = base64.b64encode(content).decode("ascii")
    return Picture(f"data:image/{kind.lower()};base64,{text}", width, height, reduced)


def _smaller(image: Image.Image, limit: int) -> bytes:
    content = b""
    for quality, share in QUALITIES:
        sized = image if share == 1 else image.resize((round(image.width * share), round(image.height * share)))
        target = io.BytesIO()
        sized.save(target, "WEBP", quality=quality, method=6)
        content = target.getvalue()
        if len(content) <= limit:
            break
    return content


def read_galleries(index: Path, files: Mapping[str, Path], names: Mapping[str, str]) -> list[Gallery]:
    """The galleries of an index; `files` are the job's inputs by their names, `names` what readers call a method."""
    entries = _entries(index)
    limit = min(GRID_BYTES, ALL_GRIDS_BYTES // max(len(entries), 1))
    models: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        models.setdefault((entry["slot"], entry["size"], entry["method"]), []).append(entry)
    return [_gallery(index, key, own, limit, files, names) for key, own in models.items()]


def _gallery(
    index: Path,
    key: tuple[str, str, str],
    entries: list[dict[str, Any]],
    limit: int,
    files: Mapping[str, Path],
    names: Mapping[str, str],
) -> Gallery:
    slot, size, method = key
    name = f"{names.get(method, method)}-{size}"
    grids: dict[tuple[int, float | None], Grid] = {}
    for entry in entries:
        file = (index.parent / entry["file"]).resolve()
        if not any(file == path.resolve() or file.is_relative_to(path.resolve()) for path in files.values()):
            raise PipelineError(f"{index.name}: {entry['file']} is no input of the page; list files of the same job")
        if not file.is_file():
            raise PipelineError(f"{index.name}: {entry['file']} is missing; make the samples again")
        steps, scale = entry["steps"], entry["guidance"]
        how = "without guidance" if scale is None else f"at guidance {scale:g}"
        arrangement = f"; {entry['arrangement']}" if entry.get("arrangement") else ""
        what = f"Grid of samples of {name}, {steps} step{'s' * (steps > 1)}, {how}{arrangement}"
        grids[steps, scale] = Grid(steps, scale, picture(file, limit), what)
    scales = sorted({scale for _, scale in grids}, key=lambda scale: (scale is not None, scale or 0.0))
    columns = [(n, [grids.get((n, scale)) for scale in scales]) for n in sorted({steps for steps, _ in grids})]
    return Gallery(
        name,
        slot,
        ["unguided" if scale is None else f"{scale:g}" for scale in scales],
        columns,
        next((entry["run"] for entry in entries if entry.get("run")), ""),
        next((entry["arrangement"] for entry in entries if entry.get("arrangement")), ""),
        sorted({entry["seed"] for entry in entries}),
    )


_KINDS: dict[str, tuple[type, ...]] = {
    "slot": (str,),
    "size": (str,),
    "method": (str,),
    "steps": (int,),
    "guidance": (int, float, type(None)),
    "seed": (int,),
    "file": (str,),
}


def _entries(index: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
        entries = value["grids"] if value["format"] == 1 else None
    except (ValueError, KeyError, TypeError):
        entries = None
    if not isinstance(entries, list):
        raise PipelineError(f'{index.name}: is no index of samples: expected {{"format": 1, "grids": […]}}')
    for number, entry in enumerate(entries):
        for key, kinds in _KINDS.items():
            if not isinstance(entry, dict) or key not in entry or not isinstance(entry[key], kinds):
                raise PipelineError(f"{index.name}: grids[{number}].{key}: is missing, or not as the format has it")
    return entries
