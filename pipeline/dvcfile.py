# SPDX-License-Identifier: Apache-2.0
"""dvc.yaml as generated from the registry: one DVC stage for each job, with `${scale}` filled in by DVC.

DVC replaces `${scale}` with the value in params.yaml, but the axes (slots, sizes, students) are those of the scale that was
active when the file was made: for another scale make it again. Dependencies are
literal lists, since DVC does not take a list from a variable. Metrics and plots are files in run folders, which are
outputs as a whole, so they are named at the top and not in their stages. The plots' templates lie in .dvc/plots/.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pipeline import paths, registry
from pipeline.job import NOTE, Job
from pipeline.params import Params

HEADER = """\
# Generated from pipeline/registry.py by `python -m pipeline dvc > dvc.yaml`: edit the registry, not this file.
# One stage for each job; ${scale} is the scale of params.yaml.
"""


def generate(params: Params) -> str:
    """The text of dvc.yaml, from the axes of the active scale."""
    jobs = registry.jobs(params)
    stages = {job.name: _stage(job) for job in jobs}
    measured = [job for job in jobs if job.stage in ("reconstruction", "evaluate")]
    text = {
        "stages": stages,
        "metrics": [f"{_templated(job, job.outputs[0])}/{paths.METRICS}" for job in measured],
        "plots": _plots(jobs, params),
    }
    return HEADER + yaml.safe_dump(text, sort_keys=False, width=10_000, allow_unicode=True)


def _plots(jobs: Iterable[Job], params: Params) -> list[dict[str, Any]]:
    """Curves of trainings, of what was measured along them, and over guidance: one picture for the teachers of a slot, one for the students
    of each size."""
    found: dict[str, dict[str, Any]] = {}

    def add(title: str, template: str, x: str, y: str, job: Job, file: str) -> None:
        plot = found.setdefault(title, {"template": template, "x": x, "y": {}})
        plot["y"][f"{_templated(job, job.outputs[0])}/{file}"] = y

    for job in jobs:
        slot, size = job.axes.get("slot", ""), job.axes.get("size", "")
        if job.stage == "teacher" and params.active.slots[slot].sizes[size].imported is None:
            add(f"Loss of teachers, {slot}", "training", "nimg", "loss", job, paths.CURVE)
        elif job.stage == "student":
            add(f"Loss of students, {slot} {size}", "training", "nimg", "loss", job, paths.CURVE)
        elif job.stage == "evaluate":
            add(f"FID along training, {slot} {size}", "along_training", "nimg", "fid", job, paths.SUMMARY)
            add(f"FID by guidance, {slot} {size}", "guidance", "guidance", "fid", job, paths.SWEEP)
    return [{title: plot} for title, plot in found.items()]


def _stage(job: Job) -> dict[str, Any]:
    prefix = f"scales.{job.scale}."
    stage: dict[str, Any] = {
        "desc": registry.STAGES[job.stage].title,
        "cmd": job.command.replace(f"scale={job.scale}", "scale=${scale}"),
        "deps": [path.as_posix() for path in job.sources] + [_templated(job, path) for path in job.inputs.values()],
        # The file is for every scale of these axes, and DVC stops at a key that one of them lacks.
        "params": [f"scales.${{scale}}.{key.removeprefix(prefix)}" for key in job.params if key != f"{prefix}{NOTE}"],
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
