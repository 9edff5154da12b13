# SPDX-License-Identifier: Apache-2.0
"""Stage claims: the paper's headline claims, each with its paper's value, ours, a standard error and a verdict."""

from pipeline import measured, paths
from pipeline.claims import ERRORS, FAILS, HOLDS, OPEN, Evidence, table
from pipeline.context import Context
from pipeline.headlines import claims
from pipeline.writing import publish_table


def run(ctx: Context) -> None:
    """Write claims.csv, claims.md and claims.tex."""
    points = measured.read(ctx.inputs)
    found = table(claims(Evidence(points, ctx.params, paths.root())), ctx.job.scale, points)
    notes = [
        f"A claim *{HOLDS}* if its number is on the claimed side of the bound by more than {ERRORS:g} standard errors (one-sided), it "
        f"*{FAILS}* if it is as far on the other side, and in between, or without the runs, it is *{OPEN}*. Counts have no error: their "
        "sign decides. A verdict is about the data named here, not about ImageNet.",
        "The error of one training (trainings: 1) is that of measuring it: how much another training would differ is not in it. That of a "
        "few comes from their spread, where that is larger, and is rough itself: verdicts near the bound may turn.",
    ]
    shown = found.drop(columns=["scale", "runs"])
    publish_table(ctx, "claims", found, f"Claims: scale {ctx.job.scale}", notes, shown=shown)
