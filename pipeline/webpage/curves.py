# SPDX-License-Identifier: Apache-2.0
"""Training curves, the same scalars for every method: what a training logged, and the FID of its earlier checkpoints.

A training's scalars are read from a file of its output that has the columns `nimg` and `loss` (CSV or JSON lines); where it publishes
none, from the log of its last execution, runs/<scale>/.logs/<job>.jsonl. Checkpoints are the rows of an evaluation's sweep.csv that name
the images seen.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline import paths
from pipeline.cells import read_rows
from pipeline.sweep import REPORT, mean_of
from pipeline.webpage.charts import STYLES, Axis, Series, line_chart
from pipeline.webpage.runs import Run

SCALARS = {"loss": "loss", "tangent_norm": "tangent norm", "grad_norm": "gradient norm"}
LOGARITHMIC = ("tangent_norm", "grad_norm")
SEEN = Axis("images seen")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """Charts of trainings that are compared: of one size, and of the same family."""

    title: str
    charts: Sequence[tuple[str, Markup]]
    """Caption and drawing."""
    runs: Sequence[Run]


def scalars(run: Run) -> list[Mapping[str, Any]]:
    """What a training logged, in the order of images seen; empty where nothing was."""
    folder = paths.root() / run.job.outputs[0]
    published = [folder / name for name in run.made["files"] if name.endswith((".csv", ".jsonl"))]
    for file in (*published, paths.log_file(run.job).with_suffix(".jsonl")):
        rows = [row for row in _rows(file) if "nimg" in row and "loss" in row]
        if rows:
            return sorted(rows, key=lambda row: float(row["nimg"]))
    return []


def _rows(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    if file.suffix == ".csv":
        yield from csv.DictReader(lines)
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # torn, where the process died
            continue
        if isinstance(row, dict):
            yield row


def family(method: str, objective: str) -> str:
    """Which trainings are drawn together: the methods as the paper has them; the variants of each objective."""
    base = method.partition("_seed")[0]
    return "methods" if base in ("teacher", objective) else f"variants of {objective}"


def panels(
    trainings: Iterable[Run], evaluations: Mapping[tuple[str, str, str], Path], names: Mapping[str, str]
) -> list[Panel]:
    """A panel for each size and family; `evaluations` are the folders by slot, size and method, `names` what readers call a method."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in trainings:
        axes = run.job.axes
        method = axes.get("method", "teacher")
        objective = run.params.get("student.method", "teacher")
        groups.setdefault((axes["slot"], axes["size"], family(method, objective)), []).append(run)
    found = []
    for (slot, size, kind), runs in groups.items():
        styles, logged = _styles(runs), {run.id: scalars(run) for run in runs}
        charts = [
            (f"{text.capitalize()} over images seen.", drawn)
            for key, text in SCALARS.items()
            if (drawn := _scalar_chart(key, runs, logged, styles, names, f"size {size}, {kind}"))
        ]
        chart = _fid_chart(slot, size, runs, evaluations, styles, names)
        if chart:
            charts.append(("FID of earlier checkpoints, ± one standard error, over images seen.", chart))
        found.append(Panel(f"{slot}, size {size}: {kind}", charts, runs))
    return found


def _method(run: Run) -> str:
    return run.job.axes.get("method", "teacher")


def _styles(runs: Sequence[Run]) -> dict[str, int]:
    """A style for each method; repetitions from other seeds share one."""
    bases = dict.fromkeys(_method(run).partition("_seed")[0] for run in runs)
    order = {base: i % STYLES for i, base in enumerate(bases)}
    return {_method(run): order[_method(run).partition("_seed")[0]] for run in runs}


def _name(run: Run, names: Mapping[str, str]) -> str:
    base = _method(run).partition("_seed")[0]
    return names.get(base, base)


def _scalar_chart(
    key: str,
    runs: Sequence[Run],
    logged: Mapping[str, Rows],
    styles: Mapping[str, int],
    names: Mapping[str, str],
    where: str,
) -> Markup:
    lines = []
    for run in runs:
        rows = [row for row in logged[run.id] if row.get(key) not in (None, "")]
        if rows:
            x, y = [float(row["nimg"]) for row in rows], [float(row[key]) for row in rows]
            lines.append(Series(_name(run, names), x, y, style=styles[_method(run)]))
    if not lines:
        return Markup("")
    said = f"{SCALARS[key].capitalize()}, {where}: {_ends(lines)}"
    return line_chart(lines, SEEN, Axis(SCALARS[key], key in LOGARITHMIC), said)


def _ends(lines: Sequence[Series]) -> str:
    return "; ".join(f"{line.name} ends at {line.y[-1]:.3g}" for line in lines)


def _fid_chart(
    slot: str,
    size: str,
    runs: Sequence[Run],
    evaluations: Mapping[tuple[str, str, str], Path],
    styles: Mapping[str, int],
    names: Mapping[str, str],
) -> Markup:
    lines = []
    for run in runs:
        folder = evaluations.get((slot, size, _method(run)))
        found = checkpoints(read_rows(folder / paths.SWEEP), images_seen(run)) if folder else {}
        lines += [
            Series(
                f"{_name(run, names)}, {steps} step{'s' * (steps != 1)}",
                [point[0] for point in points],
                [point[1] for point in points],
                [point[2] for point in points],
                styles[_method(run)],
            )
            for steps, points in found.items()
        ]
    if not lines:
        return Markup("")
    # A line for each number of steps: they need styles of their own.
    order = {name: i % STYLES for i, name in enumerate(dict.fromkeys(line.name for line in lines))}
    lines = [Series(line.name, line.x, line.y, line.error, order[line.name]) for line in lines]
    return line_chart(lines, SEEN, Axis("FID", log=True), f"FID of checkpoints, size {size}: {_ends(lines)}")


def images_seen(run: Run) -> float | None:
    """By a training as params.yaml describes it; None for a network that was imported."""
    section = "student" if "student.iterations" in run.params else "teacher"
    iterations, batch = (run.params.get(f"{section}.{key}") for key in ("iterations", "batch"))
    return float(iterations) * float(batch) if iterations and batch else None


def checkpoints(sweep: Sequence[Mapping[str, str]], end: float | None) -> dict[int, list[tuple[float, float, float]]]:
    """Images seen, FID and standard error of each earlier checkpoint, by number of steps: at the selected guidance, in the first space.

    What was published stands last, at `end` images. Nothing for a model without earlier checkpoints.
    """
    rows = [row for row in sweep if row["phase"] == REPORT and row["best"] == "True" and row.get("fid")]
    rows = [row for row in rows if row["space"] == rows[0]["space"] and (row.get("nimg") or not row.get("ema"))]
    sets: dict[tuple[int, float], list[Mapping[str, float]]] = {}
    for row in rows:
        seen = float(row["nimg"]) if row.get("nimg") else end
        if seen is not None:
            numbers = {"fid": float(row["fid"]), "fid_se": float(row["fid_se"] or 0.0)}
            sets.setdefault((int(row["steps"]), seen), []).append(numbers)
    found: dict[int, list[tuple[float, float, float]]] = {}
    for (steps, seen), several in sorted(sets.items()):
        found.setdefault(steps, []).append((seen, *mean_of(several)))
    earlier = any(row.get("nimg") for row in rows)
    return {steps: points for steps, points in found.items() if len(points) > 1} if earlier else {}
