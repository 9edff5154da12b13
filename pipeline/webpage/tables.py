# SPDX-License-Identifier: Apache-2.0
"""Tables as the page shows them: from a report's CSV, with title and notes of the Markdown beside it.

A row that names runs (column `run` or `runs`, ids separated by spaces) is ours: each of its cells leads to the first of them. A column
`x_se` is shown behind column `x`, as ±. A table of quantities (columns quantity, size, value) gets a column for each size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from pipeline.cells import read_rows
from pipeline.webpage.markup import inline

ERROR = "_se"
RUNS = ("run", "runs")
MISSING = "missing"
FOLDED = 12  # more published rows than these are folded away at first
LABELS = {
    "nfe": "NFE",
    "fid": "FID",
    "kid": "KID",
    "fd_dinov2": "FD-DINOv2",
    "params": "parameters",
    "run": "run",
}
Row = Mapping[str, str]


@dataclass(frozen=True)
class Link:
    """A run by its id; no anchor where the page has no such run."""

    text: str
    anchor: str | None


@dataclass(frozen=True)
class Cell:
    """What stands in a column of a row."""

    text: str
    error: str = ""
    anchor: str | None = None
    """Of the run that it comes from."""
    runs: tuple[Link, ...] = ()
    """Instead of text."""
    number: bool = False
    tab: bool = True
    """Whether the Tab key stops at its link: not where a cell of the same row leads there, too."""

    @property
    def missing(self) -> bool:
        """Whether the report says that there is no such run."""
        return self.text == MISSING


@dataclass(frozen=True)
class Section:
    """Rows below a heading of their own."""

    heading: str
    ours: bool
    rows: list[list[Cell]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A table, ours before what was published."""

    name: str
    title: str
    notes: list[Markup]
    columns: list[str]
    numeric: list[bool]
    own: list[bool]
    """Columns that are ours, in a table that has ours in columns."""
    sections: list[Section]

    @property
    def published(self) -> int:
        """Rows that are not ours."""
        return sum(len(section.rows) for section in self.sections if not section.ours)

    @property
    def folded(self) -> bool:
        """Whether the published rows are folded away at first: many, beside ours."""
        return self.published > FOLDED and any(section.ours for section in self.sections)


def read_table(name: str, file: Path, markdown: Path | None, title: str, known: Mapping[str, str]) -> Table:
    """The table of a report; `known` are the anchors of runs by id, `title` is for one without Markdown."""
    rows = read_rows(file)
    heading, notes = read_notes(markdown) if markdown else ("", [])
    return as_table(name, rows, known, title if heading in ("", title.partition(":")[0]) else heading, notes)


def as_table(name: str, rows: Sequence[Row], known: Mapping[str, str], title: str, notes: Sequence[Markup]) -> Table:
    """Rows of text as a table."""
    by_size = rows and {"quantity", "size", "value"} <= set(rows[0])
    sections = _by_size(rows, known) if by_size else _plain(rows, known)
    columns = list(dict.fromkeys(key for _, lines in sections for line in lines for key in line))
    # What no row says is no column; runs come last.
    columns = [key for key in columns if any(_says(line.get(key)) for _, lines in sections for line in lines)]
    columns.sort(key=lambda key: key in RUNS)
    shown = [
        Section(
            heading,
            heading.startswith("Ours") or any(cell.anchor for line in lines for cell in line.values()),
            [[line.get(key, Cell("")) for key in columns] for line in lines],
        )
        for heading, lines in sections
    ]
    shown.sort(key=lambda section: not section.ours)
    numeric = [
        key not in RUNS
        and all(
            line[i].number or line[i].text in ("", MISSING) for section in shown for line in section.rows if line[i]
        )
        for i, key in enumerate(columns)
    ]
    return Table(
        name,
        title,
        list(notes),
        [label(key) for key in columns],
        numeric,
        [key.startswith("ours ") for key in columns],
        shown,
    )


def _says(cell: Cell | None) -> bool:
    return cell is not None and bool(cell.text or cell.runs)


Lines = list[tuple[str, list[dict[str, Cell]]]]


def _plain(rows: Sequence[Row], known: Mapping[str, str]) -> Lines:
    """A cell for each column but the section's, errors behind their values."""
    sections: dict[str, list[dict[str, Cell]]] = {}
    for row in rows:
        links = run_links(row, known)
        first = next((link.anchor for link in links if link.anchor), None)
        line = {}
        for key, text in row.items():
            if key in RUNS:
                line[key] = Cell("", runs=links)
            elif key != "section" and not (key.endswith(ERROR) and key.removesuffix(ERROR) in row):
                error = row.get(key + ERROR, "")
                line[key] = Cell(text, error, first if text else None, number=is_number(text), tab=False)
        sections.setdefault(row.get("section", ""), []).append(line)
    return list(sections.items())


def _by_size(rows: Sequence[Row], known: Mapping[str, str]) -> Lines:
    """A line for each sampler and quantity, a column for each size; each cell leads to its own run."""
    sections: dict[str, dict[tuple[str, ...], dict[str, Cell]]] = {}
    sizes = list(dict.fromkeys(row["size"] for row in rows if row["size"]))
    for row in rows:
        named = {key: row[key] for key in ("group", "sampler", "quantity") if key in row}
        lines = sections.setdefault(row.get("section", ""), {})
        line = lines.setdefault(
            tuple(named.values()), {**{k: Cell(v) for k, v in named.items()}, **{s: Cell("") for s in sizes}}
        )
        first = next((link.anchor for link in run_links(row, known) if link.anchor), None)
        value = Cell(row["value"], row.get("value" + ERROR, ""), first, number=is_number(row["value"]))
        line[row["size"] or next(iter(sizes), "value")] = value
    return [(heading, list(lines.values())) for heading, lines in sections.items()]


def run_links(row: Row, known: Mapping[str, str]) -> tuple[Link, ...]:
    """The runs that a row names."""
    return tuple(Link(run, known.get(run)) for key in RUNS for run in row.get(key, "").split())


def label(key: str) -> str:
    """A column's name for readers."""
    if key in LABELS:
        return LABELS[key]
    words = " ".join(LABELS.get(word, word) for word in key.split("_"))
    return words.replace("fd dinov2", "FD-DINOv2").replace("ema sigma rel", "EMA σ_rel").replace("t mid", "t_mid")


def is_number(text: str) -> bool:
    """Whether a cell stands right-aligned: a number, or one with a unit or factors as in 63x2, 1.5B, 10%."""
    return bool(text) and text.rstrip("BMk%").replace("x", "").replace("e-", "").lstrip("-+").replace(".", "").isdigit()


def read_notes(file: Path) -> tuple[str, list[Markup]]:
    """The heading of a report's Markdown, and the paragraphs before its first table or section."""
    heading, notes = "", []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            heading = line.removeprefix("# ").strip()
        elif line.startswith(("## ", "|")):
            break
        elif line.strip():
            notes.append(inline(line.strip()))
    return heading, notes
