# SPDX-License-Identifier: Apache-2.0
"""Stage table5: Table 5 of the paper, the evaluation on latents, at the best guidance of each model: every published number, and ours."""

from pipeline import measured, paths
from pipeline.context import Context
from pipeline.quantities import by_size, quantities
from pipeline.shown import LATENT
from pipeline.tables import how_note, measured_note
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write table5.csv, and by size table5.md and table5.tex."""
    points = measured.read(ctx.inputs)
    table = quantities(paths.root(), "table5", LATENT, points, ctx.scale, ctx.job.scale)
    notes = [measured_note(ctx.params, [LATENT]), how_note(ctx.scale.slots[LATENT])]
    publish_table(ctx, "table5", table, "Table 5", notes, shown=by_size(table))
