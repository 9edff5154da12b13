# SPDX-License-Identifier: Apache-2.0
# The pipeline for Snakemake: one rule for each stage of pipeline/registry.py.
#
#   snakemake --profile cluster/local                          # every table and figure, the claims
#   snakemake --profile cluster/local --config scale=smoke
#   snakemake --profile cluster/slurm -n reports/table2.csv    # scale paper, jobs through SLURM
#
# Config keys: scale, launcher (inline, local, slurm; SCM_LAUNCHER in the environment wins over it).
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from pipeline import preflight, registry, site
from pipeline.engine import cancel_at_sigterm
from pipeline.errors import PipelineError, RegistryError, suggestion
from pipeline.files import identify
from pipeline.launch import LAUNCHERS
from pipeline.params import load
from pipeline.stale import clear_stale_locks


def read_config():
    """The parameters that --config and params.yaml ask for, and the launcher for the jobs' environment.

    The environment's launcher wins, since the profile's settings always name one.
    """
    known = ("scale", "launcher")
    for key in config:
        if key not in known:
            raise RegistryError(f"--config {key}={config[key]}: unknown key; {suggestion(key, known, 'keys')}")
    named = os.environ.get("SCM_LAUNCHER")
    where, launcher = ("SCM_LAUNCHER", named) if named else ("--config launcher", config.get("launcher"))
    if launcher is not None:
        if launcher not in LAUNCHERS:
            end = suggestion(launcher, LAUNCHERS, "launchers")
            raise RegistryError(f"{where}={launcher}: unknown launcher; {end}")
        os.environ["SCM_LAUNCHER"] = launcher
    if launcher == "slurm":
        site.load()
    scale = config.get("scale")
    return load("params.yaml", None if scale is None else str(scale))


# The `python` of the jobs is the one that runs Snakemake, also when its environment is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

try:
    params = read_config()
    jobs = registry.jobs(params)
except PipelineError as error:
    sys.exit(f"error: {error}")
clear_stale_locks(Path.cwd())
# Whoever waits for a submitted job leaves it running when this process is killed.
os.environ["SCM_ENGINE"] = json.dumps(identify(os.getpid()))


onstart:
    if os.environ.get("SCM_LAUNCHER", "inline") != "inline":
        cancel_at_sigterm()
    # Not in a dry run, which calls no hooks. What SLURM would refuse is said before the first job is submitted.
    if os.environ.get("SCM_LAUNCHER") == "slurm" and not workflow.touch:
        left = [one for one in workflow.dag.needrun_jobs() if one.rule.name in registry.STAGES]
        try:
            preflight.check(site.load(), [job_of(one.rule.name, one.wildcards) for one in left])
        except PipelineError as error:
            sys.exit(f"error: {error}")


def job_of(stage, wildcards):
    return registry.find(params, stage, {axis: wildcards[axis] for axis in registry.STAGES[stage].axes})


def pattern(stage):
    """The outputs of a stage with its axes as wildcards, each limited to the values that occur."""
    members = [job for job in jobs if job.stage == stage]
    values = {axis: "|".join(sorted({re.escape(job.axes[axis]) for job in members})) for axis in members[0].axes}
    wild = {axis: f"{{{axis},{choice}}}" for axis, choice in values.items()}
    return [str(path) for path in registry.STAGES[stage].outputs(params.scale, wild)]


def inputs_of(stage, wildcards):
    job = job_of(stage, wildcards)
    return [str(path) for path in (*job.sources, *job.inputs.values())]


def resource_of(stage, name, wildcards):
    return getattr(job_of(stage, wildcards).resources, name)


urgency = registry.critical_path(jobs)


def priority_of(stage, wildcards):
    return round(urgency[job_of(stage, wildcards).name])


rule all:
    default_target: True
    input:
        [str(path) for job in registry.ends(jobs) for path in job.outputs],


for stage in dict.fromkeys(job.stage for job in jobs):

    rule:
        name:
            stage
        input:
            partial(inputs_of, stage),
        output:
            pattern(stage) if registry.STAGES[stage].reports else directory(pattern(stage)),
        params:
            # What Snakemake compares to see that a number has changed.
            settings=lambda wildcards, stage=stage: registry.settings(job_of(stage, wildcards), params),
            command=lambda wildcards, stage=stage: job_of(stage, wildcards).command,
        log:
            # Written by the job itself (inline: only a traceback); named here so that Snakemake shows it when the job fails.
            f"runs/{params.scale}/.logs/{'-'.join([stage, *(f'{{{a}}}' for a in registry.STAGES[stage].axes)])}.log",
        # What the longest chain of jobs hangs on goes first.
        priority: partial(priority_of, stage)
        threads: partial(resource_of, stage, "threads")
        resources:
            mem_mb=partial(resource_of, stage, "memory_mb"),
            gpu=partial(resource_of, stage, "gpus"),  # the name that executors know
            runtime=partial(resource_of, stage, "minutes"),
        shell:
            "{params.command}"
