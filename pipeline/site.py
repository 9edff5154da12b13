# SPDX-License-Identifier: Apache-2.0
"""What a site's SLURM wants of every job: `cluster/slurm/site.yaml`, validated, and the request that it makes of a job.

What a job needs comes from the registry (`Job.resources`), where it may run from here. The environment wins over the file:
SCM_SLURM_PARTITION, SCM_SLURM_ACCOUNT, SCM_SLURM_QOS, SCM_SLURM_CONSTRAINT.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, Strict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline import paths, rendezvous
from pipeline.errors import ParamsError, PipelineError
from pipeline.reading import read_yaml, sentence
from pipeline.sections import Count, Model, Positive, problem

if TYPE_CHECKING:
    from typing import Self

    from pipeline.registry import Job

SITE = "cluster/slurm/site.yaml"
FROM_ENVIRONMENT = ("partition", "account", "qos", "constraint")
TRAINING = frozenset(
    {"vae", "features", "teacher", "student"}
)  # the stages that train; what else has GPUs evaluates or encodes
WARNING_S = 90  # what a checkpoint of the largest network takes and a margin

Word = Annotated[str, Field(pattern=r"^\S+$")]
Line = Annotated[str, Field(min_length=1)]


def _option(value: Any) -> Any:
    if not isinstance(value, str | bool | int | float) or value == "":
        raise PydanticCustomError("option", "must be a word, a number, true or false")
    return value


# sbatch's long options that the pipeline sets itself, or that have a key of their own.
_OWN = {
    **dict.fromkeys(
        ("array", "chdir", "cpus-per-task", "dependency", "error", "export", "job-name", "mem", "nodes", "ntasks"), ""
    ),
    **dict.fromkeys(("ntasks-per-node", "open-mode", "output", "requeue", "no-requeue", "signal", "time", "wrap"), ""),
    # How sbatch answers, and whether it queues anything.
    **dict.fromkeys(("parsable", "test-only", "wait"), ""),
    **{key: key for key in FROM_ENVIRONMENT},
    "gpus": "gpu_type",
    "gpus-per-node": "gpu_type",
}


class Request(Model):
    """What is asked for beside what a job needs; null is not asked for."""

    partition: Word | None = None
    """Or several, with commas between them."""
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    """Features of nodes."""
    gpu_type: Word | None = None
    """The name of a kind of GPU, where a partition has several."""
    gpus_per_node: Count | None = None
    """GPUs of a node: a job that needs more is refused before it is submitted."""
    time_limit_hours: Positive | None = None
    """The longest that a job may ask for: a longer one is refused before it is submitted. SLURM's own limit counts in any case."""
    warning_seconds: Count = WARNING_S
    """Before its time limit a training is told to save."""
    setup: Annotated[tuple[str, ...], Strict(False)] = ()
    """Lines of shell before each job's python."""
    container: Line | None = None
    """A command that runs the python behind it in a container."""
    python: Line | None = None
    """The python of the jobs; null: the one that submits them."""
    extra: dict[str, Annotated[Any, AfterValidator(_option)]] = Field(default_factory=dict)
    """Other long options of sbatch, without dashes; true for those without a value, false where a kind goes without."""

    @model_validator(mode="after")
    def _extra_is_free(self) -> Self:
        for name in self.extra:
            if not re.fullmatch(r"[a-z0-9]+([-_][a-z0-9]+)*", name):
                raise problem(f"extra.{name}", "is no long option of sbatch, such as reservation, without its dashes")
            key = _OWN.get(name.replace("_", "-"))
            if key is not None:
                raise problem(f"extra.{name}", f"use the key {key}" if key else "is set by the pipeline; remove it")
        return self

    @property
    def command(self) -> str:
        """What a job's python is called by, in shell words."""
        python = self.python or shlex.quote(sys.executable)
        return f"{self.container} {python}" if self.container else python


class Kinds(Model):
    """What differs for a kind of job."""

    training: Request = Request()
    """With GPUs: teachers and students."""
    evaluation: Request = Request()
    """With GPUs: encoding, features, sampling."""
    cpu: Request = Request()
    """Without GPUs."""


class Site(Request):
    """The settings of a site: for all jobs, and under `kinds` what is different for some."""

    kinds: Kinds = Kinds()

    def of(self, kind: str) -> Request:
        """The settings of a kind: its own values laid over those of all."""
        own: Request = getattr(self.kinds, kind)
        values = {name: getattr(self, name) for name in Request.model_fields}
        values |= {name: getattr(own, name) for name in own.model_fields_set}
        return Request(**{**values, "extra": {**self.extra, **own.extra}})

    def request(self, job: Job) -> dict[str, Any]:
        """The parameters of submitit's SlurmExecutor for a job: `python` of its constructor, the others of `update_parameters`; no name.

        `PipelineError` for a job that no node of this site holds, or that runs longer than the site lets it.
        """
        wants, needs = self.of(kind(job)), job.resources
        asked: dict[str, Any] = {
            "partition": wants.partition,
            "account": wants.account,
            "qos": wants.qos,
            "constraint": wants.constraint,
            "time": needs.minutes,
            **rendezvous.request(needs),
            "stderr_to_stdout": True,
            "signal_delay_s": wants.warning_seconds,
            "setup": list(wants.setup) or None,
            "additional_parameters": {"requeue": True, **{k: v for k, v in wants.extra.items() if v is not False}},
            "python": wants.command,
        }
        gpus = asked.get("gpus_per_node", 0)
        here = f"scales.{job.scale}.hardware" if gpus else f"kinds.{kind(job)} of {SITE}"
        if wants.gpus_per_node is not None and gpus > wants.gpus_per_node:
            raise PipelineError(
                f"{job.name}: needs {gpus} GPUs on a node, but {SITE} says gpus_per_node: {wants.gpus_per_node}; "
                f"lower {here}.gpus_per_node in params.yaml and the `processes` that are above it"
            )
        if wants.time_limit_hours is not None and needs.minutes > 60 * wants.time_limit_hours:
            remedy = (
                f"lower {here}.time_limit_hours in params.yaml: a longer training goes on from its checkpoint"
                if gpus
                else f"give {here} a partition with a longer limit"
            )
            raise PipelineError(
                f"{job.name}: asks for {needs.minutes / 60:.3g} hours at a time, but {SITE} says time_limit_hours: "
                f"{wants.time_limit_hours:g}; {remedy}"
            )
        if gpus and wants.gpu_type:
            asked["gpus_per_node"] = f"{wants.gpu_type}:{gpus}"
        return {key: value for key, value in asked.items() if value is not None}


def kind(job: Job) -> str:
    """Which of `kinds` a job is of."""
    if not job.resources.gpus:
        return "cpu"
    return "training" if job.stage in TRAINING else "evaluation"


def load() -> Site:
    """The site's settings; without a file the defaults. `ParamsError` with the first fault of the file or the environment."""
    file = paths.root() / SITE
    data = read_yaml(file, SITE, "'partition: gpu'", empty=True) if file.exists() else {}
    named = {key: value for key in FROM_ENVIRONMENT if (value := os.environ.get(f"SCM_SLURM_{key.upper()}"))}
    for key, value in named.items():
        if value.split() != [value]:
            raise ParamsError(f"SCM_SLURM_{key.upper()}={value}: must be one word")
    try:
        site = Site.model_validate(data)
        kinds = {name: _without(getattr(site.kinds, name), named) for name in Kinds.model_fields}
        return site.model_copy(update={**named, "kinds": Kinds(**kinds)})
    except ValidationError as error:
        raise ParamsError(f"{SITE}: {sentence(error, data)}") from None


def _without(request: Request, names: Iterable[str]) -> Request:
    """A kind's request without what it says about some keys."""
    kept = request.model_fields_set - set(names)
    return Request(**{name: getattr(request, name) for name in kept})
