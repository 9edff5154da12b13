# SPDX-License-Identifier: Apache-2.0
"""How all figures look: sizes, fonts, colours that the colour-blind tell apart, and files that are the same wherever they are drawn.

A figure is as wide as a page's text (7 inches) or its column (3.4 inches), with type of 7 to 8 points at that size. A method has one
colour and one marker in all figures, a number of steps one kind of line.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from pipeline.context import Context
    from pipeline.params import Slot

PAGE, COLUMN = 7.0, 3.4  # inches
FOOTER = 0.22  # inches below a figure for the scale's note
DPI = 200
# Okabe and Ito's palette (Color Universal Design)
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)


class Look(NamedTuple):
    """Colour and marker of a method."""

    colour: str
    marker: str


LOOKS = {
    "teacher": Look(BLACK, "s"),
    "sct": Look(ORANGE, "^"),
    "scd": Look(BLUE, "o"),
    "vsd": Look(VERMILION, "v"),
    "scd_vsd": Look(GREEN, "D"),
    "multistep": Look(SKY, "P"),
    "dscd": Look(PURPLE, "X"),
    "other": Look(GREY, "."),
}
LINES = {1: "--", 2: "-"}  # by number of steps

plt.rcParams.update(
    {
        "font.size": 7.5,
        "axes.titlesize": 8,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 6.8,
        "figure.titlesize": 8,
        "axes.linewidth": 0.6,
        "lines.linewidth": 1.1,
        "lines.markersize": 3.6,
        "errorbar.capsize": 1.8,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "grid.linewidth": 0.5,
        "legend.framealpha": 0.8,
        "legend.handlelength": 2.2,
        "figure.constrained_layout.use": True,
        "pdf.fonttype": 42,  # text stays text
        "svg.hashsalt": "scm",
    }
)


def panels(rows: int, columns: int, width: float = PAGE, height: float = 2.3, **options: Any) -> tuple[Figure, Any]:
    """A figure of `rows` × `columns` axes, each row `height` inches high; the axes as an array of that shape."""
    return plt.subplots(rows, columns, figsize=(width, 0.35 + height * rows), squeeze=False, **options)


def look(method: str) -> dict[str, Any]:
    """Keyword arguments of a method's line or points."""
    found = LOOKS.get("multistep" if method.startswith("multistep") else method, LOOKS["other"])
    return {"color": found.colour, "marker": found.marker}


def steps_label(steps: int) -> str:
    """1 step, 2 steps."""
    return f"{steps} step{'s' * (steps > 1)}"


def face(ctx: Context, slot: Slot) -> str:
    """What a figure was measured on, for its title."""
    side = slot.dataset.resolution
    return f"{slot.dataset.source} {side}×{side}, scale {ctx.job.scale}"


def space(points: pd.DataFrame) -> str:
    """The features that FID was measured in."""
    known = dict.fromkeys(points.features[points.space != "dinov2"]) if len(points) else {}
    return f"FID in {' and '.join(known) or 'no features: nothing was measured'}"


def bars(errors: pd.Series) -> pd.Series | None:
    """Standard errors to draw; None where there are none, as of published numbers."""
    return errors if (errors > 0).any() else None


def legend_below(figure: Figure, axes: Iterable[Axes], columns: int = 4) -> None:
    """One legend for all panels, below them: each name once."""
    known: dict[str, Any] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        known = {**dict(zip(names, handles, strict=True)), **known}
    if known:
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=columns)


def panel_legend(axis: Axes) -> None:
    """A panel's own legend, in two columns below its label: within the panel it would hide lines."""
    axis.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def placeholder(axis: Axes, words: str) -> None:
    """An empty panel that says what is missing."""
    axis.text(0.5, 0.5, words, ha="center", va="center", transform=axis.transAxes, color=GREY, wrap=True)
    axis.grid(False)


def save(ctx: Context, figure: Figure, name: str) -> list[Path]:
    """<name>.png and <name>.pdf among the outputs, without dates, and as artifacts; the scale's note, if it has one, below the drawing."""
    files = [ctx.out / f"{name}.png", ctx.out / f"{name}.pdf"]
    frame = footer(figure, ctx.note) if ctx.note else None
    figure.savefig(files[0], dpi=DPI, metadata={"Software": None}, bbox_inches=frame)
    figure.savefig(files[1], metadata={"CreationDate": None, "Creator": None, "Producer": None}, bbox_inches=frame)
    plt.close(figure)
    for file in files:
        ctx.tracker.log_artifact(file)
    return files


def footer(figure: Figure, words: str) -> Bbox:
    """A line of words below the figure, which stays as it is; the part to save, in inches: the figure and the line.

    Where the figure is narrow the words are small, so that all of them are there.
    """
    wide, tall = figure.get_size_inches()
    line = figure.text(0.5, -0.5 * FOOTER / tall, words, ha="center", va="center", color=VERMILION)
    line.set_in_layout(False)
    dpi = figure.dpi
    figure.set_dpi(DPI)  # by hinting the words are not as wide at another one
    while line.get_window_extent().width > 0.95 * wide * DPI:
        line.set_fontsize(0.97 * float(line.get_fontsize()))
    figure.set_dpi(dpi)
    return Bbox.from_extents(0, -FOOTER, wide, tall)


def plain(axis: Axes, which: str = "y") -> None:
    """Numbers without powers of ten on a logarithmic axis, at 1, 2 and 5 of each decade."""
    for side in which:
        lines = axis.xaxis if side == "x" else axis.yaxis
        lines.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        lines.set_major_formatter("{x:g}")
        lines.set_minor_formatter(NullFormatter())


def shades(count: int) -> list[Any]:
    """So many colours in order, from light to dark, that stay apart without colour: for N of discrete time."""
    ramp = plt.get_cmap("plasma")
    return [ramp(0.85 - 0.75 * i / max(1, count - 1)) for i in range(count)]
