# SPDX-License-Identifier: Apache-2.0
"""Stage table6: Table 6 of the paper, VSD, sCD and both: the published rows of size M, and ours."""

from pipeline import measured, paths
from pipeline.context import Context
from pipeline.shown import LATENT
from pipeline.tables import how_note, measured_note, table6
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write table6.csv, table6.md and table6.tex."""
    slot = ctx.scale.slots[LATENT]
    table = table6(paths.root(), measured.read(ctx.inputs), slot, LATENT, ctx.job.scale)
    notes = [measured_note(ctx.params, [LATENT]), how_note(slot)]
    publish_table(ctx, "table6", table, "Table 6", notes)
