# SPDX-License-Identifier: Apache-2.0
"""The stage that reads all others' results: reports/report.html, one page. What is on it is in `pipeline.webpage`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline import costs, expansion
from pipeline.job import REPORTS, Point, Stage

PAGE = "report.html"
_PARTS = tuple(Path("pipeline", "webpage", name) for name in ("page.html", "page.css", "page.js"))


def page(others: Sequence[Stage]) -> Stage:
    """The stage `report`: its inputs are every evaluation of the scale and the files of its other reports.

    All that these were made from is on the page, too, as their manifests name it by digest: what changes there changes them.
    """

    def inputs(point: Point) -> dict[str, Path]:
        made = [stage for stage in others if stage.reports and next(iter(stage.expand(point.params)), None) is not None]
        return {**expansion.every_evaluation(point), **{path.name: path for stage in made for path in stage.reports}}

    return Stage(
        "report",
        "the page that shows all of it: claims, tables, figures, samples, curves, lineage, cost",
        axes=(),
        expand=lambda params: iter([{}]),
        inputs=inputs,
        params=lambda p: (),
        cost=costs.figure,
        reports=(REPORTS / PAGE,),
        reads=_PARTS,
    )
