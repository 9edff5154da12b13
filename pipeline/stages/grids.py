# SPDX-License-Identifier: Apache-2.0
"""Stage grids: Figures 8 to 13, uncurated samples of one student with 1 and 2 steps at three guidance scales, a row for each class."""

from pipeline import style
from pipeline.context import Context
from pipeline.generation import student_of_job
from pipeline.modelling import MODEL, Decoder
from pipeline.pictures import grid, images_of
from pipeline.reports import GRIDS
from pipeline.shown import LATENT, gridded
from pipeline.tables import METHOD_NAMES
from scm_core.nn.build import load_model


def run(ctx: Context) -> None:
    """Write figure8 to figure13, as .png and .pdf: two of each scale."""
    slot, model = ctx.scale.slots[LATENT], gridded(ctx.params)
    assert slot.grids is not None
    assert model is not None
    wanted, student = slot.grids, student_of_job(slot, model.size, model.method)
    network, decode = load_model(ctx.inputs["student"] / MODEL), Decoder(slot, ctx.inputs)
    guided = student is not None and student.guidance is not None
    points = [(scale, steps) for scale in wanted.guidance for steps in (1, 2)]
    for name, (scale, steps) in zip(GRIDS, points, strict=True):
        rows = []
        for line, label in enumerate(wanted.labels):
            first = wanted.seed + line * wanted.columns
            indices, labels = range(first, first + wanted.columns), [label] * wanted.columns
            used = scale if guided else None
            rows.append((f"{label}", images_of(slot, student, network, decode, indices, labels, steps, used)))
        guidance = f"guidance {scale:g}" if guided else "unguided"
        who = f"{METHOD_NAMES.get(model.method, model.method)}-{model.size}, {style.steps_label(steps)}, {guidance}"
        style.save(ctx, grid(rows, [], f"{who}\n{style.face(ctx, slot)}: rows: classes"), name)
