# SPDX-License-Identifier: Apache-2.0
"""The page from the job's inputs: what is there is read, what is not is named, and page.html arranges it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import plan, registry, webpage
from pipeline.cells import read_rows
from pipeline.errors import PipelineError
from pipeline.files import sha256_file
from pipeline.job import Job
from pipeline.params import Params
from pipeline.tables import METHOD_NAMES
from pipeline.webpage import claims, costs, curves, pictures, runs, tables
from pipeline.webpage.graph import rule_graph
from pipeline.webpage.markup import anchor, inline

PARTS = Path(__file__).resolve().parent
MOST_BYTES = 15_000_000
DATA_ROWS = 120  # of a figure's CSV; the file has all
SHORT_HASH = 12
# What a complete reproduction draws: named on the page where it is missing.
ITEMS = {
    **{f"table{n}": f"Table {n}" for n in (*range(1, 8), "E3")},
    **{f"figure{n}": f"Figure {n}" for n in range(1, 14)},
}


@dataclass(frozen=True)
class Figure:
    """A picture that a report drew, and the numbers in it, where the report has them."""

    name: str
    title: str
    picture: pictures.Picture
    alt: str
    data: tables.Table | None
    rows: int
    """Of its numbers, shown or not."""


@dataclass(frozen=True)
class File:
    """A file in reports/."""

    name: str
    bytes: int
    sha256: str
    run: tables.Link


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts figure2 before figure10, and numbers before letters."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def render(job: Job, params: Params, inputs: Mapping[str, Path], input_runs: Mapping[str, str]) -> str:
    """The page. `inputs` are the job's, by name; PipelineError for what cannot be read, and for a page of more than 15 MB."""
    stages = runs.stages(runs.ancestors(job, params))
    everything = [run for stage in stages for run in stage.runs]
    known = {run.id: run.anchor for run in everything}
    files = {name: path for name, path in inputs.items() if path.is_file()}
    titles = {path.name: stage.title for stage in registry.STAGES.values() for path in stage.reports}
    judged = claims.read_claims(files["claims.csv"], known) if "claims.csv" in files else None
    trainings = [run for stage in stages if stage.name in costs.TRAINED for run in stage.runs]
    evaluations = {_axes(run.job): inputs[name] for run in everything if (name := run.job.name) in inputs}
    shown_tables, figures = _tables(files, titles, known), _figures(files, titles, known)
    shown = {table.name for table in shown_tables} | {figure.name for figure in figures}
    page = {
        "scale": job.scale,
        "scale_note": params.note_of(job.scale),
        "slots": params.scales[job.scale].slots,
        "claims": judged,
        "verdicts": claims.summary(judged or []),
        "marks": claims.MARKS,
        "tables": shown_tables,
        "figures": figures,
        "galleries": _galleries(inputs),
        "panels": curves.panels(trainings, evaluations, METHOD_NAMES),
        "graph": rule_graph(runs.ancestors(job, params)),
        "reads": _reads(runs.ancestors(job, params)),
        "stages": stages,
        "runs": everything,
        "files": _files(files, input_runs, known),
        "costs": [costs.cost(stage, params) for stage in stages],
        "environments": costs.environments(everything),
        "absent": [title for name, title in ITEMS.items() if name not in shown],
        "known": known,
    }
    html = _environment().get_template("page.html").render(page)
    size = len(html.encode())
    if size > MOST_BYTES:
        raise PipelineError(
            f"report.html: would have {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:g}; draw smaller figures or fewer grids of samples"
        )
    return html


def _axes(job: Job) -> tuple[str, str, str]:
    return (job.axes.get("slot", ""), job.axes.get("size", ""), job.axes.get("method", ""))


def _environment() -> Environment:
    style, script = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    early, _, late = script.partition("// The rest runs when the page is there.\n")
    made = Environment(
        loader=FileSystemLoader(PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {
        "style": Markup(style),  # our own files
        "scripts": [Markup(part) for part in (early, late)],
        "script_hashes": [_source_hash(part) for part in (early, late)],
        "style_hash": _source_hash(style),
        "recorded": Markup(webpage.RECORDED),
        "recorded_end": Markup(webpage.RECORDED_END),
        "anchor": anchor,
        "inline": inline,
        "size": plan.size,
        "duration": plan.duration,
        "flops": flops_text,
        "link_to": tables.Link,
    }
    made.filters["short"] = lambda digest: digest[:SHORT_HASH]
    return made


def _source_hash(text: str) -> str:
    """For the page's Content-Security-Policy, which allows these and nothing else."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def flops_text(flops: float) -> str:
    """A number of operations with a prefix."""
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"


def _tables(files: Mapping[str, Path], titles: Mapping[str, str], known: Mapping[str, str]) -> list[tables.Table]:
    names = sorted((n.removesuffix(".csv") for n in files if re.fullmatch(r"table\w+\.csv", n)), key=natural)
    return [
        tables.read_table(n, files[f"{n}.csv"], files.get(f"{n}.md"), titles.get(f"{n}.csv", ITEMS.get(n, n)), known)
        for n in names
    ]


def _figures(files: Mapping[str, Path], titles: Mapping[str, str], known: Mapping[str, str]) -> list[Figure]:
    names = sorted((n.removesuffix(".png") for n in files if re.fullmatch(r"figure\w+\.png", n)), key=natural)
    found = []
    for name in names:
        title = titles.get(f"{name}.png", "")
        label = ITEMS.get(name, name)
        # A stage that draws several figures names them all; here each has its own number.
        title = f"{label}: {title.partition(': ')[2] or title}" if title else label
        rows = read_rows(files[f"{name}.csv"]) if f"{name}.csv" in files else []
        data = tables.as_table(f"{name}-data", rows[:DATA_ROWS], known, f"Numbers of {label}", []) if rows else None
        alt = f"{title}. " + ("The numbers are in the table below it." if data else "Pictures of samples.")
        drawn = pictures.picture(files[f"{name}.png"], pictures.FIGURE_BYTES)
        found.append(Figure(name, title, drawn, alt, data, len(rows)))
    return found


def _galleries(inputs: Mapping[str, Path]) -> list[pictures.Gallery]:
    indices = [path if path.is_file() else path / pictures.INDEX for path in inputs.values()]
    here = [path for path in indices if path.name == pictures.INDEX and path.is_file()]
    return [gallery for index in here for gallery in pictures.read_galleries(index, inputs, METHOD_NAMES)]


def _files(files: Mapping[str, Path], input_runs: Mapping[str, str], known: Mapping[str, str]) -> list[File]:
    return [
        File(name, path.stat().st_size, sha256_file(path), tables.Link(run, known.get(run)))
        for name, path in sorted(files.items(), key=lambda item: natural(item[0]))
        for run in [input_runs.get(name, "")]
    ]


def _reads(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """The stages that each stage reads, for those who do not see the graph."""
    reads: dict[str, dict[str, None]] = {}
    for job in jobs:
        reads.setdefault(job.stage, {}).update(dict.fromkeys(parent.stage for parent in registry.parents(job, jobs)))
    return {stage: list(above) for stage, above in reads.items()}


def recorded_parts(html: str) -> Iterator[str]:
    """What a page says of executions, which differs between equal runs."""
    for part in html.split(webpage.RECORDED)[1:]:
        yield part.partition(webpage.RECORDED_END)[0]


def without_records(html: str) -> str:
    """The page but for that: the same for the same inputs."""
    first, *rest = html.split(webpage.RECORDED)
    return first + "".join(part.partition(webpage.RECORDED_END)[2] for part in rest)
