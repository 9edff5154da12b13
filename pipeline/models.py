# SPDX-License-Identifier: Apache-2.0
"""The shape of params.yaml as frozen, validated models: sizes, slots, scales.

The override sections of a size (`sizes.S.teacher`, `sizes.S.students.scd`) are merged over the slot's sections
*before* validation, so that what the rest of the code sees is always complete and checked. `pipeline.params.load` reads
a file into these models; the sections that they are made of are in `pipeline.sections`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.autoencoders import AnyVae, PretrainedVae, Sizes
from pipeline.datasets import Dataset
from pipeline.errors import ParamsError, suggestion
from pipeline.figures import Figure2, Figure3, Figure4, Grids
from pipeline.hardware import Hardware, check_nodes
from pipeline.imported import UNDROPPED, Imported
from pipeline.networks import Items, Network
from pipeline.overrides import base_of, merged
from pipeline.sections import (
    Engine,
    Evaluation,
    Features,
    Model,
    Positive,
    Seed,
    TeacherTraining,
    Training,
    problem,
)
from pipeline.students import UNGUIDED, Student, StudentTraining, in_order

SIGMA_MAX = 80.0  # that of scm_core.trigflow, where every sampler starts
FEATURES_RESOLUTION = 8  # the smallest images that scm_core.evaluate.classifier takes

# Names become folders, wildcards of Snakemake, stage names of DVC and words of a command line.
ScaleName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=32)]
SizeName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=32)]
StudentName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=32)]
if TYPE_CHECKING:  # to the rest of the code these are words that come from the command line
    SlotName = str
else:
    SlotName = Literal["pixel_uncond", "pixel_cond", "latent_guided"]


class Size(Model):
    """One model size: its network, and what it changes in the slot's training sections (merged in by the slot)."""

    network: Network
    engine: Engine = Engine()
    imported: Imported | None = None
    """A published network that is the teacher, which then is not trained."""
    teacher: TeacherTraining
    students: Annotated[Mapping[StudentName, Student], Field(min_length=1)]
    """Those of the slot's students that are trained at this size, and their repetitions."""
    repeats: Mapping[StudentName, Annotated[int, Field(ge=2, le=100)]] = {}
    """Of these students, how often they are trained, each time from another seed: the second is named <student>_seed2, and so on."""


class Slot(Model):
    """A place in the paper's tables that a scale fills: data, sizes, methods and numbers."""

    dataset: Dataset
    vae: AnyVae | None = None
    """Absent for pixel data."""
    features: Features | None = None
    """The classifier of the feature space `classifier`; absent where that is not measured in."""
    sigma_data: Positive
    """Standard deviation that the data are scaled to."""
    teacher: TeacherTraining
    students: Annotated[Mapping[StudentName, Student], Field(min_length=1)]
    sizes: Annotated[Mapping[SizeName, Size], Field(min_length=1)]
    evaluation: Evaluation
    figure2: Figure2 | None = None
    grids: Grids | None = None

    @model_validator(mode="before")
    @classmethod
    def _merge_sizes(cls, data: Any) -> Any:
        """Lay each size's overrides over the slot's sections; a key given there replaces the whole value."""
        if not isinstance(data, Mapping) or not isinstance(data.get("sizes"), Mapping):
            return data
        base = {"teacher": data.get("teacher"), "students": data.get("students")}
        return {**data, "sizes": {name: merged(name, size, base) for name, size in data["sizes"].items()}}

    @model_validator(mode="after")
    def _consistent(self) -> Slot:
        if "teacher" in self.students:
            raise problem("students.teacher", "is the name of the teacher itself: give the student another one")
        for name in self.sizes:
            self._check_size(name)
        for student in self.students:
            if base_of(student) != student:
                what = "is the name of a repeated training (repeats of a size): give the student another one"
                raise problem(f"students.{student}", what)
            if not any(student in size.students for size in self.sizes.values()):
                what = "is a student of no size: name it in the students of one ({} changes nothing), or remove it"
                raise problem(f"students.{student}", what)
        self._check_snapshots()
        side = self.dataset.resolution
        self._check_vae()
        if (self.features is not None) != ("classifier" in self.evaluation.spaces):
            what = "must be given if evaluation.spaces names the classifier, and only then"
            raise problem("features", what)
        if self.features and self.dataset.source == "images" and not self.dataset.labels:  # others only hide theirs
            raise problem("features", "needs labels to learn from: give dataset.labels, or measure in other spaces")
        if self.features and (side < FEATURES_RESOLUTION or side & (side - 1)):
            what = f"a power of two of at least {FEATURES_RESOLUTION} for the classifier that makes the features"
            raise problem("dataset.resolution", f"must be {what}, got {side}")
        t_max = math.atan(SIGMA_MAX / self.sigma_data)
        if self.evaluation.t_mid >= t_max:
            what = f"before the first step at arctan({SIGMA_MAX:g}/sigma_data) = {t_max:.6g}"
            raise problem("evaluation.t_mid", f"must come {what}, got {self.evaluation.t_mid:g}")
        for key, shown in {"figure2": self.figure2, "grids": self.grids}.items():
            wrong = [label for label in shown.labels if label >= max(1, self.dataset.labels)] if shown else []
            if wrong:
                raise problem(f"{key}.labels", f"must be below dataset.labels ({self.dataset.labels}), got {wrong[0]}")
        return self

    def _check_size(self, size: str) -> None:
        teacher, grid = self.teacher_for(size), self.evaluation.guidance
        self._check_network(size)
        in_order(self.sizes[size].students)
        imported = self.sizes[size].imported
        if imported and imported.format in UNDROPPED and teacher.label_dropout > 0:
            what = f"must be 0, as networks of format {imported.format} are trained without dropping labels"
            raise problem(f"sizes.{size}.teacher.label_dropout", f"{what}, so that they cannot be guided")
        if teacher.label_dropout > 0 and not self.dataset.labels:
            raise problem("teacher.label_dropout", "must be 0 for a dataset without labels")
        guidable = teacher.label_dropout > 0
        remedy = f"needs a teacher of size {size} trained with label_dropout > 0"
        if len(grid) > 1 and not guidable:
            raise problem("evaluation.guidance", f"a grid of guidance scales {remedy}, or set it to [1.0]")
        for method, student in self.sizes[size].students.items():
            key = f"students.{method}.guidance"
            if student.guidance is None:
                continue
            if self.sizes[size].network.architecture == "diffusers":
                raise problem(key, "must be null: a network of diffusers has no input for a guidance scale")
            if why := UNGUIDED.get(student.method):
                raise problem(key, f"must be null: {why} and has no teacher velocity to guide")
            if not guidable:
                raise problem(key, f"{remedy}, or set it to null")
            low, high = student.guidance
            if grid[0] < low or grid[-1] > high:
                raise problem(
                    "evaluation.guidance",
                    f"must stay within the range {[low, high]} that {method} of size {size} is trained on, "
                    f"got {list(grid)}",
                )

    def _check_network(self, size: str) -> None:
        network = self.sizes[size].network
        unit = network.downsampling * (self.vae_sizes.downsampling if self.vae_sizes else 1)
        if self.dataset.resolution % unit:
            what = f"{'the VAE and ' if self.vae else ''}the network of size {size} ({network.architecture})"
            raise problem("dataset.resolution", f"must divide by {unit} for {what}, got {self.dataset.resolution}")
        if wrong := network.misfit(self.item_resolution):
            raise problem(f"sizes.{size}.network.{wrong[0]}", wrong[1])
        imported = self.sizes[size].imported
        if (network.architecture == "diffusers") != (imported is not None and imported.format == "diffusers"):
            what = "must be diffusers if the teacher is imported from a folder of that format, and only then"
            raise problem(f"sizes.{size}.network.architecture", f"{what}, got {network.architecture}")
        sections: dict[str, Training] = {"teacher": self.teacher_for(size)}
        sections |= {f"students.{name}": student for name, student in self.sizes[size].students.items()}
        engine = self.sizes[size].engine
        parts = engine.processes * engine.accumulation
        for key, section in sections.items():
            if section.dropout and network.architecture == "diffusers" and key != "teacher":
                raise problem(f"{key}.dropout", "must be 0 for a network of diffusers, which has its own")
            if section.batch < parts:
                what = f"must be at least {parts}, the parts that the engine of size {size} takes a batch in (processes · accumulation)"
                raise problem(f"sizes.{size}.{key}.batch", f"{what}, got {section.batch}")
            if section.dropout_resolution is not None and network.architecture == "small":
                raise problem(f"{key}.dropout_resolution", "must be null for a small network, which has one resolution")
            if getattr(section, "tangent_engine", None) == "func" and getattr(network, "checkpointing", False):
                what = f"must not be func, as the network of size {size} has checkpointing, which torch.func.jvp cannot train with"
                raise problem(f"{key}.tangent_engine", f"{what}: use auto")

    def _check_vae(self) -> None:
        """Before the networks, whose resolution is that of the latents."""
        side, channels = self.dataset.resolution, self.dataset.channels
        if self.vae_sizes is None or not isinstance(self.vae, PretrainedVae):
            return
        if self.vae_sizes.channels != channels:
            what = f"takes images of {self.vae_sizes.channels} channels, and dataset.channels is {channels}"
            raise problem("vae.pretrained", f"{self.vae.pretrained} {what}: use such images, or another autoencoder")
        if side % self.vae_sizes.downsampling:
            what = (
                f"must divide by {self.vae_sizes.downsampling}, the factor of the VAE {self.vae.pretrained}, got {side}"
            )
            raise problem("dataset.resolution", what)

    @property
    def vae_sizes(self) -> Sizes | None:
        """What the networks depend on of the VAE; None for pixel data."""
        return None if self.vae is None else self.vae.sizes(self.dataset.channels)

    def _check_snapshots(self) -> None:
        """Other averages and earlier checkpoints are made of snapshots, which a training keeps every so many iterations."""
        how, kept = self.evaluation, False
        for size, declared in self.sizes.items():
            sections: dict[str, Training] = {"teacher": declared.teacher}
            sections |= {f"students.{name}": student for name, student in declared.students.items()}
            for key, section in sections.items():
                if section.snapshots is None:
                    continue
                kept, every = True, section.snapshots.every
                if wrong := [n for n in how.checkpoints if section.snapshots.measured and n % every]:
                    what = f"must be multiples of {key}.snapshots.every ({every} for size {size})"
                    raise problem("evaluation.checkpoints", f"{what}, got {wrong[0]}")
                if how.averages and section.iterations % every:
                    what = f"need a snapshot at the end: {key}.iterations ({section.iterations} for size {size}) must be a multiple of"
                    raise problem("evaluation.averages", f"{what} its snapshots.every ({every})")
        for name in ("averages", "checkpoints"):
            if getattr(how, name) and not kept:
                raise problem(f"evaluation.{name}", "needs a training that keeps snapshots: add `snapshots` to one")

    @property
    def item_resolution(self) -> int:
        """The side of what networks are trained on: pixels, or latents."""
        return self.dataset.resolution // (self.vae_sizes.downsampling if self.vae_sizes else 1)

    @property
    def item_channels(self) -> int:
        """The channels of what networks are trained on."""
        return self.vae_sizes.latent_channels if self.vae_sizes else self.dataset.channels

    @property
    def items(self) -> Items:
        """What networks are trained on."""
        return Items(self.item_channels, self.item_resolution, self.dataset.labels)

    def teacher_for(self, size: str) -> TeacherTraining:
        """Teacher training of one size, its overrides merged in."""
        return self.sizes[size].teacher

    def student_for(self, size: str, method: str) -> StudentTraining:
        """Training of the student of that name for one size, its overrides merged in."""
        return self.sizes[size].students[method]


class Scale(Model):
    """All numbers of one scale."""

    note: Annotated[str, Field(min_length=1, max_length=80)] | None = None
    """What readers of its results must know: it stands on all of them, on figures as one line."""
    seed: Seed
    hardware: Hardware | None = None
    """Absent: the CPU of one machine."""
    slots: Annotated[Mapping[SlotName, Slot], Field(min_length=1)]
    figure3: Figure3 | None = None
    figure4: Figure4 | None = None

    @model_validator(mode="after")
    def _note_is_a_line(self) -> Scale:
        if self.note is not None and not (self.note.strip() and self.note.isprintable()):
            raise problem("note", f"must be one line of words, got {self.note!r}")
        return self

    @model_validator(mode="after")
    def _jobs_fit_nodes(self) -> Scale:
        for name, slot in self.slots.items():
            check_nodes(f"slots.{name}", slot, self.hardware)
        return self

    @model_validator(mode="after")
    def _slots_match_names(self) -> Scale:
        for name, slot in self.slots.items():
            if name.startswith("latent") and slot.vae is None:
                raise problem(f"slots.{name}.vae", "is missing: add it, as this slot is about latents")
            if name.startswith("pixel") and slot.vae is not None:
                raise problem(f"slots.{name}.vae", "must be left out, as this slot is about pixels")
        return self


class Resume(Model):
    """What a training may go on from."""

    allow_changes: bool = False
    """Whether from a checkpoint that other parameters or other code have made."""


class Params(Model):
    """A whole params.yaml: which scale is active, and every scale."""

    scale: ScaleName
    """The scale that runs unless another is named."""
    scales: Annotated[Mapping[ScaleName, Scale], Field(min_length=1)]
    resume: Resume = Resume()

    @property
    def active(self) -> Scale:
        """The numbers of the active scale."""
        return self.scales[self.scale]

    def note_of(self, scale: str) -> str:
        """A scale's note as its tables, figures and pages have it: `Scale smoke: …`; empty for a scale without."""
        note = self.scales[scale].note
        return f"Scale {scale}: {note}" if note else ""

    def with_scale(self, scale: str) -> Params:
        """The same parameters with another scale active; `ParamsError` if there is no such scale."""
        if scale not in self.scales:
            raise ParamsError(f"scale={scale}: unknown scale; {suggestion(scale, self.scales, 'scales')}")
        return self.model_copy(update={"scale": scale})
