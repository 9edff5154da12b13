# SPDX-License-Identifier: Apache-2.0
"""Stage figure5: FID against iterations for tangents, adaptive weighting, and discrete against continuous time."""

import pandas as pd

from pipeline import measured, style
from pipeline.context import Context
from pipeline.curves import figure5_table, panels_of
from pipeline.shown import LATENT, figure5_students

STEPS = 1
PALETTES = ((style.BLUE, style.ORANGE, style.VERMILION), (style.BLUE, style.VERMILION), None)


def run(ctx: Context) -> None:
    """Write figure5.png, figure5.pdf and figure5.csv, its numbers."""
    slot, points = ctx.scale.slots[LATENT], measured.read(ctx.inputs)
    sizes = [size for size in slot.sizes if figure5_students(slot, size)] or list(slot.sizes)[:1]
    tables = [figure5_table(points, slot, LATENT, size, STEPS) for size in sizes]
    table = pd.concat(tables)
    table.to_csv(ctx.out / "figure5.csv", index=False, float_format="%.6g")
    ctx.tracker.log_artifact(ctx.out / "figure5.csv")
    figure, grid = style.panels(len(sizes), 3, height=2.8)
    counts = " or ".join(str(count) for count in sorted(set(table.seeds))) or "0"
    bars = f"seeds: {counts}; bars: standard errors of the mean"
    figure.suptitle(
        f"{style.face(ctx, slot)}, {style.space(points)}\n{style.steps_label(STEPS)}, FID at the selected guidance; {bars}"
    )
    for line, size, rows in zip(grid, sizes, tables, strict=True):
        for axis, (panel, students), colours in zip(line, panels_of(slot, size).items(), PALETTES, strict=True):
            known = rows[rows.panel == panel]
            palette = colours or (style.BLUE, *style.shades(len(students) - 1))
            for (method, label), colour in zip(students.items(), palette, strict=True):
                group = known[known.method == method]
                if group.empty:
                    axis.plot([], [], color=colour, ls=":", label=f"{label}: missing")
                    continue
                marker = "o" if method == next(iter(students)) else "X"
                axis.errorbar(group.iterations, group.fid, group.fid_se, color=colour, marker=marker, label=label)
            if len(students) == 1:
                style.placeholder(axis, "missing: no discrete-time student at this scale")
            axis.set(title=panel, xlabel="iterations", ylabel=f"FID, size {size}", yscale="log")
            style.plain(axis)
            style.panel_legend(axis)
    style.save(ctx, figure, "figure5")
