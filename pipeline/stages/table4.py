# SPDX-License-Identifier: Apache-2.0
"""Stage table4: Table 4 of the paper, the training settings for ImageNet 512, beside those that this scale uses."""

from pipeline import paths
from pipeline.context import Context
from pipeline.settings_tables import settings_note, settings_table
from pipeline.shown import LATENT
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write table4.csv, table4.md and table4.tex."""
    slot = ctx.scale.slots[LATENT]
    table = settings_table(paths.root(), "table4", slot, ctx.job.scale)
    publish_table(ctx, "table4", table, "Table 4", [settings_note(slot, ctx.job.scale)])
