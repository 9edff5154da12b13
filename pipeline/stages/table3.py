# SPDX-License-Identifier: Apache-2.0
"""Stage table3: Table 3 of the paper, the training settings for ImageNet 64, beside those that this scale uses."""

from pipeline import paths
from pipeline.context import Context
from pipeline.settings_tables import settings_note, settings_table
from pipeline.shown import COND
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write table3.csv, table3.md and table3.tex."""
    slot = ctx.scale.slots[COND]
    table = settings_table(paths.root(), "table3", slot, ctx.job.scale)
    publish_table(ctx, "table3", table, "Table 3", [settings_note(slot, ctx.job.scale)])
