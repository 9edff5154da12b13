# SPDX-License-Identifier: Apache-2.0
"""Line charts as SVG: coloured by classes, so that they follow the page's theme; told apart by dashes and markers, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.webpage.markup import element

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 40
STYLES = 8  # of lines, in page.css
MARKERS = 16  # a line with more points has none
POINTS = 240  # more of a line are thinned out: it is some 260 pixels wide


@dataclass(frozen=True)
class Series:
    """A line. `error` is one standard error of each point, or empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()
    style: int = 0
    """Colour, dashes and marker; several lines may share one."""


@dataclass(frozen=True)
class Axis:
    """Name with its unit, and whether it is logarithmic."""

    name: str
    log: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * size for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first = math.ceil(low / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between, with twos and fives where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
        found = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(found) >= 3:
            return found
    return ticks(low, high)


def number(value: float) -> str:
    """A tick's label: 0.5, 20, 3k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


class _Scale:
    """Values to pixels."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        low, high = min(values), max(values)
        self.log = log and low > 0
        if low == high:
            low, high = (low / 2, high * 2) if self.log else (low - 1, high + 1)
        pad = 0.04
        if self.log:
            ratio = (high / low) ** pad
            low, high = low / ratio, high * ratio
        else:
            low, high = low - pad * (high - low), high + pad * (high - low)
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks = log_ticks(low, high) if self.log else ticks(low, high)

    def __call__(self, value: float) -> float:
        share = (
            math.log(value / self.low) / math.log(self.high / self.low)
            if self.log
            else (value - self.low) / (self.high - self.low)
        )
        return self.start + share * (self.end - self.start)


def thinned(series: Series) -> Series:
    """At most POINTS points, with both ends: every so-manieth, so that the same run gives the same drawing."""
    step = math.ceil(len(series.x) / POINTS)
    if step <= 1:
        return series
    kept = sorted({*range(0, len(series.x), step), len(series.x) - 1})
    x, y, error = ([values[i] for i in kept] if values else [] for values in (series.x, series.y, series.error))
    return Series(series.name, x, y, error, series.style)


def line_chart(series: Sequence[Series], x: Axis, y: Axis, what: str) -> Markup:
    """The chart, with its key below it. `what` says in words what it shows, for those who do not see it.

    Points that are not finite, or not positive on a logarithmic axis, break the line.
    """
    lines = [thinned(one) for one in series]
    drawn = [(a, b) for one in lines for a, b in zip(one.x, one.y, strict=True) if math.isfinite(b)]
    if not drawn:
        return Markup("")
    across = _Scale([a for a, _ in drawn], x.log, LEFT, WIDTH - RIGHT)
    positive = [b for _, b in drawn if b > 0]
    log = y.log and len(positive) > 0
    up = _Scale(positive if log else [b for _, b in drawn], log, HEIGHT - BOTTOM, TOP)
    parts = [element("title", what), *_axes(across, up, x, y), *(_line(one, across, up) for one in lines)]
    svg = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=what, class_="chart")
    names = {one.style: one.name for one in reversed(series)}
    key = [element("li", _sample(style), names[style]) for style in sorted(names)]
    return svg + element("ul", *key, class_="key")


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[Markup]:
    parts = []
    for value in up.ticks:
        at = up(value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(element("text", number(value), x=LEFT - 6, y=at + 4, text_anchor="end"))
    for value in across.ticks:
        at = across(value)
        parts.append(element("line", x1=at, x2=at, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="tick"))
        parts.append(element("text", number(value), x=at, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    parts.append(element("path", d=f"M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="frame"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        element("text", x.name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="name")
    )
    turned = f"rotate(-90 12 {middle:g})"
    parts.append(element("text", y.name, x=12, y=middle, text_anchor="middle", transform=turned, class_="name"))
    return parts


def _line(series: Series, across: _Scale, up: _Scale) -> Markup:
    words, pen, marks = [], "M", []
    for i, (a, b) in enumerate(zip(series.x, series.y, strict=True)):
        if not math.isfinite(b) or (up.log and b <= 0):
            pen = "M"
            continue
        px, py = across(a), up(b)
        words.append(f"{pen}{px:.1f} {py:.1f}")
        pen = "L"
        if i < len(series.error) and series.error[i] > 0:
            ends = [up(value) for value in (b - series.error[i], b + series.error[i]) if not up.log or value > 0]
            if len(ends) == 2:
                marks.append(element("path", d=f"M{px:.1f} {ends[0]:.1f}V{ends[1]:.1f}", class_="error"))
        if len(series.x) <= MARKERS:
            said = element("title", f"{series.name}: {number(a)}, {b:.4g}")
            marks.append(_marker(series.style, px, py, said))
    return element("g", element("path", d="".join(words), class_="line"), *marks, class_=f"s{series.style % STYLES}")


def _marker(style: int, x: float, y: float, *inside: Markup) -> Markup:
    """One of four shapes."""
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        "m-3.2 -3.2h6.4v6.4h-6.4z",
        "m0 -4l4 7h-8z",
        "m0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
    )
    return element("path", *inside, d=f"M{x:.1f} {y:.1f}{shapes[style % len(shapes)]}", class_="mark")


def _sample(style: int) -> Markup:
    """A piece of line for the key."""
    line = element("path", d="M1 6H27", class_="line")
    drawn = element("g", line, _marker(style, 14, 6), class_=f"s{style % STYLES}")
    return element("svg", drawn, viewBox="0 0 28 12", width="28", height="12", aria_hidden="true")
