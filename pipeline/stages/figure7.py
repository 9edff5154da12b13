# SPDX-License-Identifier: Apache-2.0
"""Stage figure7: precision, recall and FID against the guidance scale, for teachers and guided students."""

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from pipeline.context import Context
from pipeline.job import REPORT_SLOT
from pipeline.sweep import SELECT
from pipeline.tables import METHOD_NAMES, read_evaluation

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

PANELS = {"fid": "FID", "precision": "precision", "recall": "recall"}
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def run(ctx: Context) -> None:
    """Write figure7.png and figure7.csv, its numbers."""
    slot = ctx.scale.slots[REPORT_SLOT]
    parts = []
    for name, folder in ctx.inputs.items():
        _, size, method = name.split("-")
        points, facts = read_evaluation(folder)
        points = points[(points.phase == SELECT) & points.guidance.notna()]
        parts.append(points.assign(size=size, method=METHOD_NAMES.get(method, method), run=facts["run"]))
    table = pd.concat(parts)
    columns = [
        "size",
        "method",
        "steps",
        "guidance",
        "nfe",
        "samples",
        *PANELS,
        *(f"{key}_se" for key in PANELS),
        "run",
    ]
    table = table[columns]  # in the order of params.yaml
    table.to_csv(ctx.out / "figure7.csv", index=False, float_format="%.6g")
    how = slot.evaluation
    title = (
        f"{slot.dataset.source}, scale {ctx.job.scale}: {how.select_samples} samples a point against {facts['reference_images']} "
        f"images, in {facts['features'][points.space.iloc[0]]}; bars: one standard error"
    )
    draw(table, title).savefig(ctx.out / "figure7.png", dpi=150, metadata={"Software": None})
    for name in ("figure7.png", "figure7.csv"):
        ctx.tracker.log_artifact(ctx.out / name)


def draw(table: pd.DataFrame, title: str) -> Figure:
    """A row of panels for each size, a line for each method and number of steps."""
    sizes = list(dict.fromkeys(table["size"]))
    figure, grid = plt.subplots(
        len(sizes), len(PANELS), figsize=(13, 0.6 + 3.4 * len(sizes)), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=9)
    for line, size in zip(grid, sizes, strict=True):
        of_size = table[table["size"] == size]
        for axis, (key, label) in zip(line, PANELS.items(), strict=True):
            axis.set_prop_cycle(color=COLOURS)
            for (method, steps), group in of_size.groupby(["method", "steps"], sort=False):
                name = f"{method}-{size}, {steps} step{'s' * (steps > 1)}"
                style = "s--" if method == "teacher" else "o-"
                axis.errorbar(
                    group.guidance, group[key], group[f"{key}_se"], fmt=style, ms=4, lw=1.2, capsize=2, label=name
                )
            axis.set(xlabel="guidance scale", ylabel=label)
            axis.grid(alpha=0.3)
        line[0].legend(fontsize=8)
    return figure
