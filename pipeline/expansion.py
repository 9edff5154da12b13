# SPDX-License-Identifier: Apache-2.0
"""For the registry: at which axes each stage has jobs, and the inputs and keys of params.yaml of those that take several."""

from __future__ import annotations

from pathlib import Path

from pipeline.autoencoders import PretrainedVae, described_by
from pipeline.job import Axes, Point
from pipeline.overrides import base_of
from pipeline.params import Params
from pipeline.students import TEACHER, in_order


def slots(params: Params) -> Axes:
    """Every slot."""
    return ({"slot": name} for name in params.active.slots)


def latent_slots(params: Params) -> Axes:
    """The slots of latents."""
    return ({"slot": name} for name, slot in params.active.slots.items() if slot.vae)


def classified_slots(params: Params) -> Axes:
    """The slots that are measured in the features of a classifier of their own."""
    return ({"slot": name} for name, slot in params.active.slots.items() if slot.features)


def sizes(params: Params) -> Axes:
    """Every size of every slot."""
    return ({"slot": name, "size": size} for name, slot in params.active.slots.items() for size in slot.sizes)


def students(params: Params) -> Axes:
    """Every student of every size, each after the one that it starts as."""
    for axes in sizes(params):
        trained = params.active.slots[axes["slot"]].sizes[axes["size"]].students
        yield from ({**axes, "method": method} for method in in_order(trained))


def evaluated(params: Params) -> Axes:
    """Every teacher and student."""
    for axes in sizes(params):
        for method in ("teacher", *params.active.slots[axes["slot"]].sizes[axes["size"]].students):
            yield {**axes, "method": method}


def vae_inputs(point: Point) -> dict[str, Path]:
    """A published autoencoder needs no data: whether it is the right one is known before the first image is read."""
    return {} if isinstance(point.slot.vae, PretrainedVae) else point.inputs("dataset")


def vae_keys(point: Point) -> tuple[str, ...]:
    """What the autoencoder is: neither how latents are scaled nor how many images go through it at once."""
    vae = point.slot.vae
    assert vae is not None
    own = tuple(f".vae.{name}" for name in described_by(vae))
    return own if isinstance(vae, PretrainedVae) else ("seed", *own)


def latents_keys(point: Point) -> tuple[str, ...]:
    """The data's σ, and where the channels' statistics are given, those."""
    given = (".vae.statistics",) if isinstance(point.slot.vae, PretrainedVae) else ()
    return ("seed", ".sigma_data", *given)


def reference_keys(point: Point) -> tuple[str, ...]:
    """The feature spaces, and what draws a part of the images, where not all are compared pair by pair."""
    drawn = ("seed", ".evaluation.manifold_images") if point.slot.evaluation.manifold_images else ()
    return (*drawn, ".evaluation.spaces")


def teacher_inputs(point: Point) -> dict[str, Path]:
    """A teacher that is imported needs no data: whether it is the right one is known before anything is encoded or trained."""
    if point.slot.sizes[point.axes["size"]].imported is not None:
        return {}
    return {**point.data(), **point.decoder()}


def student_inputs(point: Point) -> dict[str, Path]:
    """The teacher, the student that this one starts as, if it does not start as the teacher, and what samples are made of."""
    size, start = point.axes["size"], point.slot.student_for(point.axes["size"], point.axes["method"]).start
    first = {} if start == TEACHER else {"start": point.folder("student", size, start)}
    return {"teacher": point.folder("teacher", size), **first, **point.data(), **point.decoder()}


def teacher_keys(point: Point) -> tuple[str, ...]:
    """What a teacher depends on: its training, or the file that it is imported from."""
    size = f".sizes.{point.axes['size']}"
    if point.slot.sizes[point.axes["size"]].imported is None:
        return network_keys(point, "teacher")
    return (".sigma_data", f"{size}.network", f"{size}.imported")


def network_keys(point: Point, section: str) -> tuple[str, ...]:
    """What the training of a network depends on, as `section` of its size has it."""
    size = f".sizes.{point.axes['size']}"
    return ("seed", ".sigma_data", f".{section}", f"{size}.network", f"{size}.{section}")


def student_keys(point: Point) -> tuple[str, ...]:
    """What a student depends on: its section, which it shares with its repetitions."""
    return network_keys(point, f"students.{base_of(point.axes['method'])}")
