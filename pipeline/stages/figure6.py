# SPDX-License-Identifier: Apache-2.0
"""Stage figure6: FID, and its ratio to the teacher's, against the FLOPs of one forward pass: the paper's sizes, and ours."""

import pandas as pd

from pipeline import measured, paths, style
from pipeline.context import Context
from pipeline.scaling import ours, papers
from pipeline.shown import LATENT
from pipeline.tables import METHOD_NAMES


def run(ctx: Context) -> None:
    """Write figure6.png, figure6.pdf and figure6.csv, its numbers."""
    slot, points = ctx.scale.slots[LATENT], measured.read(ctx.inputs)
    table = pd.concat([papers(paths.root(), ctx.params), ours(points, slot, LATENT)], ignore_index=True)
    table.to_csv(ctx.out / "figure6.csv", index=False, float_format="%.6g")
    ctx.tracker.log_artifact(ctx.out / "figure6.csv")
    figure, grid = style.panels(2, 2, height=2.1)
    sources = {
        "paper": "the paper: ImageNet 512×512\nFID in Inception's features",
        "ours": f"ours: {style.face(ctx, slot)}\n{style.space(points)}",
    }
    for column, (source, title) in enumerate(sources.items()):
        rows = table[table.source == source]
        top, bottom = grid[0][column], grid[1][column]
        unit, scale = ("GFLOP", 1.0) if rows.gflops.max() >= 1 else ("MFLOP", 1e3)  # a demo's networks are small
        for (method, steps), group in rows.groupby(["method", "steps"], sort=False):
            known = method == "teacher"
            name = METHOD_NAMES[method] if known else f"{METHOD_NAMES[method]}, {style.steps_label(steps)}"
            shape = {"ls": style.LINES.get(steps, "-"), "label": name, **style.look(method)}
            top.errorbar(scale * group.gflops, group.fid, style.bars(group.fid_se), **shape)
            if not known:
                bottom.errorbar(scale * group.gflops, group.ratio, style.bars(group.ratio_se), **shape)
        bottom.axhline(1, color=style.BLACK, lw=0.7)
        top.set(title=title, xscale="log", yscale="log", ylabel="FID")
        bottom.set(xscale="log", yscale="log", xlabel=f"{unit} of one forward pass", ylabel="FID / FID of the teacher")
        for axis in (top, bottom):
            sizes = rows.drop_duplicates("size")
            costs = scale * sizes.gflops
            axis.set_xticks(costs, [f"{cost:.4g}\n{size}" for cost, size in zip(costs, sizes["size"], strict=True)])
            axis.minorticks_off()
            style.plain(axis)
    style.legend_below(figure, grid[0], 5)
    style.save(ctx, figure, "figure6")
