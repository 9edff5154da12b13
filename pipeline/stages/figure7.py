# SPDX-License-Identifier: Apache-2.0
"""Stage figure7: precision, recall and FID against the guidance scale, for teachers and guided students."""

import pandas as pd
from matplotlib.figure import Figure

from pipeline import measured, style
from pipeline.context import Context
from pipeline.shown import LATENT
from pipeline.tables import METHOD_NAMES

PANELS = {"fid": "FID", "precision": "precision", "recall": "recall"}
COLUMNS = ["size", "method", "steps", "guidance", "nfe", "samples", *PANELS, *(f"{key}_se" for key in PANELS), "run"]


def run(ctx: Context) -> None:
    """Write figure7.png, figure7.pdf and figure7.csv, its numbers."""
    points = measured.swept(measured.read(ctx.inputs))
    points = points[points.space != "dinov2"]
    named = points.assign(method=[METHOD_NAMES[method] for method in points.method])
    named[COLUMNS].to_csv(ctx.out / "figure7.csv", index=False, float_format="%.6g")
    ctx.tracker.log_artifact(ctx.out / "figure7.csv")
    how, slot = ctx.scale.slots[LATENT].evaluation, ctx.scale.slots[LATENT]
    images = points.reference_images.iloc[0] if len(points) else 0
    title = (
        f"{style.face(ctx, slot)}, {style.space(points)}\n"
        f"{how.select_samples} samples a point against {images} images; bars: one standard error"
    )
    style.save(ctx, draw(points, title), "figure7")


def draw(points: pd.DataFrame, title: str) -> Figure:
    """A row of panels for each size, a line for each method and number of steps."""
    sizes = list(dict.fromkeys(points["size"]))
    figure, grid = style.panels(max(1, len(sizes)), len(PANELS))
    figure.suptitle(title)
    for line, size in zip(grid, sizes, strict=False):
        of_size = points[points["size"] == size]
        for axis, (key, label) in zip(line, PANELS.items(), strict=True):
            for (method, steps), group in of_size.groupby(["method", "steps"], sort=False):
                name = (
                    METHOD_NAMES[method]
                    if method == "teacher"
                    else f"{METHOD_NAMES[method]}, {style.steps_label(steps)}"
                )
                axis.errorbar(
                    group.guidance, group[key], group[f"{key}_se"], ls=style.LINES.get(steps, "-"), label=name, **style.look(method)
                )  # fmt: skip
            axis.set(xlabel="guidance scale s", ylabel=f"{label}, size {size}")
    style.legend_below(figure, grid.flat, 4)
    if not sizes:
        style.placeholder(grid[0][0], "missing: no guided model at this scale")
    return figure
