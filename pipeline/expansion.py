# SPDX-License-Identifier: Apache-2.0
"""For the registry: at which axes each stage has jobs, and the inputs and keys of params.yaml of those that take several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.autoencoders import PretrainedVae, described_by
from pipeline.job import REPORT_SLOT, Axes, Point, figure7_students, table2_students
from pipeline.params import Params, Slot


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
    """Every student of every size."""
    for axes in sizes(params):
        trained = params.active.slots[axes["slot"]].sizes[axes["size"]].students
        yield from ({**axes, "method": method} for method in trained)


def evaluated(params: Params) -> Axes:
    """Every teacher and student."""
    for axes in sizes(params):
        for method in ("teacher", *params.active.slots[axes["slot"]].sizes[axes["size"]].students):
            yield {**axes, "method": method}


def of_table2(params: Params) -> Axes:
    """Once, if there is the slot that the table is about."""
    return iter([{}] if REPORT_SLOT in params.active.slots else [])


def of_figure2(params: Params) -> Axes:
    """Once, if that slot asks for it."""
    slot = params.active.slots.get(REPORT_SLOT)
    return iter([{}] if slot and slot.figure2 else [])


def of_figure7(params: Params) -> Axes:
    """Once, if that slot has a student that it shows."""
    slot = params.active.slots.get(REPORT_SLOT)
    return iter([{}] if slot and any(figure7_students(slot, size) for size in slot.sizes) else [])


def of_evaluations(params: Params) -> Axes:
    """Once."""
    return iter([{}])


def of_figure3(params: Params) -> Axes:
    """Once, if the scale asks for it."""
    return iter([{}] if params.active.figure3 else [])


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


def _evaluations_of(point: Point, shown: Callable[[Slot, str], list[str]]) -> dict[str, Path]:
    """The evaluations of a slot's teachers and of the students that are `shown` of a size, as evaluate-<size>-<method>."""
    return {
        f"evaluate-{size}-{method}": point.folder("evaluate", size, method)
        for size in point.slot.sizes
        for method in ("teacher", *shown(point.slot, size))
    }


def evaluations(point: Point) -> dict[str, Path]:
    """Those that Table 2 and Figure 2 are about."""
    return _evaluations_of(point, table2_students)


def every_evaluation(point: Point) -> dict[str, Path]:
    """The evaluations of all models of all slots, as evaluate-<slot>-<size>-<method>."""
    return {
        "-".join(("evaluate", *axes.values())): Path(
            "runs", point.params.scale, axes["slot"], "evaluate", axes["size"], axes["method"]
        )
        for axes in evaluated(point.params)
    }


def guided_evaluations(point: Point) -> dict[str, Path]:
    """Those that Figure 7 is about."""
    return _evaluations_of(point, figure7_students)


def figure2_inputs(point: Point) -> dict[str, Path]:
    """Every network of the slot, as teacher-<size> or student-<size>-<method>, the decoder, the evaluations."""
    inputs: dict[str, Path] = {}
    for size in point.slot.sizes:
        inputs[f"teacher-{size}"] = point.folder("teacher", size)
        for name in table2_students(point.slot, size):
            inputs[f"student-{size}-{name}"] = point.folder("student", size, name)
    return {**inputs, **point.decoder(), **evaluations(point)}


def teacher_inputs(point: Point) -> dict[str, Path]:
    """A teacher that is imported needs no data: whether it is the right one is known before anything is encoded or trained."""
    if point.slot.sizes[point.axes["size"]].imported is not None:
        return {}
    return {**point.data(), **point.decoder()}


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
