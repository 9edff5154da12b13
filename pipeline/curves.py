# SPDX-License-Identifier: Apache-2.0
"""FID along training (Figure 5): of the averaged weights at the checkpoints that were measured, and at the end."""

from __future__ import annotations

import pandas as pd

from pipeline import measured
from pipeline.params import Slot
from pipeline.shown import discrete, figure5_baseline, trained
from pipeline.sweep import REPORT

COLUMNS = ["iterations", "fid", "fid_se", "fid_sd", "seeds", "run"]


def curve(points: pd.DataFrame, slot: Slot, name: str, size: str, method: str, steps: int) -> pd.DataFrame:
    """FID at the selected guidance over iterations: the mean of a student's trainings at each checkpoint, and after the last iteration."""
    training = slot.student_for(size, method)
    rows = measured.of_model(points, name, size, method)
    rows = rows[(rows.phase == REPORT) & rows.best.astype(bool) & (rows.steps == steps)]
    rows = rows[rows.nimg.notna() | rows.ema.isna()]  # not the other averages of the end
    seen = rows.nimg.fillna(training.iterations * training.batch)
    found = []
    for nimg, group in rows.groupby(seen):
        number = measured.number(group)
        assert number is not None
        own = {"iterations": int(nimg) // training.batch, "fid": number.value, "fid_se": number.error}
        found.append({**own, "fid_sd": number.spread, "seeds": number.seeds, "run": measured.runs(group)})
    return pd.DataFrame(found, columns=COLUMNS)


def panels_of(slot: Slot, size: str) -> dict[str, dict[str, str]]:
    """The panels of Figure 5 with their students, name in params.yaml to label, whether the size trains them or not."""
    base = figure5_baseline(slot, size)
    numbers = {
        name: f"dsCD, N = {getattr(slot.student_for(size, name), 'intervals', 0)}" for name in discrete(slot, size)
    }
    return {
        "(a) tangent normalisation": {base: "normalised", "scd_clip": "clipped to [−1, 1]", "scd_raw": "raw"},
        "(b) adaptive weighting": {base: "with", "scd_unweighted": "without"},
        "(c) discrete time": {base: "continuous", **numbers},
    }


def figure5_table(points: pd.DataFrame, slot: Slot, name: str, size: str, steps: int) -> pd.DataFrame:
    """The curves of all panels, one below the other."""
    parts = [
        curve(points, slot, name, size, method, steps).assign(panel=panel, size=size, method=method, label=label, steps=steps)
        for panel, students in panels_of(slot, size).items()
        for method, label in students.items()
        if method in trained(slot, size)
    ]  # fmt: skip
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=["panel", "size", "method", "label", "steps", *COLUMNS])
    )
