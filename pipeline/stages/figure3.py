# SPDX-License-Identifier: Apache-2.0
"""Stage figure3: discrete and continuous consistency training on a toy whose PF-ODE is known."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline import style
from pipeline.context import Context
from pipeline.toy import Result, Row, Toy, measure, total_iterations

COLOURS = {"fp32": style.BLUE, "bf16": style.ORANGE, "fp16": style.GREEN, "fp64": style.BLACK}
NAMES = {"scd": ("sCD", "--"), "sct": ("sCT", "-.")}


def run(ctx: Context) -> None:
    """Write figure3.png, figure3.pdf and figure3.csv."""
    plan = ctx.scale.figure3
    assert plan is not None
    toy = Toy(plan, ctx.scale.seed)
    progress = ctx.progress(total_iterations(plan), "it")
    result = measure(toy, progress.update)
    progress.close()
    pd.DataFrame(result.rows).to_csv(ctx.out / "figure3.csv", index=False, float_format="%.5g")
    title = f"toy: 2-D Gaussian mixture, its own perfect teacher (scale {ctx.job.scale})"
    style.save(ctx, draw(toy, result, title), "figure3")
    ctx.tracker.log_artifact(ctx.out / "figure3.csv")


def draw(toy: Toy, result: Result, title: str) -> Figure:
    """Trajectories and samples; the students' error against N; the tangent's error against N."""
    figure, ((left, middle, right),) = style.panels(1, 3, height=3.1)
    figure.suptitle(title)
    draw_paths(toy, result, left)
    draw_errors(result.rows, "rms_error", middle)
    middle.set(title="(b) one-step sample after training", ylabel="RMS distance from the exact map")
    draw_errors(result.rows, "tangent_error", right)
    right.set(title="(c) tangent of one fixed network", ylabel="relative RMS error of the tangent")
    style.legend_below(figure, (left, middle, right), 4)  # within a panel it would hide lines
    return figure


def draw_paths(toy: Toy, result: Result, axis: Axes) -> None:
    """PF-ODE trajectories from noise to data, and where the students land in one step."""
    count, n = toy.plan.paths, toy.plan.intervals[0]
    start = math.sin(toy.t_max) * toy.z[:count]
    axis.plot(*toy.paths(start).unbind(2), color="0.75", lw=0.5, zorder=1)
    axis.plot(*start.T, ".", color="0.6", ms=3, label="(a) noise")
    ends = {
        "exact": ("(a) exact PF-ODE", "o"),
        "scd-fp32-": ("(a) sCD", "."),
        f"dscd-fp32-{n}": (f"(a) dsCD, N = {n}", "x"),
    }
    colours = (style.BLACK, style.BLUE, style.VERMILION)
    for (name, (label, marker)), colour in zip(ends.items(), colours, strict=True):
        face = "none" if marker == "o" else None
        axis.plot(*result.samples[name][:count].T, marker, color=colour, ms=4, mew=0.7, mfc=face, label=label)
    axis.set(title="(a) from noise to data", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")


def draw_errors(rows: list[Row], quantity: str, axis: Axes) -> None:
    """A line for each method and precision over N; a horizontal one for continuous time."""
    table = pd.DataFrame([row for row in rows if row.quantity == quantity])
    for (method, precision), group in table.groupby(["method", "precision"], sort=False):
        discrete = group[group.intervals != ""]
        if len(discrete):
            name, line = ("N DDIM steps", ":") if method == "ddim" else (f"dsCD, {precision}", "o-")
            axis.plot(discrete.intervals, discrete.value, line, color=COLOURS[precision], label=name)
        for value in group[group.intervals == ""].value:
            name, line = NAMES[method]
            axis.axhline(value, ls=line, color=COLOURS[precision], lw=1, label=f"{name}, {precision}")
    axis.set(xscale="log", yscale="log", xlabel="number of intervals N")
    axis.set_xticks(sorted(set(table.intervals) - {""}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="x", labelrotation=60)
    axis.minorticks_off()
