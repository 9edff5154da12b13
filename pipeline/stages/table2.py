# SPDX-License-Identifier: Apache-2.0
"""Stage table2: Table 2 of the paper, every published row beside ours."""

from pipeline import measured, paths
from pipeline.context import Context
from pipeline.shown import LATENT
from pipeline.tables import SECTIONS, floor_note, how_note, measured_note, our_rows, table2
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write table2.csv, table2.md and table2.tex."""
    ours = our_rows(measured.read(ctx.inputs), [LATENT], ctx.scale, ctx.job.scale, tuple(SECTIONS))
    notes = [
        measured_note(ctx.params, [LATENT]),
        how_note(ctx.scale.slots[LATENT]),
        floor_note(ctx.inputs["reconstruction"]),
    ]
    publish_table(ctx, "table2", table2(paths.root(), ours), "Table 2", notes)
