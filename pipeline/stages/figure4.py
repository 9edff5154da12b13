# SPDX-License-Identifier: Apache-2.0
"""Stage figure4: the two parts of dF/dt against t with three time embeddings, in diffusion models of a toy (paper §4.1)."""

import numpy as np
import pandas as pd

from pipeline import style
from pipeline.context import Context
from pipeline.embeddings import VARIANTS, measure

QUANTITIES = {"space": r"$\|\nabla_{x}F \cdot dx_t/dt\|$", "time": r"$\|\partial_t F\|$"}
COLOURS = (style.VERMILION, style.ORANGE, style.BLUE)


def run(ctx: Context) -> None:
    """Write figure4.png, figure4.pdf and figure4.csv, its numbers."""
    plan = ctx.scale.figure4
    assert plan is not None
    progress = ctx.progress(len(VARIANTS) * plan.seeds * plan.iterations, "it")
    table = pd.DataFrame(measure(plan, ctx.scale.seed, progress.update))
    progress.close()
    table.to_csv(ctx.out / "figure4.csv", index=False, float_format="%.5g")
    ctx.tracker.log_artifact(ctx.out / "figure4.csv")
    figure, ((left, right),) = style.panels(1, 2, height=2.5)
    figure.suptitle(
        f"toy: diffusion models of a 2-D Gaussian mixture, scale {ctx.job.scale}; mean over {plan.points} points and "
        f"{plan.seeds} seeds, bands: the seeds' extremes"
    )
    for axis, (quantity, label) in zip((left, right), QUANTITIES.items(), strict=True):
        for (variant, name), colour in zip(VARIANTS.items(), COLOURS, strict=True):
            rows = table[(table.embedding == variant) & (table.quantity == quantity)]
            by_time = rows.groupby("t").value
            mean = np.exp(by_time.apply(lambda values: np.log(values).mean()))
            axis.plot(mean.index, mean, color=colour, label=name.format(scale=plan.fourier_scale))
            axis.fill_between(mean.index, by_time.min(), by_time.max(), color=colour, alpha=0.25, lw=0)
        axis.set(xlabel="t (radians)", ylabel=label, yscale="log")
    left.legend()
    style.save(ctx, figure, "figure4")
