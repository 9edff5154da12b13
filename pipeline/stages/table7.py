# SPDX-License-Identifier: Apache-2.0
"""Stage table7: Table 7 of the paper, the evaluation on class-conditional pixels: every published number, and ours."""

from pipeline import measured, paths
from pipeline.context import Context
from pipeline.quantities import by_size, quantities
from pipeline.shown import COND
from pipeline.tables import how_note, measured_note
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write table7.csv, and by size table7.md and table7.tex."""
    points = measured.read(ctx.inputs)
    table = quantities(paths.root(), "table7", COND, points, ctx.scale, ctx.job.scale)
    notes = [measured_note(ctx.params, [COND]), how_note(ctx.scale.slots[COND])]
    publish_table(ctx, "table7", table, "Table 7", notes, shown=by_size(table))
