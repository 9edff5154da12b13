# SPDX-License-Identifier: Apache-2.0
"""What the evaluations of a report found: all points in one table, and numbers over sets of samples and repeated trainings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pipeline.files import read_json
from pipeline.overrides import base_of, seed_of
from pipeline.paths import FACTS, MANIFEST, SWEEP
from pipeline.sweep import FIELDS, REPORT, SELECT, mean_of

OWN = ("slot", "size", "method", "seed", "run", "params", "dataset", "reference_images", "features", "skipped")


class Number(NamedTuple):
    """A mean over repeated trainings, its standard error, and their standard deviation where there are several.

    The error of one training's number is that of measuring it. Of several it is the larger one of that and the trainings' spread over the
    root of their number: what is left of chance if all of it is done again.
    """

    value: float
    error: float
    spread: float | None
    seeds: int

    def text(self, digits: int = 3) -> tuple[str, str]:
        """The value and its error, as a table has them."""
        return f"{self.value:.{digits}f}", f"{self.error:.{digits}f}"


def read(inputs: Mapping[str, Path]) -> pd.DataFrame:
    """Every point of the evaluations among a report's inputs (evaluate-<slot>-<size>-<method>), with what it was measured with.

    `method` is the student's name in params.yaml (or teacher), `seed` which of its trainings it is.
    """
    parts = []
    for name, folder in inputs.items():
        if not name.startswith("evaluate-"):
            continue
        _, slot, size, method = name.split("-")
        sweep, facts = pd.read_csv(folder / SWEEP), json.loads((folder / FACTS).read_text())
        own = {"slot": slot, "size": size, "method": base_of(method), "seed": seed_of(method)}
        own |= {key: facts[key] for key in ("run", "params", "dataset", "reference_images")}
        features = [facts["features"][space] for space in sweep.space]
        parts.append(sweep.assign(**own, features=features, skipped=facts.get("skipped_steps", 0)))
    if not parts:
        return pd.DataFrame(columns=[*OWN, *FIELDS])
    return pd.concat([part.dropna(axis=1, how="all") for part in parts], ignore_index=True).reindex(
        columns=[*OWN, *FIELDS]
    )


def of_model(points: pd.DataFrame, slot: str, size: str, method: str, dinov2: bool = False) -> pd.DataFrame:
    """The points of one model, all its trainings, in the space of FID (or in DINOv2's)."""
    same = (points.slot == slot) & (points["size"] == size) & (points.method == method)
    return points[same & ((points.space == "dinov2") == dinov2)]


def published(points: pd.DataFrame) -> pd.DataFrame:
    """Those of the averages that trainings published: no other width, no earlier checkpoint."""
    return points[points.ema.isna() & points.nimg.isna()]


def reported(points: pd.DataFrame, steps: int | None = None, best: bool = True) -> pd.DataFrame:
    """Fresh samples at the selected guidance, or without guidance; of all numbers of steps or of one."""
    rows = published(points)
    rows = rows[
        (rows.phase == REPORT) & (rows.best.astype(bool) if best else rows.guidance.isna() | (rows.guidance == 1))
    ]
    return rows if steps is None else rows[rows.steps == steps]


def swept(points: pd.DataFrame) -> pd.DataFrame:
    """The guidance sweep."""
    rows = published(points)
    return rows[(rows.phase == SELECT) & rows.guidance.notna()]


def number(rows: pd.DataFrame, column: str = "fid") -> Number | None:
    """A column of a model's rows at one point: means over sets of samples, then over trainings; None if it was not measured."""
    rows = rows[rows[column].notna()]
    if rows.empty:
        return None
    each = [mean_of(group.to_dict("records"), column) for _, group in rows.groupby("seed")]
    values, count = [value for value, _ in each], len(each)
    own = sum(error**2 for _, error in each) ** 0.5 / count
    spread = statistics.stdev(values) if count > 1 else None
    return Number(statistics.fmean(values), max(own, (spread or 0.0) / count**0.5), spread, count)


def joined(rows: pd.DataFrame, column: str, form: str = "{}") -> str:
    """The values of a column, each once: of trainings that selected different scales, 1.20/1.30."""
    return "/".join(form.format(value) for value in dict.fromkeys(rows[column].dropna()))


def runs(*parts: pd.DataFrame) -> str:
    """The runs behind a number, or behind several, each once."""
    return " ".join(dict.fromkeys(run for part in parts for run in part.run))


def measured_points(folder: Path, scale: str, name: str) -> pd.DataFrame:
    """Every row of one evaluation, digits as they are, with the model and what it was measured with in front.

    `name` is evaluate-<slot>-<size>-<method>. `model_sha256` and `reference_sha256` are the digests of their manifests, which hold those
    of every file; `key` in the row names the samples.
    """
    _, slot, size, method = name.split("-")
    facts, made = json.loads((folder / FACTS).read_text()), read_json(folder / MANIFEST) or {}
    inputs = made.get("inputs", {})
    model, reference = inputs.get("teacher" if method == "teacher" else "student", {}), inputs.get("reference", {})
    own = {
        "scale": scale,
        "slot": slot,
        "size": size,
        "method": method,
        "run": facts["run"],
        "model": facts["model_run"],
        "model_sha256": model.get("digest"),
        "dataset": facts["dataset"],
        "reference": reference.get("run"),
        "reference_sha256": reference.get("digest"),
        "reference_images": facts["reference_images"],
    }
    # As text: a key of decimal digits must not become a number, nor a number lose its last digit.
    rows = pd.read_csv(folder / SWEEP, dtype=str, keep_default_na=False).to_dict("records")
    return pd.DataFrame([{**own, "features": facts["features"][row["space"]], **row} for row in rows])


def best_guidance(points: pd.DataFrame, steps: int) -> float | None:
    """The scale that a model's evaluation selected for its sampler of `steps` steps; None for an unguided model."""
    (scale,) = reported(points, steps).guidance.unique()
    return None if pd.isna(scale) else float(scale)
