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
from pipeline.summary import COLUMNS, curves, metrics, summary, track
from pipeline.sweep import FIELDS, REPORT, Numbers, Plan, Point, reported, sweep
from scm_core.nn.build import count_parameters


def run(ctx: Context) -> None:
    """Write sweep.csv (a row for each measured point and space), what is reported of it (summary.csv by checkpoint, metrics.json for the
    finished model) and evaluation.json (what was measured, and with what)."""
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
            track(ctx.tracker, point, results)
            return results

        rows = sweep(plan, how.spaces, measure)
        progress.close()
        if not ranks.first:
            raise RankDone
    table = pd.DataFrame(rows, columns=list(FIELDS))
    table.to_csv(ctx.out / paths.SWEEP, index=False)
    distances: dict[str, str] = {space: SPACES[space].distance for space in how.spaces}
    short = summary(rows, int(subject.model.info.get("nimg", 0)))  # 0: of an imported network nobody knows
    pd.DataFrame(short, columns=list(COLUMNS)).to_csv(ctx.out / paths.SUMMARY, index=False)
    (ctx.out / paths.METRICS).write_text(json.dumps(metrics(short, distances), indent=1, sort_keys=True) + "\n")
    for nimg, values in curves(short, distances).items():
        ctx.tracker.log_model(nimg, values)
    first = references[how.spaces[0]]
    facts = {
        "run": ctx.run_id,
        "model_run": subject.name,
        "params": count_parameters(subject.model.net),
        "skipped_steps": subject.model.info.get("skipped_steps", 0),
        "dataset": first.dataset,
        "reference_images": first.count,
        **({"manifold_images": len(first.features)} if first.subset else {}),
        "reported": reported(rows, distances),
        "features": {space: f"{r.extractor} ({r.features.shape[1]}-d)" for space, r in references.items()},
    }
    (ctx.out / paths.FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    published = table[table.ema.isna() & table.nimg.isna()]
    for row in published[(published.phase == REPORT) & published.best].itertuples():
        name = f"{distances[row.space]}.{row.steps}-step.guidance-{row.guidance}"
        ctx.tracker.set_tag(name, f"{row.fid:.4f} ± {row.fid_se:.4f}")
    ctx.tracker.log_artifact(ctx.out / paths.SWEEP)
