# SPDX-License-Identifier: Apache-2.0
"""Stage figure1: FID against effective sampling compute (parameters in billions × NFE): all systems of Table 2, and ours beside them."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from pipeline import measured, paths, style
from pipeline.context import Context
from pipeline.overrides import base_of
from pipeline.scaling import our_systems, systems
from pipeline.shown import LATENT, table5_students
from pipeline.tables import METHOD_NAMES

NAMES = {"teacher": "TrigFlow teacher", "sct": "sCT", "scd": "sCD"}


def run(ctx: Context) -> None:
    """Write figure1.png, figure1.pdf and figure1.csv, its numbers."""
    slot, points = ctx.scale.slots[LATENT], measured.read(ctx.inputs)
    paper = systems(paths.root())
    students = {size: list(dict.fromkeys(map(base_of, table5_students(slot, size)))) for size in slot.sizes}
    ours = our_systems(points, slot, LATENT, students)
    pd.concat([paper, ours]).to_csv(ctx.out / "figure1.csv", index=False, float_format="%.6g")
    ctx.tracker.log_artifact(ctx.out / "figure1.csv")
    figure, ((left, right),) = style.panels(1, 2, height=3.3)
    for section, group in paper[paper.method == "other"].groupby("section", sort=False):
        marker = {"GANs & masked models": "x"}.get(str(section), "+")
        left.plot(group.compute, group.fid, marker, color=style.GREY, label=str(section).replace(" models", ""))
    draw(left, paper[paper.method != "other"], NAMES)
    left.set_title("the paper and what it cites: ImageNet 512×512\nFID in Inception's features")
    draw(right, ours, {**NAMES, "scd_vsd": METHOD_NAMES["scd_vsd"], "teacher": METHOD_NAMES["teacher"]})
    right.set_title(f"ours: {style.face(ctx, slot)}\n{style.space(points)}")
    for axis in (left, right):
        axis.set(
            xscale="log", yscale="log", xlabel="effective sampling compute (billion parameters × NFE)", ylabel="FID"
        )
        style.plain(axis)
        axis.xaxis.set_minor_formatter(NullFormatter())
        style.panel_legend(axis)
    style.save(ctx, figure, "figure1")


def draw(axis: Axes, table: pd.DataFrame, names: dict[str, str]) -> None:
    """A line over sizes for each method and number of steps, of multistep students one over M for each size; bars are standard errors."""
    if table.empty:
        style.placeholder(axis, "missing")
        return
    known = table[table.method.isin(list(names))]
    for (method, steps), group in known.groupby(["method", "steps"], sort=False):
        label = names[str(method)] if method == "teacher" else f"{names[str(method)]}, {style.steps_label(steps)}"
        line(axis, group, label, str(method), style.LINES.get(steps, "-"))
    others = table[~table.method.isin(list(names))]
    for size, group in others.groupby("size", sort=False) if len(others) else ():
        numbers = ", ".join(str(steps) for steps in group.steps)
        line(axis, group, f"multistep sCD-{size}, M = {numbers}", "multistep", ":")


def line(axis: Axes, group: pd.DataFrame, label: str, method: str, kind: str) -> None:
    """Points and their bars."""
    axis.errorbar(group.compute, group.fid, style.bars(group.fid_se), ls=kind, label=label, **style.look(method))
