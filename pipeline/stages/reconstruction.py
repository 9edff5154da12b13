# SPDX-License-Identifier: Apache-2.0
"""Stage reconstruction: distances of the images from themselves, encoded and decoded: what would remain of a perfect latent model."""

import json

import pandas as pd

from pipeline import paths
from pipeline.context import Context
from pipeline.evaluation import Evaluator, load_references
from pipeline.modelling import VAE_FILE
from pipeline.ranks import RankDone, together
from pipeline.reconstruction import ReconstructionSubject
from pipeline.spaces import SPACES
from pipeline.sweep import NUMBERS, REPORT, Point
from scm_core.nn.build import load_model


def run(ctx: Context) -> None:
    """Write reconstruction.csv (a row for each feature space) and reconstruction.json (the distances, and what they were measured with)."""
    how, dataset = ctx.slot.evaluation, ctx.slot.dataset
    with together(ctx.job, how.processes) as ranks:
        subject = ReconstructionSubject(ctx.slot, ctx.inputs, ranks.device)
        data = dataset.wanted().name
        references = load_references(how.spaces, ctx.inputs["reference"], data)
        progress = ctx.progress(len(subject), "img")
        cache = paths.evaluation_cache(ctx.job.scale)
        evaluator = Evaluator(subject, references, ctx.inputs, how, cache, progress.update, ranks.device, ranks.wait)
        found = evaluator.measure(Point(REPORT, 0, None, len(subject), 0))
        progress.close()
        if not ranks.first:
            raise RankDone
    rows = [{"space": space, "samples": len(subject), **values} for space, values in found.items()]
    pd.DataFrame(rows, columns=["space", "samples", *NUMBERS, "key"]).to_csv(ctx.out / paths.FLOOR_ROWS, index=False)
    distances = {SPACES[space].distance: values for space, values in found.items()}
    model = load_model(ctx.inputs["vae"] / VAE_FILE)
    reported = {name: values["fid"] for name, values in distances.items()}
    reported |= {f"{name}_se": values["fid_se"] for name, values in distances.items()}
    facts = {
        "run": ctx.run_id,
        "latents_run": subject.name,
        "vae": {"architecture": model.config["architecture"], **model.info},
        "dataset": data,
        "samples": len(subject),
        "reference_images": references[how.spaces[0]].count,
        "reported": reported,
        "features": {space: f"{r.extractor} ({r.features.shape[1]}-d)" for space, r in references.items()},
    }
    (ctx.out / paths.FLOOR).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    (ctx.out / paths.METRICS).write_text(json.dumps({"reconstruction": reported}, indent=1, sort_keys=True) + "\n")
    for name, values in distances.items():
        ctx.tracker.set_tag(f"reconstruction.{name}", f"{values['fid']:.4f} ± {values['fid_se']:.4f}")
        ctx.tracker.log_metrics(
            0, {f"reconstruction/{name}/{key}": values[key] for key in NUMBERS if values[key] is not None}
        )
    ctx.tracker.log_artifact(ctx.out / paths.FLOOR_ROWS)
