# SPDX-License-Identifier: Apache-2.0
"""Stage tableE3: Table E3 of the paper, ECT against sCT trained for three times: the published rows, and ours."""

from pipeline import measured, paths
from pipeline.context import Context
from pipeline.shown import UNCOND
from pipeline.tables import how_note, measured_note, table_e3
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write tableE3.csv, tableE3.md and tableE3.tex."""
    slot = ctx.scale.slots[UNCOND]
    table = table_e3(paths.root(), measured.read(ctx.inputs), slot, ctx.job.scale)
    notes = [measured_note(ctx.params, [UNCOND]), how_note(slot), "With 1 step."]
    publish_table(ctx, "tableE3", table, "Table E3", notes)
