# SPDX-License-Identifier: Apache-2.0
"""Stage evaluations: every measured point of every model of the scale in one tidy file, with what it was made of."""

import pandas as pd

from pipeline.context import Context
from pipeline.measured import measured_points


def run(ctx: Context) -> None:
    """Write evaluations.csv: a row for each model, point and feature space; no times, no commits: equal runs give equal bytes."""
    parts = [measured_points(folder, ctx.job.scale, name) for name, folder in ctx.inputs.items()]
    pd.concat(parts).to_csv(ctx.out / "evaluations.csv", index=False)
    ctx.tracker.log_artifact(ctx.out / "evaluations.csv")
