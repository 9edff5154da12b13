# SPDX-License-Identifier: Apache-2.0
"""Stage evaluate: distances (with their standard errors), precision, recall and the like of one model over guidance and steps."""

import json

import pandas as pd

from pipeline import paths
from pipeline.context import Context
from pipeline.evaluation import Evaluator, load_references
from pipeline.ranks import RankDone, together
from pipeline.spaces import SPACES
from pipeline.subjects import ModelSubject
from pipeline.sweep import FIELDS, NUMBERS, REPORT, Numbers, Plan, Point, reported, sweep
from scm_core.nn.build import count_parameters


def run(ctx: Context) -> None:
    """Write sweep.csv (a row for each measured point and space) and evaluation.json (what is reported, and what it was measured with)."""
    slot, how, axes = ctx.slot, ctx.slot.evaluation, ctx.job.axes
    with together(ctx.job, how.processes) as ranks:
        subject = ModelSubject(slot, axes["size"], axes["method"], ctx.inputs, ranks.device)
        data = slot.dataset.wanted().name
        references = load_references(how.spaces, ctx.inputs["reference"], data)
        plan = Plan.of(how, subject.steps, subject.guidable, subject.averages, subject.checkpoints)
        progress, before = ctx.progress(plan.most_samples(len(how.spaces)), "img"), 0

        def shown(done: int) -> None:
            progress.update(before + done)

        cache = paths.evaluation_cache(ctx.job.scale)
        evaluator = Evaluator(subject, references, ctx.inputs, how, cache, shown, ranks.device, ranks.wait)

        def measure(point: Point) -> Numbers:
            nonlocal before
            if evaluator.known(point):  # what was found is no measure of speed
                progress.start(before + point.samples)
            results = evaluator.measure(point)
            before += point.samples
            track(ctx, point, results)
            return results

        rows = sweep(plan, how.spaces, measure)
        progress.close()
        if not ranks.first:
            raise RankDone
    table = pd.DataFrame(rows, columns=list(FIELDS))
    table.to_csv(ctx.out / paths.SWEEP, index=False)
    first = references[how.spaces[0]]
    facts = {
        "run": ctx.run_id,
        "model_run": subject.name,
        "params": count_parameters(subject.model.net),
        "dataset": first.dataset,
        "reference_images": first.count,
        **({"manifold_images": len(first.features)} if first.subset else {}),
        "reported": reported(rows, {space: SPACES[space].distance for space in how.spaces}),
        "features": {space: f"{r.extractor} ({r.features.shape[1]}-d)" for space, r in references.items()},
    }
    (ctx.out / paths.FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    published = table[table.ema.isna() & table.nimg.isna()]
    for row in published[(published.phase == REPORT) & published.best].itertuples():
        name = f"{SPACES[row.space].distance}.{row.steps}-step.guidance-{row.guidance}"
        ctx.tracker.set_tag(name, f"{row.fid:.4f} ± {row.fid_se:.4f}")
    ctx.tracker.log_artifact(ctx.out / paths.SWEEP)


def track(ctx: Context, point: Point, results: Numbers) -> None:
    """Numbers of a point as metrics, over the guidance scale: MLflow's steps are whole numbers, so in hundredths of it."""
    for space, found in results.items():
        variant = "".join(f"/{axis}-{value}" for axis in ("ema", "nimg") if (value := getattr(point, axis)) is not None)
        name = f"{point.phase}/{point.steps}-step/{space}{variant}"
        values = {f"{name}/{key}": found[key] for key in NUMBERS if found[key] is not None}
        ctx.tracker.log_metrics(round(100 * (point.guidance or 1.0)), values)
