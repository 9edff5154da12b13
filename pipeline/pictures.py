# SPDX-License-Identifier: Apache-2.0
"""Figures 2 and 8 to 13: images of samples in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from pipeline import style
from pipeline.generation import noise_of, samples
from pipeline.modelling import Decoder
from pipeline.params import Slot
from pipeline.students import StudentTraining
from scm_core.nn.build import Model

Row = tuple[str, Tensor]


def images_of(
    slot: Slot,
    student: StudentTraining | None,
    model: Model,
    decode: Decoder,
    indices: Sequence[int],
    labels: Sequence[int],
    steps: int,
    guidance: float | None,
) -> Tensor:
    """Samples (B, C, H, W) in uint8 from the noise of these indices, with one label each."""
    shape = tuple(model.config[key] for key in ("channels", "resolution", "resolution"))
    noise = noise_of(student, indices, shape, steps)
    return decode(samples(slot, student, model.net, noise, torch.tensor(labels), guidance))


def grid(rows: Sequence[Row], columns: Sequence[str], title: str, margin: float = 0.4) -> Figure:
    """Images in a page's width, a label beside each row (`margin` inches wide) and above each column (none: no names)."""
    count = max(len(images) for _, images in rows)
    side = min(0.62, (style.PAGE - margin - 0.05) / count)
    lines = max(name.count("\n") for name, _ in rows) + 1
    height = max(side, 0.13 * lines)
    top = 0.42 + 0.14 * title.count("\n")
    width, tall = margin + count * side + 0.05, top + len(rows) * height + 0.05
    with rc_context({"figure.constrained_layout.use": False}):  # the place of every image is known
        figure = Figure(figsize=(max(width, 4.2), tall))  # wide enough for the title
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(
                image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
            )
        for axis in line:
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=3)
    for axis, name in zip(axes[0], columns, strict=False):
        axis.set_title(name, fontsize=7, pad=2)
    wide, tall = figure.get_size_inches()
    figure.suptitle(title, y=1 - 0.06 / tall, va="top")
    figure.subplots_adjust(
        left=margin / wide,
        right=(margin + count * side) / wide,
        top=1 - top / tall,
        bottom=0.02 / tall,
        wspace=0.03,
        hspace=0.03,
    )
    return figure
