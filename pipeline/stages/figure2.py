# SPDX-License-Identifier: Apache-2.0
"""Stage figure2: samples of teacher, sCD and sCT from the same noise, one row for each model and number of steps."""

from pipeline import measured, style
from pipeline.context import Context
from pipeline.generation import student_of_job
from pipeline.modelling import MODEL, Decoder
from pipeline.pictures import Row, grid, images_of
from pipeline.shown import LATENT
from pipeline.students import TEACHER
from pipeline.tables import METHOD_NAMES
from scm_core.nn.build import load_model


def run(ctx: Context) -> None:
    """Write figure2.png and figure2.pdf."""
    slot, points = ctx.scale.slots[LATENT], measured.read(ctx.inputs)
    wanted, how = slot.figure2, slot.evaluation
    assert wanted is not None
    decode = Decoder(slot, ctx.inputs)
    indices = range(wanted.seed, wanted.seed + len(wanted.labels))
    rows: list[Row] = []
    for name in ctx.inputs:
        kind, _, rest = name.partition("-")
        if kind not in (TEACHER, "student"):
            continue
        size, _, method = rest.partition("-") if kind == "student" else (rest, "", TEACHER)
        model, student = load_model(ctx.inputs[name] / MODEL), student_of_job(slot, size, method)
        for steps in student.steps if student else (how.teacher.steps,):
            scale = measured.best_guidance(measured.of_model(points, LATENT, size, method), steps)
            images = images_of(slot, student, model, decode, indices, wanted.labels, steps, scale)
            solver = "" if student else f"{how.teacher.solver}, "
            guidance = "unguided" if scale is None else f"s = {scale:g}"
            rows.append((f"{METHOD_NAMES[method]}-{size}\n{solver}{style.steps_label(steps)}\n{guidance}", images))
    title = f"{style.face(ctx, slot)}: the same noise in each column"
    figure = grid(rows, [f"class {label}" for label in wanted.labels], title, margin=0.95)
    style.save(ctx, figure, "figure2")
