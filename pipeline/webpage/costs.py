# SPDX-License-Identifier: Apache-2.0
"""What the runs took, and what on: sums of the records by stage, FLOPs of trainings as `pipeline.costs` counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.costs import training_flops
from pipeline.params import Params
from pipeline.webpage.runs import Run, Stage

TRAINED = ("teacher", "student")


@dataclass(frozen=True)
class StageCost:
    """Sums over the runs of a stage."""

    name: str
    runs: int
    recorded: int
    """Runs whose times are known."""
    seconds: float
    cpu_seconds: float
    peak_memory_mb: float
    bytes: int
    flops: float | None
    """Of trainings, by count of the network's operations."""


@dataclass(frozen=True)
class Environment:
    """What runs were made with: one line for each that occurs."""

    facts: Mapping[str, str]
    runs: int


def cost(stage: Stage, params: Params) -> StageCost:
    """Of one stage."""
    records = [run.record for run in stage.runs if run.record]

    def total(key: str) -> float:
        return sum(float(record.get(key) or 0) for record in records)

    flops = [_flops(run, params) for run in stage.runs]
    known = [value for value in flops if value is not None]
    return StageCost(
        stage.name,
        len(stage.runs),
        len(records),
        total("seconds"),
        total("cpu_seconds"),
        max((float(record.get("peak_memory_mb") or 0) for record in records), default=0.0),
        sum(run.bytes for run in stage.runs),
        sum(known) if known else None,
    )


def _flops(run: Run, params: Params) -> float | None:
    axes = run.job.axes
    if run.job.stage not in TRAINED:
        return None
    slot = params.scales[run.job.scale].slots[axes["slot"]]
    if run.job.stage == "teacher" and slot.sizes[axes["size"]].imported:
        return None
    return training_flops(slot, axes["size"], axes.get("method", "teacher"))


def environments(runs: Sequence[Run]) -> list[Environment]:
    """The distinct ones that were recorded, the commonest first; those of which nothing is known last."""
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for run in runs:
        facts = tuple(_facts(run.record).items())
        counts[facts] = counts.get(facts, 0) + 1
    found = [Environment(dict(facts), count) for facts, count in counts.items()]
    return sorted(found, key=lambda one: (not one.facts, -one.runs))


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    recorded = record.get("environment")
    if not isinstance(recorded, Mapping):
        return {}
    facts = {str(key): str(value) for key, value in recorded.items() if value}
    return {**facts, "launcher": str(record["launcher"])} if record.get("launcher") else facts
