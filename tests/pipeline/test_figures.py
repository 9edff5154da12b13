# SPDX-License-Identifier: Apache-2.0
"""What figures have in common: files without dates, one look, and grids of images that fill their place."""

import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from pipeline import style
from pipeline.pictures import grid
from pipeline.ranks import Silent


def context(folder: Path, note: str = "") -> Any:
    folder.mkdir()
    return types.SimpleNamespace(out=folder, tracker=Silent(), job=types.SimpleNamespace(scale="toy"), note=note)


def test_a_figure_is_the_same_file_whenever_it_is_drawn(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        figure, ((axis,),) = style.panels(1, 1)
        axis.errorbar([1, 2], [3, 4], [0.1, 0.2], label="x", **style.look("scd"))
        axis.set(xlabel="t (radians)", title="σ_d")
        style.legend_below(figure, [axis])
        contents.append([file.read_bytes() for file in style.save(context(tmp_path / name), figure, "figure")])
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b"\x89PNG")
    assert contents[0][1].startswith(b"%PDF")
    assert b"/CreationDate" not in contents[0][1]


@pytest.mark.parametrize("kind", ["panels", "grid"])
def test_a_scales_note_stands_below_a_figure_that_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    """With and without a layout engine: the same pixels, and a strip below them with the words, all of which fit, be they wide."""
    drawn = {}
    for note in ("", "m" * 120):
        if kind == "grid":
            figure = grid([("one", torch.zeros(4, 1, 8, 8, dtype=torch.uint8))], list("abcd"), "a title")
        else:
            figure, ((axis,),) = style.panels(1, 1)
            axis.plot([1, 2], [3, 4], label="x")
            style.legend_below(figure, [axis])
        png, _ = style.save(context(tmp_path / f"{kind}{len(note)}", note), figure, "figure")
        drawn[bool(note)] = np.asarray(Image.open(png).convert("L"), dtype=int)
    plain, noted = drawn[False], drawn[True]
    tall = len(plain)
    assert abs(len(noted) - tall - style.FOOTER * style.DPI) <= 1
    assert (np.abs(noted[:tall] - plain) > 128).mean() < 1e-3  # two pixels to the side would be five times as many
    columns = np.flatnonzero((noted[tall:] < 230).any(axis=0))
    assert columns[0] > 0
    assert columns[-1] < noted.shape[1] - 1
    assert len(columns) > 200


def test_a_legend_names_what_several_panels_show_once() -> None:
    figure, ((left, right),) = style.panels(1, 2)
    left.plot([1, 2], label="a")
    for name in ("a", "b"):
        right.plot([1, 2], label=name)
    style.legend_below(figure, [left, right])
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["a", "b"]


def luminance(colour: str) -> float:
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True))


def test_methods_are_told_apart_without_colour() -> None:
    """By their markers; and those of one figure that are drawn over each other by lightness too."""
    markers = [look.marker for look in style.LOOKS.values()]
    assert len(set(markers)) == len(markers)
    together = sorted(luminance(style.LOOKS[name].colour) for name in ("teacher", "scd", "vsd"))
    assert all(b - a > 0.05 for a, b in pairwise(together))
    ramp = [sum(colour[:3]) for colour in style.shades(4)]
    assert ramp == sorted(ramp, reverse=True)


def test_published_numbers_have_no_bars() -> None:
    assert style.bars(pd.Series([0.0, 0.0])) is None
    errors = style.bars(pd.Series([0.0, 0.1]))
    assert errors is not None
    assert list(errors) == [0.0, 0.1]


def test_features_are_named() -> None:
    points = pd.DataFrame({"features": ["a (8-d)", "a (8-d)", "b"], "space": ["classifier", "classifier", "dinov2"]})
    assert style.space(points) == "FID in a (8-d)"
    assert "nothing was measured" in style.space(points.head(0))


@pytest.mark.filterwarnings("error")
def test_a_grid_has_its_images_close_together_below_its_title() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    figure = grid([("one\ntwo", images), ("b", images[:3])], ["x", "y", "z", "w"], "a title\nof two lines", margin=0.9)
    figure.canvas.draw()
    boxes = [axis.get_window_extent() for axis in figure.axes]
    assert len(boxes) == 8
    side = boxes[0].width
    gaps = [right.x0 - left.x1 for left, right in pairwise(boxes[:4])]
    assert all(0 < gap < 0.1 * side for gap in gaps)
    assert boxes[0].y0 - boxes[4].y1 < 0.1 * side
    title = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert title.y0 > max(axis.title.get_window_extent().y1 for axis in figure.axes[:4])
    assert title.x0 > 0
    assert title.x1 < figure.bbox.width
