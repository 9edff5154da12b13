# SPDX-License-Identifier: Apache-2.0
"""dvc.yaml as generated from the registry: one DVC stage for each job, with `${scale}` filled in by DVC.

DVC replaces `${scale}` with the value in params.yaml or of `dvc exp run -S scale=smoke`, so the file serves every scale
that has the axes of the active one (the same slots, sizes and methods, as smoke and demo have). Dependencies are
literal lists, since DVC does not take a list from a variable. Metrics and plots are files in the evaluations' folders,
which are outputs as a whole, so they are named at the top and not in their stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline import paths, registry
from pipeline.job import Job
from pipeline.params import Params

HEADER = """\
# Generated from pipeline/registry.py by `python -m pipeline dvc > dvc.yaml`: edit the registry, not this file.
# One stage for each job; ${scale} is the scale of params.yaml.
"""


def generate(params: Params) -> str:
    """The text of dvc.yaml, from the axes of the active scale."""
    jobs = registry.jobs(params)
    stages = {job.name: _stage(job) for job in jobs}
    evaluations = [_templated(job, path) for job in jobs if job.stage == "evaluate" for path in job.outputs]
    floors = [_templated(job, path) for job in jobs if job.stage == "reconstruction" for path in job.outputs]
    sweeps = {f"{folder}/{paths.SWEEP}": "fid" for folder in evaluations}
    text = {
        "stages": stages,
        "metrics": [
            *(f"{folder}/{paths.FLOOR}" for folder in floors),
            *(f"{folder}/{paths.FACTS}" for folder in evaluations),
        ],
        "plots": [{"FID by guidance": {"template": "scatter", "x": "guidance", "y": sweeps}}],
    }
    return HEADER + yaml.safe_dump(text, sort_keys=False, width=10_000, allow_unicode=True)


def _stage(job: Job) -> dict[str, Any]:
    prefix = f"scales.{job.scale}."
    stage: dict[str, Any] = {
        "desc": registry.STAGES[job.stage].title,
        "cmd": job.command.replace(f"scale={job.scale}", "scale=${scale}"),
        "deps": [path.as_posix() for path in job.sources] + [_templated(job, path) for path in job.inputs.values()],
        "params": [f"scales.${{scale}}.{key.removeprefix(prefix)}" for key in job.params],
        # Reports are small text and pictures for git; what is large goes to DVC's cache.
        "outs": [{path.as_posix(): {"cache": False}} for path in job.outputs]
        if job.is_report
        else [_templated(job, path) for path in job.outputs],
    }
    return {key: value for key, value in stage.items() if value}


def _templated(job: Job, path: Path) -> str:
    parts = list(path.parts)
    if parts[0] == "runs":
        parts[1] = "${scale}"
    return "/".join(parts)
