# SPDX-License-Identifier: Apache-2.0
"""What a stage and a job are: a `Stage` at one `Point` of its axes is a `Job`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from pipeline.costs import REPORT_SLOT, Resources
from pipeline.params import Params, Scale, Slot

__all__ = ["NOTE", "REPORTS", "REPORT_SLOT", "Axes", "Job", "Point", "Stage", "noted"]

REPORTS = Path("reports")
NOTE = "note"  # the only key that a scale may be without


@dataclass(frozen=True)
class Job:
    """One unit of work of one scale: a stage at one point of its axes. Paths are relative to the repository."""

    scale: str
    stage: str
    axes: Mapping[str, str]
    inputs: Mapping[str, Path]
    """Name to the folder that another job publishes; the first one is the primary input."""
    outputs: tuple[Path, ...]
    """One folder, or the files in reports/ of a report stage."""
    params: tuple[str, ...]
    """Dotted keys of params.yaml, from the top."""
    sources: tuple[Path, ...]
    """Files of the repository whose change runs the job again."""
    resources: Resources

    @property
    def name(self) -> str:
        """Stage and axis values, such as student-latent_guided-M-scd; unique within a scale."""
        return "-".join((self.stage, *self.axes.values()))

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `python -m pipeline run`."""
        return (self.stage, f"scale={self.scale}", *(f"{axis}={value}" for axis, value in self.axes.items()))

    @property
    def command(self) -> str:
        """The command line that runs the job, the same for both engines."""
        return " ".join(("python", "-m", "pipeline", "run", *self.arguments))

    @property
    def is_report(self) -> bool:
        """Whether the outputs are files in reports/, not a folder of the scale."""
        return self.outputs[0].parent == REPORTS


@dataclass(frozen=True)
class Point:
    """Where a stage is expanded: the scale and, unless it is a report, the slot and the rest of the axes."""

    params: Params
    axes: Mapping[str, str]

    @property
    def slot(self) -> Slot:
        return self.params.active.slots[self.axes.get("slot", REPORT_SLOT)]

    def folder(self, stage: str, *rest: str) -> Path:
        """The published folder of a stage of the same slot."""
        return Path("runs", self.params.scale, self.axes.get("slot", REPORT_SLOT), stage, *rest)

    def inputs(self, *stages: str) -> dict[str, Path]:
        """The folders of stages that have one job in each slot."""
        return {stage: self.folder(stage) for stage in stages}

    def data(self) -> dict[str, Path]:
        """What networks are trained on: latents, or the images of a pixel slot."""
        return self.inputs("latents" if self.slot.vae else "dataset")

    def decoder(self) -> dict[str, Path]:
        """What turns latents into images, where there are latents: the VAE, and the latents' scaling."""
        return self.inputs("latents", "vae") if self.slot.vae else {}

    def features(self) -> dict[str, Path]:
        """The slot's own network of features, where it is measured in them."""
        return self.inputs("features") if self.slot.features else {}

    def model(self) -> dict[str, Path]:
        """The network of this size and method."""
        size, method = self.axes["size"], self.axes["method"]
        if method == "teacher":
            return {"teacher": self.folder("teacher", size)}
        return {"student": self.folder("student", size, method)}


Axes = Iterator[dict[str, str]]


@dataclass(frozen=True)
class Stage:
    """What all jobs of a stage have in common."""

    name: str
    title: str
    """What it does, in a few words."""
    axes: tuple[str, ...]
    expand: Callable[[Params], Axes]
    """Every point of the axes, for a scale."""
    inputs: Callable[[Point], dict[str, Path]]
    params: Callable[[Point], tuple[str, ...]]
    """Keys below `scales.<scale>`; those that start with a dot are below the slot."""
    cost: Callable[[Scale, Mapping[str, str]], Resources]
    reports: tuple[Path, ...] = ()
    reads: tuple[Path, ...] = ()
    """Files of the repository that it reads beside its own source."""

    def outputs(self, scale: str, axes: Mapping[str, str]) -> tuple[Path, ...]:
        """What the job at these axis values publishes (the Snakefile passes wildcards for values)."""
        if self.reports:
            return self.reports
        slot, *rest = (axes[axis] for axis in self.axes)
        return (Path("runs", scale, slot, self.name, *rest),)

    def job(self, params: Params, axes: Mapping[str, str]) -> Job:
        """The job at one point of the axes."""
        point = Point(params, axes)
        prefix = f"scales.{params.scale}"
        slot = f"{prefix}.slots.{axes.get('slot', REPORT_SLOT)}"
        return Job(
            scale=params.scale,
            stage=self.name,
            axes=MappingProxyType({axis: axes[axis] for axis in self.axes}),
            inputs=MappingProxyType(self.inputs(point)),
            outputs=self.outputs(params.scale, axes),
            params=tuple(f"{slot}{key}" if key.startswith(".") else f"{prefix}.{key}" for key in self.params(point)),
            sources=(Path("pipeline", "stages", f"{self.name}.py"), *self.reads),
            resources=self.cost(params.active, axes),
        )


def noted(stage: Stage) -> Stage:
    """A stage that writes the scale's note on what it makes, where the scale has one: another note makes it run again."""
    own = stage.params
    return replace(stage, params=lambda point: (*own(point), *((NOTE,) if point.params.active.note else ())))
