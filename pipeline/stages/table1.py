# SPDX-License-Identifier: Apache-2.0
"""Stage table1: Table 1 of the paper (CIFAR-10, ImageNet 64), every published row beside ours."""

from pipeline import measured, paths
from pipeline.context import Context
from pipeline.shown import ITEMS
from pipeline.tables import SECTIONS, how_note, measured_note, our_rows, table1
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write table1.csv, table1.md and table1.tex."""
    item = ITEMS["table1"]
    ours = our_rows(measured.read(ctx.inputs), item.slots, ctx.scale, ctx.job.scale, tuple(SECTIONS))
    here = item.here(ctx.params)
    notes = [measured_note(ctx.params, here), *dict.fromkeys(how_note(ctx.scale.slots[slot]) for slot in here)]
    publish_table(ctx, "table1", table1(paths.root(), ours), "Table 1", notes)
