# SPDX-License-Identifier: Apache-2.0
"""Stage figure2: samples of teacher, sCD and sCT from the same noise, one row for each model and number of steps."""

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.context import Context
from pipeline.generation import TEACHER, noise_of, samples, student_of_job
from pipeline.job import REPORT_SLOT, table2_students
from pipeline.modelling import MODEL, Decoder
from pipeline.tables import METHOD_NAMES, best_guidance
from scm_core.nn.build import load_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen


def run(ctx: Context) -> None:
    """Write figure2.png."""
    slot = ctx.scale.slots[REPORT_SLOT]
    wanted, how = slot.figure2, slot.evaluation
    assert wanted is not None
    decode = Decoder(slot, ctx.inputs)
    labels = torch.tensor(wanted.labels)
    indices = range(wanted.seed, wanted.seed + len(labels))
    rows: list[tuple[str, Tensor]] = []
    for size in slot.sizes:
        for method in (TEACHER, *table2_students(slot, size)):
            model = load_model(
                ctx.inputs[f"teacher-{size}" if method == TEACHER else f"student-{size}-{method}"] / MODEL
            )
            shape = tuple(model.config[key] for key in ("channels", "resolution", "resolution"))
            student = student_of_job(slot, size, method)
            for steps in student.steps if student else (how.teacher.steps,):
                scale = best_guidance(ctx.inputs[f"evaluate-{size}-{method}"], steps)
                noise = noise_of(student, indices, shape, steps)
                images = decode(samples(slot, student, model.net, noise, labels, scale))
                solver = f"{how.teacher.solver}, " if method == TEACHER else ""
                guidance = "unguided" if scale is None else f"guidance {scale:g}"
                what = f"{solver}{steps} step{'s' * (steps > 1)}, {guidance}"
                rows.append((f"{METHOD_NAMES[method]}-{size}\n{what}", images))
    figure = draw(rows, wanted.labels, f"{slot.dataset.source}, scale {ctx.job.scale}: same noise in each column")
    figure.savefig(ctx.out / "figure2.png", dpi=150, metadata={"Software": None})
    ctx.tracker.log_artifact(ctx.out / "figure2.png")


def draw(rows: list[tuple[str, Tensor]], labels: tuple[int, ...], title: str) -> Figure:
    """A grid of images with a label for each row and each column's class on top."""
    figure, axes = plt.subplots(
        len(rows), len(labels), figsize=(1.9 + 0.62 * len(labels), 0.7 + 0.66 * len(rows)), squeeze=False
    )
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7, labelpad=6)
    for axis, label in zip(axes[0], labels, strict=True):
        axis.set_title(f"class {label}", fontsize=7)
    figure.suptitle(title, fontsize=9)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left=1.75 / width, right=0.995, top=1 - 0.5 / height, bottom=0.005, wspace=0.04, hspace=0.04)
    return figure
