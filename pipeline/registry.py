# SPDX-License-Identifier: Apache-2.0
"""Every stage of the pipeline, declared once; both engines and the command line read it here.

A `Stage` expanded over its axes (slot, size, method) gives `Job`s. `jobs(params)` lists a scale's jobs in topological
order, `find(...)` looks one up, `settings(job, params)` gives the numbers it depends on.

What makes a job run again, in both engines:

- its inputs (outputs of other jobs): to DVC when their contents change, to Snakemake when a folder has a new date, even
  with the same bytes in it. So an input that was made again by hand, bit for bit, reruns nothing in DVC and all below
  it in Snakemake, unless `make sync` tells Snakemake first that what lies below is up to date;
- its `params`: sections of params.yaml, so that editing one number reruns exactly what it influences. What an input
  already depends on is not listed again: the input changes with it;
- its `sources`: the stage's own short file, which says what the stage does, and data files that it reads from the
  repository. Library modules are not listed: neither engine can tell a comment from a change of meaning, and a comment
  in `scm_core` must not retrain a teacher. After changing what library code computes, force the stages concerned:
  `snakemake --forcerun STAGE` or `dvc repro --force NAME`.

This module stays cheap to import (standard library and the validated parameters): a process that waits imports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from pipeline import page
from pipeline.costs import Resources
from pipeline.declared import MODELS
from pipeline.errors import RegistryError, suggestion
from pipeline.job import Job, Stage
from pipeline.params import Params
from pipeline.reports import REPORTED

__all__ = ["STAGES", "Job", "Resources", "Stage", "critical_path", "ends", "find", "jobs", "parents", "settings"]


_DECLARED = (*MODELS, *REPORTED)  # in topological order
STAGES: Mapping[str, Stage] = MappingProxyType({stage.name: stage for stage in (*_DECLARED, *page.stages(_DECLARED))})


def jobs(params: Params, scale: str | None = None) -> list[Job]:
    """All jobs of a scale (default: the active one), every job after those whose outputs it reads."""
    if scale is not None:
        params = params.with_scale(scale)
    return [stage.job(params, axes) for stage in STAGES.values() for axes in stage.expand(params)]


def parents(job: Job, among: Iterable[Job]) -> list[Job]:
    """The jobs of `among` whose outputs `job` reads, in the order of its inputs."""
    makers = {output: maker for maker in among for output in maker.outputs}
    return list({maker.name: maker for path in job.inputs.values() if (maker := makers.get(path))}.values())


def ends(jobs: Iterable[Job]) -> list[Job]:
    """The jobs whose outputs no other of them reads, and all reports: who wants these wants them all.

    Reports that another one reads are named, too, because Snakemake does not miss a file that only a finished job has read.
    """
    everything = list(jobs)
    read = {path for job in everything for path in job.inputs.values()}
    return [job for job in everything if job.is_report or not read & set(job.outputs)]


def critical_path(jobs: Iterable[Job]) -> dict[str, float]:
    """For each job, by name, the expected seconds until the last job that needs it has ended, its own included.

    `jobs` are in topological order. The job with the longest way to go should start first (critical-path scheduling).
    """
    ordered = list(jobs)
    after: dict[str, float] = {}
    for job in reversed(ordered):
        seconds = job.resources.seconds
        after[job.name] = seconds + after.get(job.name, 0.0)
        for parent in parents(job, ordered):
            after[parent.name] = max(after.get(parent.name, 0.0), after[job.name])
    return after


def stage_named(name: str) -> Stage:
    """The stage of that name, or `RegistryError`."""
    if name not in STAGES:
        raise RegistryError(f"{name}: unknown stage; {suggestion(name, STAGES, 'stages')}")
    return STAGES[name]


def find(params: Params, stage: str, axes: Mapping[str, str]) -> Job:
    """The job of the active scale at one point of a stage's axes; `RegistryError` says what does not exist."""
    declared = stage_named(stage)
    for axis in axes:
        if axis not in declared.axes:
            known = suggestion(axis, declared.axes, "axes") if declared.axes else "it has no axes"
            raise RegistryError(f"{axis}={axes[axis]}: stage {stage} has no axis {axis}; {known}")
    points = list(declared.expand(params))
    if not points:
        raise RegistryError(f"{stage}: scale {params.scale} has nothing for this stage; choose another scale or stage")
    for axis in declared.axes:
        values = list(dict.fromkeys(point[axis] for point in points))
        if axis not in axes:
            raise RegistryError(f"{axis}: stage {stage} needs this axis; add {axis}=… ({' or '.join(values)})")
        if axes[axis] not in values:
            end = suggestion(axes[axis], values, "values")
            raise RegistryError(f"{axis}={axes[axis]}: unknown {axis} for {stage} at scale {params.scale}; {end}")
        # The axes are checked one after the other, so that a size is looked for in the slot that was named.
        points = [point for point in points if point[axis] == axes[axis]]
    return declared.job(params, points[0])


def settings(job: Job, params: Params) -> dict[str, Any]:
    """The resolved values behind `job.params`, by dotted key below the scale; plain JSON types.

    A size's own section holds the slot's section with the size's changes laid over it, so the slot's section is left
    out: a number that a size replaces does not matter to that size.
    """
    prefix = f"scales.{job.scale}."
    keys = [key.removeprefix(prefix) for key in job.params]
    size = job.axes.get("size")
    merged = {key.replace(f".sizes.{size}.", ".") for key in keys if f".sizes.{size}." in key}
    scale = params.scales[job.scale]
    return {key: _plain(_value(scale, key)) for key in keys if key not in merged}


def _value(scale: BaseModel, key: str) -> Any:
    value: Any = scale
    for part in key.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):  # the students of a slot
        return {key: _plain(part) for key, part in value.items()}
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
