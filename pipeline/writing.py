# SPDX-License-Identifier: Apache-2.0
"""A table as CSV, Markdown and LaTeX: the one place where cells become text in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from pipeline.context import Context

MISSING = "missing"  # a run that the scale has not: never a zero, never a blank
_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "σ": r"$\sigma$",
    "λ": r"$\lambda$",
    "−": "$-$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "∇": r"$\nabla$",
    "∂": r"$\partial$",
    "π": r"$\pi$",
    "φ": r"$\varphi$",
    "θ": r"$\theta$",
    "…": r"\ldots{}",
}


def text_table(rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> pd.DataFrame:
    """Rows of text, with an empty cell where a row says nothing."""
    return pd.DataFrame(
        [{name: row.get(name, "") for name in columns} for row in rows], columns=list(columns), dtype=str
    )


def publish_table(
    ctx: Context,
    name: str,
    table: pd.DataFrame,
    title: str,
    notes: Sequence[str] = (),
    shown: pd.DataFrame | None = None,
) -> None:
    """`write_table` into a job's outputs and its artifacts; the scale's note, if it has one, stands before all others."""
    noted = [f"*{ctx.note}.*", *notes] if ctx.note else notes
    for file in write_table(ctx.out, name, table, title, noted, shown):
        ctx.tracker.log_artifact(file)


def write_table(
    folder: Path,
    name: str,
    table: pd.DataFrame,
    title: str,
    notes: Sequence[str] = (),
    shown: pd.DataFrame | None = None,
) -> list[Path]:
    """<name>.csv, .md and .tex in the folder. Cells are text already. `shown` is another arrangement for those who read it.

    A column `section` becomes headings in Markdown and LaTeX.
    """
    reader = table if shown is None else shown
    files = [folder / f"{name}.{ending}" for ending in ("csv", "md", "tex")]
    table.to_csv(files[0], index=False)
    files[1].write_text(to_markdown(reader, title, notes), encoding="utf-8")
    files[2].write_text(to_latex(reader, title, notes), encoding="utf-8")
    return files


def _sections(table: pd.DataFrame) -> list[tuple[str, list[str], list[list[str]]]]:
    """Heading, columns that have a cell in this section, rows."""
    columns = [column for column in table.columns if column != "section"]
    groups = table.groupby("section", sort=False) if "section" in table.columns else [("", table)]
    found = []
    for section, group in groups:
        used = [column for column in columns if (group[column].astype(str) != "").any()]
        found.append((str(section), used, group[used].astype(str).to_numpy().tolist()))
    return found


def to_markdown(table: pd.DataFrame, title: str, notes: Sequence[str] = ()) -> str:
    """A heading and a table for each section, with the columns that it fills."""
    lines = [f"# {title}", ""]
    for note in notes:
        lines += [note, ""]
    for section, columns, rows in _sections(table):
        lines += [f"## {section}", ""] if section else []
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def latex_text(text: str) -> str:
    """Text with LaTeX's own characters escaped, and those that pdfLaTeX lacks as mathematics."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def to_latex(table: pd.DataFrame, title: str, notes: Sequence[str] = ()) -> str:
    """A tabular for each section, without packages; \\input into a document of one's own."""
    lines = [f"% {title}", *(f"% {line}" for note in notes for line in note.splitlines())]
    for section, columns, rows in _sections(table):
        lines += ["", rf"\subsection*{{{latex_text(section)}}}"] if section else [""]
        lines.append(rf"\begin{{tabular}}{{{'l' * len(columns)}}}")
        lines += [r"\hline", " & ".join(latex_text(column) for column in columns) + r" \\", r"\hline"]
        lines += [" & ".join(latex_text(cell) for cell in row) + r" \\" for row in rows]
        lines += [r"\hline", r"\end{tabular}"]
    return "\n".join(lines) + "\n"
