# SPDX-License-Identifier: Apache-2.0
"""What stands for a model: a row for each number of steps and each checkpoint, as a table, as few metrics, and as curves in the tracker."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.sweep import NUMBERS, REPORT, Numbers, Point, mean_of

if TYPE_CHECKING:
    from pipeline.context import Tracker

MEASURED = ("fid", "precision", "recall")  # those with a standard error
COLUMNS = (
    *("nimg", "steps", "space", "guidance", "nfe", "samples", "sets"),
    *(f"{name}{end}" for name in MEASURED for end in ("", "_se")),
)


def summary(rows: Iterable[Mapping[str, Any]], nimg: int) -> list[dict[str, Any]]:
    """A row for each space, number of steps and checkpoint, in the order of images seen: fresh samples at the selected guidance, means
    over sets.

    The last one of each is the published average, after `nimg` images.
    """
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        other = row["ema"] is not None and row["nimg"] is None  # another average of the finished training
        if row["phase"] == REPORT and row["best"] and not other:
            seen = nimg if row["nimg"] is None else row["nimg"]
            groups.setdefault((row["space"], row["steps"], seen), []).append(row)
    found = []
    for (space, steps, seen), sets in sorted(groups.items()):
        first = sets[0]
        own = {"nimg": seen, "steps": steps, "space": space, "guidance": first["guidance"]}
        own |= {"nfe": first["nfe"], "samples": first["samples"], "sets": len(sets)}
        for name in MEASURED:
            own[name], own[f"{name}_se"] = _mean(sets, name)
        found.append(own)
    return found


def _mean(sets: Sequence[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Mean and standard error over sets; None for what was not measured."""
    if any(row[name] is None for row in sets):
        return None, None
    if any(row[f"{name}_se"] is None for row in sets):
        return statistics.fmean(row[name] for row in sets), None
    return mean_of(sets, name)


def metrics(rows: Iterable[Mapping[str, Any]], distances: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The finished model's numbers by `<steps>-step`, under the same names for every model: fid, fid_se, precision, …, guidance, nfe.

    `distances` names each space's distance; what is measured beside another one than FID is called after it (fd_dinov2_precision).
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:  # later checkpoints come later: the last one stays
        distance = distances[row["space"]]
        prefix = "" if distance == "fid" else f"{distance}_"
        names = {name: f"{prefix}{name}" for name in COLUMNS[3:] if name not in ("samples", "sets")}
        names |= {"nfe": "nfe", "fid": distance, "fid_se": f"{distance}_se"}
        values = {names[name]: row[name] for name in names if row[name] is not None}
        found.setdefault(f"{row['steps']}-step", {}).update(values)
    return found


def curves(rows: Iterable[Mapping[str, Any]], distances: Mapping[str, str]) -> dict[int, dict[str, float]]:
    """The numbers of each checkpoint as metrics, by images seen: `eval/2-step/fid`, and without the steps those of the most of them.

    `eval/fid` is what a teacher of 18 steps and a student of two have in common.
    """
    by_nimg: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_nimg.setdefault(row["nimg"], []).append(row)
    found = {}
    for nimg, some in sorted(by_nimg.items()):
        most = f"{max(row['steps'] for row in some)}-step"
        named = metrics(some, distances)
        found[nimg] = {f"eval/{key}": value for key, value in named[most].items()}
        found[nimg] |= {f"eval/{steps}/{key}": value for steps, own in named.items() for key, value in own.items()}
    return found


def track(tracker: Tracker, point: Point, results: Numbers) -> None:
    """Numbers of a point as metrics, over the guidance scale: MLflow's steps are whole numbers, so in hundredths of it."""
    for space, found in results.items():
        variant = "".join(f"/{axis}-{value}" for axis in ("ema", "nimg") if (value := getattr(point, axis)) is not None)
        name = f"{point.phase}/{point.steps}-step/{space}{variant}"
        values = {f"{name}/{key}": found[key] for key in NUMBERS if found[key] is not None}
        tracker.log_metrics(round(100 * (point.guidance or 1.0)), values)
