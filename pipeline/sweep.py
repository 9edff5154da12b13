# SPDX-License-Identifier: Apache-2.0
"""What is measured of a model: guidance scales on one set of samples, then the best of them and scale 1 on fresh ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.sections import Evaluation

SELECT, REPORT = "select", "report"
NUMBERS = (
    "fid",
    "fid_se",
    "fid_bias",
    "precision",
    "precision_se",
    "recall",
    "recall_se",
    "density",
    "coverage",
    "kid",
)
# the columns of a sweep's table: a row for each point and feature space
FIELDS = (
    "phase",
    "steps",
    "guidance",
    "ema",
    "nimg",
    "nfe",
    "samples",
    "first_index",
    "space",
    "best",
    *NUMBERS,
    "key",
)


@dataclass(frozen=True)
class Point:
    """One set of images to measure: `steps` of the model's sampler at a guidance scale (None: the model has none), with the average of
    relative width `ema` as it was after `nimg` images (None: those that the training published), samples `first_index` and following."""

    phase: str
    steps: int
    guidance: float | None
    samples: int
    first_index: int
    ema: float | None = None
    nimg: int | None = None


@dataclass(frozen=True)
class Plan:
    """What to measure of one model. `grid`: its guidance scales, None for a model without; `reports`: the first indices of fresh sets."""

    steps: Sequence[int]
    grid: Sequence[float] | None
    select: tuple[int, int]  # samples, first index
    report_samples: int
    reports: Sequence[int]
    averages: Sequence[float] = ()
    """Relative widths of other averages of the finished training: measured in full, as the published one is."""
    checkpoints: Sequence[tuple[float, int]] = ()
    """Width and images seen of earlier checkpoints: one reported set at the scales at which the published average is reported."""

    @classmethod
    def of(
        cls,
        how: Evaluation,
        steps: Sequence[int],
        guidable: bool,
        averages: Sequence[float] = (),
        checkpoints: Sequence[tuple[float, int]] = (),
    ) -> Plan:
        """As params.yaml has it."""
        reports = [how.report_seed + i * how.samples for i in range(how.report_sets)]
        grid = how.guidance if guidable else None
        return cls(steps, grid, (how.select_samples, how.select_seed), how.samples, reports, averages, checkpoints)

    def most_samples(self, spaces: int = 1) -> int:
        """The most samples that it may ask for, for a progress display: each space may select a scale of its own."""
        scales = 1 if self.grid is None else min(spaces + 1, len(self.grid))
        selected = 0 if self.grid is None else len(self.grid) * self.select[0]
        whole = selected + scales * self.report_samples * len(self.reports)
        earlier = scales * self.report_samples * len(self.checkpoints)
        return len(self.steps) * ((1 + len(self.averages)) * whole + earlier)


Numbers = Mapping[str, Mapping[str, Any]]  # by space
Measure = Callable[[Point], Numbers]


def sweep(plan: Plan, spaces: Sequence[str], measure: Measure) -> list[dict]:
    """All rows of one model. Each space has its best scale, that of the lowest distance on the selecting set, for each number of steps
    and each average."""
    rows: list[dict] = []
    published: dict[int, tuple[Mapping[str, float | None], Iterable[float | None]]] = {}

    def add(point: Point, best: Mapping[str, float | None] | None) -> Numbers:
        results = measure(point)
        for space in spaces:
            chosen = best is not None and best[space] == point.guidance
            rows.append({**asdict(point), "space": space, "best": chosen, **results[space]})
        return results

    for ema in (None, *plan.averages):
        for n in plan.steps:
            best: Mapping[str, float | None] = dict.fromkeys(spaces)
            scales: Iterable[float | None] = [None]
            if plan.grid is not None:
                results = {s: add(Point(SELECT, n, s, *plan.select, ema), None) for s in plan.grid}
                chosen = {space: lowest(results, space) for space in spaces}
                best, scales = chosen, sorted({1.0, *chosen.values()})
            if ema is None:
                published[n] = best, scales
            for s in scales:
                first = Point(REPORT, n, s, plan.report_samples, plan.reports[0], ema)
                for index in plan.reports:
                    add(replace(first, first_index=index), best)
    for width, nimg in plan.checkpoints:
        for n in plan.steps:
            best, scales = published[n]
            for s in scales:
                add(Point(REPORT, n, s, plan.report_samples, plan.reports[0], width, nimg), best)
    return rows


def lowest(results: Mapping[float, Numbers], space: str) -> float:
    """The guidance scale of the lowest distance in a space, the smaller one of equals."""
    return min(results, key=lambda scale: (results[scale][space]["fid"], scale))


def reported(rows: Iterable[Mapping], distances: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """What stands for a model as published, by number of steps: its distances at the selected scale, and those without guidance.

    `distances` names each space's. Of several sets the mean stands, with their standard deviation (`…_sd`) and, said to be that, the
    minimum (`…_min`): it lies below the mean by 0.85 standard deviations for three sets.
    """
    found: dict[str, dict[str, float]] = {}
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        if row["phase"] == REPORT and row["ema"] is None and row["nimg"] is None:
            groups.setdefault((row["steps"], row["space"], row["guidance"], row["best"]), []).append(row)
    for (steps, space, guidance, best), sets in groups.items():
        entry, name = found.setdefault(f"{steps}-step", {}), distances[space]
        value, error = mean_of(sets)
        if guidance == 1.0:
            entry[f"{name}_without_guidance"] = value
        if not best:
            continue
        entry |= {name: value, f"{name}_se": error}
        if guidance is not None:
            entry["guidance" if name == "fid" else f"{name}_guidance"] = guidance
        if len(sets) > 1:
            values = [row["fid"] for row in sets]
            entry |= {f"{name}_sd": statistics.stdev(values), f"{name}_min": min(values), f"{name}_sets": len(sets)}
    return found


def mean_of(sets: Sequence[Mapping], name: str = "fid") -> tuple[float, float]:
    """The mean of a number over independent sets, and its standard error from each set's own."""
    mean = statistics.fmean(row[name] for row in sets)
    return mean, sum(row[f"{name}_se"] ** 2 for row in sets) ** 0.5 / len(sets)
