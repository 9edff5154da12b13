# SPDX-License-Identifier: Apache-2.0
"""Stage report: one page with everything that the scale's reports and evaluations say, and what they were made of."""

from pipeline.context import Context
from pipeline.page import PAGE
from pipeline.webpage.render import render


def run(ctx: Context) -> None:
    """Write report.html."""
    (ctx.out / PAGE).write_text(render(ctx.job, ctx.params, ctx.inputs, ctx.input_runs), encoding="utf-8")
    ctx.tracker.log_artifact(ctx.out / PAGE)
