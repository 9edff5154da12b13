# SPDX-License-Identifier: Apache-2.0
"""A finished run of scale smoke that nobody computed: made-up files with true manifests, for the tests of the page."""

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import manifest, paths, registry
from pipeline.files import write_json
from pipeline.job import Job
from pipeline.params import Params, load
from pipeline.sweep import FIELDS
from pipeline.webpage.render import render

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = """<script>alert("1")</script><img src=x onerror='alert(2)'> & "quoted" *stressed*"""
COMMIT = "c0ffee00" * 5
GUIDANCE = (1.0, 1.5, 2.0)


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows with the first one's columns."""
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_png(file: Path, shade: int = 128, size: tuple[int, int] = (60, 40)) -> Path:
    """A grey picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, shade).save(file)
    return file


def sweep_rows(fid: float) -> list[dict[str, Any]]:
    """A guidance sweep, two reported sets of the best scale, two earlier checkpoints."""
    empty: dict[str, Any] = dict.fromkeys(FIELDS, "")
    point = {**empty, "steps": 1, "space": "classifier", "best": "False", "samples": 100, "fid_se": 0.5}
    rows = [{**point, "phase": "select", "guidance": scale, "fid": fid + scale} for scale in (1.0, 1.5)]
    best = {**point, "phase": "report", "guidance": 1.5, "best": "True"}
    rows += [{**best, "fid": fid - 1, "first_index": 0}, {**best, "fid": fid + 1, "first_index": 100}]
    return [*rows, *({**best, "ema": 0.1, "nimg": seen, "fid": fid + 640 / seen} for seen in (640, 1280))]


class Made:
    """A repository below `folder` whose jobs of scale smoke have all been published, but for the page."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        (folder / "reports").mkdir(parents=True)
        shutil.copy(ROOT / "params.yaml", folder)
        self.params: Params = load(folder / "params.yaml", "smoke")
        self.jobs = registry.jobs(self.params)
        self.page = next(job for job in self.jobs if job.stage == "report")
        self.evaluations: list[str] = []
        for job in self.jobs:
            if job is not self.page:
                self._publish(job)

    def _publish(self, job: Job) -> None:
        inputs = manifest.read_inputs(job)
        mark = manifest.fingerprint(job, self.params, inputs)
        run = manifest.run_id(job, mark)
        staged = self.root / "staged"
        staged.mkdir()
        self._write(job, run, staged)
        made = manifest.build(job, self.params, inputs, mark, staged)
        if job.is_report:
            for output in job.outputs:
                shutil.move(staged / output.name, self.root / output)
            staged.rmdir()
            write_json(paths.report_manifest(job), made)
        else:
            write_json(staged / paths.MANIFEST, made)
            (self.root / job.outputs[0]).parent.mkdir(parents=True, exist_ok=True)
            staged.rename(self.root / job.outputs[0])
        if job.stage == "evaluate":
            self.evaluations.append(run)
        self.record(job, run, COMMIT)

    def record(self, job: Job, run: str, commit: str, seconds: float = 2.0) -> None:
        """What is said of the execution of a job."""
        facts = {"commit": commit, "dirty": False, "seconds": seconds, "started": 1.0}
        value = {
            "run": run,
            "attempts": [facts],
            "seconds": seconds,
            "cpu_seconds": seconds,
            "peak_memory_mb": 300,
            "mlflow_run": "f" * 32,
            "launcher": "inline",
            "environment": {"python": "3.11.7", "processor": "A processor", "gpus": "", "packages": "torch 2.13.0"},
        }
        write_json(paths.record_file(job), value)

    def _write(self, job: Job, run: str, folder: Path) -> None:
        for output in job.outputs if job.is_report else ():
            self._write_report(folder / output.name)
        if job.stage == "evaluate":
            write_csv(folder / paths.SWEEP, sweep_rows(10.0 * len(self.evaluations) + 5))
        elif job.stage == "gallery":
            self._write_gallery(job, folder)
        elif job.stage in ("teacher", "student"):
            log = paths.log_file(job).with_suffix(".jsonl")
            log.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"iteration": i, "nimg": 64 * i, "loss": 1 / i, "grad_norm": 2.0**-i} for i in range(1, 30)]
            log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
            (folder / "model").write_text(run)
        elif not job.is_report:
            (folder / "data").write_text(run)

    def _write_report(self, file: Path) -> None:
        if file.suffix == ".png":
            write_png(file)
        elif file.name == "claims.csv":
            write_csv(file, claims(self.evaluations))
        elif file.suffix == ".csv":
            write_csv(file, table(self.evaluations))
        elif file.suffix == ".md":
            file.write_text(f"# {file.stem.capitalize()}\n\nA note with *stress*.\n\n## Ours\n\n| a |\n|---|\n")
        else:
            file.write_text(file.name)

    def _write_gallery(self, job: Job, folder: Path) -> None:
        entries = []
        for steps in (1, 2):
            for n, scale in enumerate(GUIDANCE[: 4 - steps]):  # two steps at two scales only
                name = f"scd-{steps}-{scale}.png"
                write_png(folder / name, 60 * n + 20 * steps)
                common = {"slot": job.axes["slot"], "size": "S", "method": "scd", "seed": 0}
                entries.append({**common, "steps": steps, "guidance": scale, "file": name})
        (folder / "grids.json").write_text(json.dumps({"format": 1, "grids": entries}))

    def inputs(self) -> dict[str, Path]:
        """The page's."""
        return {name: item.path for name, item in manifest.read_inputs(self.page).items()}

    def runs(self) -> dict[str, str]:
        """The runs that made them."""
        return {name: item.run for name, item in manifest.read_inputs(self.page).items() if item.run}

    def render(self, **more: Path | None) -> str:
        """The page, with other inputs, or without those that are None; `claims_csv` is claims.csv."""
        inputs = self.inputs()
        for name, path in more.items():
            inputs.pop(name.replace("_", "."), None)
            if path is not None:
                inputs[name.replace("_", ".")] = path
        return render(self.page, self.params, inputs, self.runs())


@contextmanager
def made_repository(factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Such a repository, in which the pipeline finds itself."""
    with pytest.MonkeyPatch.context() as patch:
        folder = factory.mktemp("repository")
        (folder / "params.yaml").write_text("")
        patch.setenv("SCM_ROOT", str(folder))
        yield Made(folder)


def table(runs: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a table: fifteen published ones, then one for each run."""
    empty = dict.fromkeys(("section", "method", "nfe", "fid", "fid_se", "run"), "")
    published = [
        {**empty, "section": "Published", "method": f"EDM-{n}", "nfe": "63x2", "fid": f"2.{n:02}"} for n in range(15)
    ]
    ours = [
        {
            **empty,
            "section": "Ours, scale smoke",
            "method": "sCD",
            "nfe": "2",
            "fid": f"{n}.123",
            "fid_se": "0.456",
            "run": run,
        }
        for n, run in enumerate(runs)
    ]
    return [*published, *ours, {**empty, "section": "Ours, scale smoke", "method": "VSD", "fid": "missing"}]


def claims(runs: Sequence[str]) -> list[dict[str, str]]:
    """One claim of each verdict."""
    row = {
        "id": "two",
        "statement": "Two steps do",
        "paper": "1.1",
        "ours": "1.05",
        "standard_error": "0.02",
        "rule": "below 1.1",
    }
    rest = {
        "why": "0.2 against 0.19",
        "scale": "smoke",
        "dataset": "mnist5k",
        "features": "toy (8-d)",
        "runs": " ".join(runs[:2]),
    }
    return [
        {**row, "verdict": "holds", **rest},
        {**row, "id": "one", "verdict": "does not hold", **rest},
        {
            **row,
            "id": "none",
            "ours": "missing",
            "standard_error": "",
            "verdict": "not testable at this scale",
            **rest,
            "runs": "",
        },
    ]


VOID = {"meta", "link", "img", "input", "br", "hr"}
OPTIONAL = {"li", "dt", "dd", "p", "tr", "td", "th"}  # may be left open in HTML; here they are not


class Page(HTMLParser):
    """The page's elements; an end that is not that of the last open element is an error."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        """Name, attributes, ids of what it lies in."""
        self.texts: list[tuple[str, str]] = []
        """Name of the element that it stands in, and text."""
        self._open: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self.feed(html)
        self.close()
        self.errors += [f"<{name}> is never closed" for name, _ in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if len(values) != len(attrs):
            self.errors.append(f"<{tag}> has an attribute twice: {attrs}")
        self.elements.append((tag, values, tuple(key for _, key in self._open if key)))
        if tag not in VOID:
            self._open.append((tag, values.get("id", "")))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1][0] != tag:
            self.errors.append(f"</{tag}> at {self.getpos()} closes {self._open[-1:]}")
        elif tag not in VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1][0] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of all elements of a name."""
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def text(self) -> str:
        """All that is read, without style and scripts, in single spaces."""
        return " ".join(word for name, text in self.texts if name not in ("style", "script") for word in text.split())
