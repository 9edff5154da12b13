# SPDX-License-Identifier: Apache-2.0
"""The two stages of reports/report.html: samples for it, and the page, which reads all others' results (`pipeline.webpage`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline import costs, expansion
from pipeline.job import REPORTS, Point, Stage, noted
from pipeline.params import Scale, Slot
from pipeline.students import TEACHER

PAGE = "report.html"

_PARTS = tuple(Path("pipeline", "webpage", name) for name in ("page.html", "page.css", "page.js"))


def stages(others: Sequence[Stage]) -> tuple[Stage, Stage]:
    """`gallery` and `report`, of a pipeline with these other stages."""
    gallery = Stage(
        "gallery",
        "samples of every model with each number of steps over the guidance scales, for the page",
        axes=("slot",),
        expand=expansion.slots,
        inputs=gallery_inputs,
        params=lambda p: (".sigma_data", *(f".evaluation.{key}" for key in ("guidance", "t_mid", "teacher"))),
        cost=gallery_cost,
    )
    return gallery, page((*others, gallery))


def page(others: Sequence[Stage]) -> Stage:
    """The stage `report`: its inputs are every evaluation of the scale, the samples, and the files of its other reports.

    All that these were made from is on the page, too, as their manifests name it by digest: what changes there changes them.
    """

    def inputs(point: Point) -> dict[str, Path]:
        jobs = [stage.job(point.params, axes) for stage in others for axes in stage.expand(point.params)]
        folders = {job.name: job.outputs[0] for job in jobs if job.stage in ("evaluate", "gallery")}
        return {**folders, **{path.name: path for job in jobs if job.is_report for path in job.outputs}}

    report = Stage(
        "report",
        "the page that shows all of it: claims, tables, figures, samples, curves, lineage, cost",
        axes=(),
        expand=lambda params: iter([{}]),
        inputs=inputs,
        params=lambda p: (),
        cost=costs.report,
        reports=(REPORTS / PAGE,),
        reads=_PARTS,
    )
    return noted(report)


def shown_models(slot: Slot) -> Iterator[tuple[str, str]]:
    """Size and method of the models whose samples are shown: teachers, and students called after their method; variants are not."""
    for size, own in slot.sizes.items():
        yield size, TEACHER
        yield from ((size, name) for name, student in own.students.items() if name == student.method)


def gallery_inputs(point: Point) -> dict[str, Path]:
    """These models, as teacher-<size> or student-<size>-<method>, and what decodes their samples."""
    models = {}
    for size, method in shown_models(point.slot):
        if method == TEACHER:
            models[f"teacher-{size}"] = point.folder("teacher", size)
        else:
            models[f"student-{size}-{method}"] = point.folder("student", size, method)
    return {**models, **point.decoder()}


def grid_shape(slot: Slot) -> tuple[int, int]:
    """Rows and columns of a grid: a column for each class, up to ten; of large images fewer."""
    small = slot.dataset.resolution <= 64
    most = 10 if small else 5
    return 4 if small else 2, min(slot.dataset.labels or most, most)


def gallery_cost(scale: Scale, axes: Mapping[str, str]) -> costs.Resources:
    """Sampling them, on one processor or GPU."""
    slot = scale.slots[axes["slot"]]
    how, (rows, columns) = slot.evaluation, grid_shape(slot)
    flops, grids = 0.0, 0
    for size, method in shown_models(slot):
        # A guided pass of the teacher counts twice, one of Heun's steps has two.
        passes = 4 * how.teacher.steps if method == TEACHER else sum(slot.student_for(size, method).steps)
        flops += float(rows * columns * passes * len(how.guidance) * slot.sizes[size].network.flops(slot.items))
        grids += 2 * len(how.guidance)
    pixels = rows * columns * slot.dataset.resolution**2 * slot.dataset.channels
    return costs.sampling(scale, flops, images=grids * rows * columns, bytes=grids * pixels)
