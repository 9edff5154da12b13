# SPDX-License-Identifier: Apache-2.0
"""The numbers in tables of results, each under a name that another run of the same pipeline gives it too."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, str]
ERRORS = {"ours": "standard_error"}  # columns whose standard error is not called after them
# Columns that tell rows apart though they hold numbers, and text that does not: what was chosen or made, and not asked for.
KEYS = ("steps", "intervals", "iterations", "first_index", "nimg", "ema", "seed", "t")
NO_KEYS = frozenset(
    "scale run runs model key best nfe params citation features seeds samples statement rule verdict why paper".split()  # noqa: SIM905
)
CHOSEN = ("guidance", "reference")  # and all columns whose names begin so
REPORT, SELECT = "report", "select"  # phases of an evaluation


class Name(NamedTuple):
    """What a number is: its file, its row, which one of several rows that say the same, and its column."""

    file: str
    row: tuple[tuple[str, str], ...]
    which: int
    column: str

    def __str__(self) -> str:
        words = [value if not _is_number(value) else f"{key} {value}" for key, value in self.row if value]
        again = f" ({self.which})" if self.which > 1 else ""
        return f"{self.file}: {', '.join(words)}{again}: {self.column}"


class Number(NamedTuple):
    """A measured value, its standard error where it has one, of how many samples, and the runs behind it."""

    value: float
    se: float | None
    samples: str
    run: str

    def same(self, other: Number) -> bool:
        """Whether both are the same, digit by digit."""
        return repr(self[:2]) == repr(other[:2])  # as text, in which NaN equals NaN

    def apart(self, other: Number) -> float:
        """How many standard errors of their difference lie between two numbers; infinite where neither has an error, and they differ."""
        if self.value == other.value:
            return 0.0
        error = math.hypot(self.se or 0.0, other.se or 0.0)
        return abs(self.value - other.value) / error if error else math.inf

    def text(self) -> str:
        """Such as 0.259 ± 0.021."""
        return f"{self.value:.6g}" if self.se is None else f"{self.value:.6g} ± {self.se:.2g}"


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, as text."""
    with file.open(newline="", encoding="utf-8") as f:
        return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(f)]


def numbers(file: str, rows: Sequence[Row]) -> dict[Name, Number]:
    """Every number with a standard error of our own rows (published ones name no run), or every number of a file without errors.

    A row is known by its text and by `KEYS`, not by what the run chose: the number at the best guidance is that, whichever scale it was.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    ours = [one for row in rows if row.get("run") or "run" not in columns for one in _roles(row)]
    errors = {column: error for column in columns if (error := ERRORS.get(column, f"{column}_se")) in columns}
    words = {column for column in columns if any(row.get(column) and not _is_number(row[column]) for row in ours)}
    unnamed = {*errors, *errors.values(), *NO_KEYS, *(["dataset"] if "slot" in columns else [])}
    unnamed |= {column for column in columns if column.startswith(CHOSEN) or column.endswith("sha256")}
    named = [c for c in [*columns, "role"] if c not in unnamed and (c in words or c in (*KEYS, "role"))]
    counted: dict[tuple[tuple[str, str], ...], int] = {}
    found: dict[Name, Number] = {}
    for row in ours:
        key = tuple((column, row[column]) for column in named if row.get(column))
        counted[key] = counted.get(key, 0) + 1
        for column in columns:
            # Where there are errors, what has none is taken as it is in the file: a count, a bias, an estimate without one.
            wanted = column in errors if errors else not (column in unnamed or column in named or column in words)
            if wanted and _is_number(row.get(column, "")):
                error = row.get(errors.get(column, ""), "")
                value = Number(
                    float(row[column]),
                    float(error) if _is_number(error) else None,
                    row.get("samples", ""),
                    row.get("run") or row.get("runs", ""),
                )
                found[Name(file, key, counted[key], column)] = value
    return found


def verdicts(rows: Sequence[Row]) -> dict[str, str]:
    """What a table of claims says of each."""
    return {row["id"]: row["verdict"] for row in rows if row.get("id") and row.get("verdict")}


def _roles(row: Row) -> list[Row]:
    """A row of an evaluation by what it stands for: a point of the sweep, or the selected guidance, or none, or both of these."""
    if row.get("phase") == SELECT:
        return [{**row, "role": f"guidance {row['guidance']}"}]
    if row.get("phase") == REPORT and "best" in row:
        roles = ["best"] if row["best"] == "True" else []
        if _is_number(row["guidance"]) and float(row["guidance"]) == 1:
            roles.append("no guidance")
        return [{**row, "role": role} for role in roles]
    return [row]


def rows_of_metrics(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], runs: Mapping[str, str]) -> list[Row]:
    """The metrics files of jobs, {job: {"2-step": {"fid": …}}}, as rows of text."""
    return [
        {"job": job, "at": at, "run": runs[job], **{key: repr(value) for key, value in values.items()}}
        for job, groups in metrics.items()
        for at, values in groups.items()
    ]


def dump(found: Mapping[Name, Number], seeds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Numbers for JSON, with the seeds of the trainings behind them."""
    return [
        {
            "file": name.file,
            "row": dict(name.row),
            **({"which": name.which} if name.which > 1 else {}),
            "column": name.column,
            "value": _json(number.value),
            "se": _json(number.se),
            "samples": number.samples,
            "seed": " ".join(dict.fromkeys(seeds[run] for run in number.run.split() if run in seeds)),
            "run": number.run,
        }
        for name, number in found.items()
    ]


def parse(entries: Iterable[Mapping[str, Any]]) -> dict[Name, Number]:
    """What `dump` has written; KeyError, TypeError or ValueError for something else."""
    return {
        Name(entry["file"], tuple(entry["row"].items()), entry.get("which", 1), entry["column"]): Number(
            float(entry["value"]), None if entry["se"] is None else float(entry["se"]), entry["samples"], entry["run"]
        )
        for entry in entries
    }


def _json(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
