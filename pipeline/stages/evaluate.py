# SPDX-License-Identifier: Apache-2.0
"""Stage evaluate: FID (with its standard error), precision and recall of one model over guidance and steps."""

import json

import pandas as pd

from pipeline.context import Context
from pipeline.evaluation import FIELDS, REPORT, Evaluator, reported
from pipeline.paths import FACTS, SWEEP
from scm_core.nn.build import count_parameters


def run(ctx: Context) -> None:
    """Write sweep.csv (a row for each measured point) and evaluation.json (the reported FIDs, and what was measured in which features)."""
    evaluator = Evaluator(ctx)
    rows = evaluator.run()
    table = pd.DataFrame(rows, columns=list(FIELDS))
    table.to_csv(ctx.out / SWEEP, index=False)
    reference = evaluator.reference
    facts = {
        "run": ctx.run_id,
        "model_run": evaluator.model.info["run"],
        "params": count_parameters(evaluator.model.net),
        "dataset": reference.dataset,
        "reference_images": reference.count,
        "reported": reported(rows),
        "features": f"{reference.extractor} ({reference.features.shape[1]}-d)",
    }
    (ctx.out / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    for row in table[table.phase == REPORT].itertuples():
        ctx.tracker.set_tag(f"fid.{row.steps}-step.guidance-{row.guidance}", f"{row.fid:.4f} ± {row.fid_se:.4f}")
    ctx.tracker.log_artifact(ctx.out / SWEEP)
