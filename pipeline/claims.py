# SPDX-License-Identifier: Apache-2.0
"""The paper's headline claims as statements about measured numbers, each judged by one rule.

A claim is a margin: how far a number is on the claimed side of a bound, with a standard error. It holds if the margin is more than two
standard errors above zero (one-sided, 2.3 % of chance with normal errors), it does not hold if it is as far below, and between them this
scale cannot tell. Counts have no error: their sign decides. Bounds are the paper's own words, or marked as ours.

The 2.3 % are those of a known error. The spread of three trainings is known badly itself: of two means of three, 5.8 % lie beyond two
standard errors by chance (Student's t, four degrees of freedom). The error of a single training is that of measuring it alone: it says
nothing of how another training would end. Both stand on the face of the claims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from pipeline import measured
from pipeline.measured import Number
from pipeline.params import Params, Slot
from pipeline.shown import LATENT

HOLDS, FAILS, OPEN = "holds", "does not hold", "not testable at this scale"
FIGURE = "a figure without numbers"  # what the paper has in place of a value
ERRORS = 2.0  # standard errors that decide
COLUMNS = [
    "id", "statement", "paper", "ours", "standard_error", "rule", "verdict", "why", "scale", "dataset", "features", "runs"
]  # fmt: skip


class Claim(NamedTuple):
    """A row of claims.csv but what all rows share."""

    id: str
    statement: str
    paper: str
    ours: str
    standard_error: str
    rule: str
    verdict: str
    why: str
    runs: str


class Found(NamedTuple):
    """What was measured for a claim: the number, the margin by which it is on the claimed side, the error of both, the runs."""

    value: float
    margin: float
    error: float | None
    """None: a count."""
    why: str
    runs: str = ""
    digits: int = 3
    undecided: str = ""
    """Why the number decides nothing, whatever it is: it could not have come out otherwise, or is a bound on the wrong side."""


@dataclass(frozen=True)
class Evidence:
    """All that claims are judged by: the scale's evaluations, its parameters, the published tables."""

    points: pd.DataFrame
    params: Params
    root: Path

    def slot(self, name: str = LATENT) -> Slot | None:
        """A slot of the scale."""
        return self.params.active.slots.get(name)

    def rows(self, slot: str, size: str, method: str, steps: int | None = None) -> pd.DataFrame:
        """A model's reported points in the space of FID."""
        return measured.reported(measured.of_model(self.points, slot, size, method), steps)

    def sweep(self, size: str, method: str, steps: int | None = None) -> pd.DataFrame:
        """The guidance sweep of a latent model."""
        rows = measured.swept(measured.of_model(self.points, LATENT, size, method))
        return rows if steps is None else rows[rows.steps == steps]


class Absent(Exception):
    """A run that a claim needs is not there; the message says which."""


def judged(margin: float, error: float | None) -> str:
    """The rule of this module; a count's error is None."""
    if error is None:
        return HOLDS if margin >= 0 else FAILS
    if abs(margin) <= ERRORS * error:
        return OPEN
    return HOLDS if margin > 0 else FAILS


def claim(id: str, statement: str, paper: str, rule: str, find: Callable[[], Found]) -> Claim:
    """The claim with its verdict; where a run is missing it is not testable, and says so."""
    try:
        found = find()
    except Absent as absent:
        return Claim(id, statement, paper, "missing", "", rule, OPEN, str(absent), "")
    verdict, why = judged(found.margin, found.error), found.why
    if found.undecided:
        verdict, why = OPEN, f"{why}; {found.undecided}"
    elif verdict == OPEN:
        why = (
            f"{why}; the margin of {found.margin:z.3g} is within {ERRORS:g} standard errors ({found.error:.2g}) of zero"
        )
    ours, error = f"{found.value:.{found.digits}f}", "" if found.error is None else f"{found.error:.{found.digits}f}"
    return Claim(id, statement, paper, ours, error, rule, verdict, why, found.runs)


def needed(rows: pd.DataFrame, what: str, column: str = "fid") -> Number:
    """The number of rows that a claim cannot do without."""
    number = measured.number(rows, column)
    if number is None:
        raise Absent(f"no run of {what} at this scale")
    return number


def trainings(*parts: pd.DataFrame) -> str:
    """How many trainings each number is the mean of: a single one's error is that of measuring it alone."""
    counts = dict.fromkeys(str(part.seed.nunique()) for part in parts)
    return f"trainings: {' and '.join(counts)}"


def difference(a: Number, b: Number) -> tuple[float, float]:
    """a − b and its standard error, as of independent numbers: an upper bound for ours, whose samples share their noise."""
    return a.value - b.value, (a.error**2 + b.error**2) ** 0.5


def over_guidance(a: pd.DataFrame, b: pd.DataFrame, column: str, what: str) -> tuple[float, float, int]:
    """The mean over common guidance scales of a − b, its error, and the number of scales.

    Every scale is measured with the same noise, so errors are taken as wholly correlated: their mean is that of the mean.
    """
    scales = sorted(set(a.guidance) & set(b.guidance))
    if not scales:
        raise Absent(f"no guidance sweep of {what} at this scale")
    pairs = [
        difference(needed(a[a.guidance == s], what, column), needed(b[b.guidance == s], what, column)) for s in scales
    ]
    count = len(scales)
    return sum(value for value, _ in pairs) / count, sum(error for _, error in pairs) / count, count


def table(claims: Iterable[Claim], scale: str, points: pd.DataFrame) -> pd.DataFrame:
    """claims.csv: each claim with the data and the features that its runs were measured with; a count was not measured with any."""
    rows = []
    for found in claims:
        behind = points[points.run.isin(found.runs.split()) & (points.space != "dinov2")]
        said = {name: ", ".join(dict.fromkeys(behind[name])) for name in ("dataset", "features")}
        rows.append({**found._asdict(), "scale": scale, **said})
    return pd.DataFrame(rows, columns=COLUMNS)


def sizes_of(slot: Slot | None, *methods: str) -> Iterator[str]:
    """The sizes that train all these students."""
    for size in slot.sizes if slot else ():
        assert slot is not None
        if all(method in slot.sizes[size].students for method in methods):
            yield size
