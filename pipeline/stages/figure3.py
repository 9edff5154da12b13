# SPDX-License-Identifier: Apache-2.0
"""Stage figure3: discrete and continuous consistency training on a toy whose PF-ODE is known."""

import math

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.context import Context
from pipeline.toy import Result, Row, Toy, measure, total_iterations

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

COLOURS = {"fp32": "tab:blue", "bf16": "tab:orange", "fp16": "tab:green", "fp64": "black"}
NAMES = {"scd": ("sCD", "--"), "sct": ("sCT", "-.")}


def run(ctx: Context) -> None:
    """Write figure3.png and figure3.csv."""
    plan = ctx.scale.figure3
    assert plan is not None
    toy = Toy(plan, ctx.scale.seed)
    progress = ctx.progress(total_iterations(plan), "it")
    result = measure(toy, progress.update)
    progress.close()
    pd.DataFrame(result.rows).to_csv(ctx.out / "figure3.csv", index=False, float_format="%.5g")
    title = f"toy: 2-D Gaussian mixture, its own perfect teacher (scale {ctx.job.scale})"
    draw(toy, result, title).savefig(ctx.out / "figure3.png", dpi=150, metadata={"Software": None})
    for name in ("figure3.png", "figure3.csv"):
        ctx.tracker.log_artifact(ctx.out / name)


def draw(toy: Toy, result: Result, title: str) -> Figure:
    """Trajectories and samples; the students' error against N; the tangent's error against N."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.9), layout="constrained")
    figure.suptitle(title)
    draw_paths(toy, result, left)
    draw_errors(result.rows, "rms_error", middle)
    middle.set(title="(b) one-step sample after training", ylabel="RMS distance from the exact PF-ODE map (σ_d = 0.5)")
    draw_errors(result.rows, "tangent_error", right)
    right.set(title="(c) tangent of one fixed network", ylabel="relative RMS error of the tangent")
    return figure


def draw_paths(toy: Toy, result: Result, axis: Axes) -> None:
    """PF-ODE trajectories from noise to data, and where the students land in one step."""
    count, n = toy.plan.paths, toy.plan.intervals[0]
    start = math.sin(toy.t_max) * toy.z[:count]
    axis.plot(*toy.paths(start).unbind(2), color="0.75", lw=0.7, zorder=1)
    axis.plot(*start.T, ".", color="0.6", ms=3, label="noise")
    ends = {"exact": ("exact PF-ODE", "ko"), "scd-fp32-": ("sCD", "b."), f"dscd-fp32-{n}": (f"dsCD, N = {n}", "rx")}
    for name, (label, style) in ends.items():
        axis.plot(*result.samples[name][:count].T, style, ms=6, mfc="none" if style == "ko" else None, label=label)
    axis.set(title="(a) from noise to data", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axis.legend(fontsize=8)


def draw_errors(rows: list[Row], quantity: str, axis: Axes) -> None:
    """A line for each method and precision over N; a horizontal one for continuous time."""
    table = pd.DataFrame([row for row in rows if row.quantity == quantity])
    for (method, precision), group in table.groupby(["method", "precision"], sort=False):
        discrete = group[group.intervals != ""]
        if len(discrete):
            name, style = ("N DDIM steps", ":") if method == "ddim" else (f"dsCD, {precision}", "o-")
            axis.plot(discrete.intervals, discrete.value, style, color=COLOURS[precision], ms=4, label=name)
        for value in group[group.intervals == ""].value:
            name, style = NAMES[method]
            axis.axhline(value, ls=style, color=COLOURS[precision], lw=1, label=f"{name}, {precision}")
    axis.set(xscale="log", yscale="log", xlabel="number of intervals N")
    axis.set_xticks(sorted(set(table.intervals) - {""}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
