# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline results collect|check`: the results that are committed, for readers, and a fresh run beside them.

`collect` copies tables and figures of a scale from reports/ to results/<scale>/, with every number, its standard error, samples, seed and
run in results.json, and a page that shows them. `check` compares what a run has made since: a number with a standard error may lie
`--sigmas` standard errors of the difference away from the committed one; on the same kind of machine it is the same digit by digit.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import cells, manifest, paths, registry
from pipeline.cells import Name, Number
from pipeline.cli import Parser
from pipeline.done import DONE, states
from pipeline.errors import PipelineError
from pipeline.files import host, read_json, replace_file, sha256_file
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.provenance import processor, training_of
from pipeline.trace import commits

FORMAT = 1
KINDS = (".csv", ".md", ".png")  # what a reader looks at; LaTeX and PDF are made again from the same numbers
MOST_BYTES = 2 * 2**20  # of a file: git keeps every version
INDEX, PAGE, METRICS = "results.json", "README.md", "metrics.json"
VERSIONS = ("torch", "numpy", "scipy")  # that digits depend on
SIGMAS = 3.0
CHANCE = 0.0027  # two numbers of the same truth lie further apart than so many standard errors
LISTED = 20


def main(argv: Sequence[str]) -> int:
    """Collects, or compares: then exit status 1 when a number is too far away or missing."""
    parser = Parser(prog="python -m pipeline results", description=__doc__)
    parser.add_argument("what", choices=("collect", "check"))
    parser.add_argument("--scale", help="default: that of params.yaml")
    parser.add_argument("--partial", action="store_true", help="collect what is done, though other reports are not")
    parser.add_argument(
        "--sigmas", type=float, help=f"how far apart numbers may lie (default: {SIGMAS:g} standard errors)"
    )
    parser.add_argument("--all", action="store_true", help=f"name every number that differs, not only {LISTED}")
    options = parser.parse_args(list(argv))
    for name, what in {"partial": "collect", "sigmas": "check", "all": "check"}.items():
        if getattr(options, name) not in (None, False) and options.what != what:
            raise PipelineError(f"results {options.what}: --{name}: is an option of `results {what}`; leave it out")
    sigmas = SIGMAS if options.sigmas is None else options.sigmas
    if not 0 < sigmas < math.inf:
        raise PipelineError(f"results check: --sigmas {sigmas:g}: must be > 0 and finite")
    params = load(paths.root() / PARAMS_FILE, options.scale)
    if options.what == "collect":
        return collect(params, options.partial)
    return check(params, sigmas, None if options.all else LISTED)


def folder_of(scale: str) -> Path:
    """Where the committed results of a scale lie."""
    return paths.root() / "results" / scale


class Found:
    """What a run has made: report files by name, metrics by job, numbers, and which reports are not there."""

    def __init__(self, params: Params) -> None:
        self.params, self.jobs = params, registry.jobs(params)
        state = states(self.jobs, params)
        self.missing = {job.name: state[job.name] for job in self.jobs if job.is_report and state[job.name] != DONE}
        made = {job.name: manifest.read(manifest.path_of(job)) or {} for job in self.jobs if state[job.name] == DONE}
        self.runs = {name: str(entry["run"]) for name, entry in made.items()}
        reports = [job for job in self.jobs if job.is_report and job.name in made]
        files = [paths.root() / output for job in reports for output in job.outputs]
        self.files = {file.name: file for file in files if file.suffix in KINDS and file.stat().st_size <= MOST_BYTES}
        self.left_out = [f.name for f in files if f.suffix in KINDS and f.stat().st_size > MOST_BYTES]
        self.metrics = {job.name: _metrics(job) for job in self.jobs if job.name in made and not job.is_report}
        self.metrics = {name: found for name, found in self.metrics.items() if found}
        self.numbers: dict[Name, Number] = cells.numbers(METRICS, cells.rows_of_metrics(self.metrics, self.runs))
        for name, file in sorted(self.files.items()):
            if file.suffix == ".csv":
                self.numbers |= cells.numbers(name, cells.read_rows(file))
        self.seeds = _seeds(made)

    def records(self) -> list[dict[str, Any]]:
        """What is known of the executions behind the numbers."""
        found = [read_json(paths.record_file(job)) for job in self.jobs if job.name in self.metrics]
        return [record for record in found if record is not None]


def _metrics(job: Job) -> dict[str, Any]:
    return read_json(paths.root() / job.outputs[0] / paths.METRICS) or {}


def _seeds(made: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The seed behind each run: its own, or that of the first run above it that has one."""
    by_run = {entry["run"]: entry for entry in made.values()}

    def seed(run: str | None) -> str | None:
        entry = by_run.get(run or "")
        if entry is None:
            return None
        own = training_of(entry["stage"], entry["params"]).get("scm.seed")
        return own or next((s for item in entry["inputs"].values() if (s := seed(item["run"])) is not None), None)

    return {run: found for run in by_run if (found := seed(run)) is not None}


def machine(found: Found) -> dict[str, str]:
    """What digits depend on beside the code. The processor only if the numbers were measured on this machine."""
    here = all(record.get("host") == host() for record in found.records())
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    return {"processor": processor() if here else "not known", "python": platform.python_version(), **versions}


def collect(params: Params, partial: bool) -> int:
    """Writes results/<scale>/ anew."""
    found = Found(params)
    if found.missing and not partial:
        name, state = next(iter(found.missing.items()))
        more = f" and {len(found.missing) - 1} more" if len(found.missing) > 1 else ""
        raise PipelineError(
            f"{name} ({state}){more}: not made at scale {params.scale}; make everything first (snakemake --profile cluster/local --config "
            f"scale={params.scale}), or collect what is there with --partial"
        )
    if not found.numbers:
        raise PipelineError(f"scale {params.scale}: nothing is done, so there is nothing to collect")
    folder = folder_of(params.scale)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, file in found.files.items():
        shutil.copyfile(file, draft / name)
    index = {
        "format": FORMAT,
        "scale": params.scale,
        "machine": machine(found),
        "commits": sorted({word for record in found.records() for word in commits(record).split(", then ") if word}),
        "files": {name: sha256_file(file) for name, file in sorted(found.files.items())},
        "not_made": sorted(found.missing),
    }
    entries = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in cells.dump(found.numbers, found.seeds))
    head = json.dumps(index, indent=1, ensure_ascii=False).removesuffix("\n}")
    replace_file(draft / INDEX, f'{head},\n "numbers": [\n{entries}\n]\n}}\n'.encode(), durable=False)
    text = json.dumps(found.metrics, indent=1, sort_keys=True)
    replace_file(draft / METRICS, f"{text}\n".encode(), durable=False)
    replace_file(draft / PAGE, page(index, found).encode(), durable=False)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{paths.relative(folder)}: {len(found.files)} tables and figures, {len(found.numbers)} numbers, {size / 2**20:.1f} MB"
    )
    for name in found.left_out:
        print(f"{name}: left out, it is larger than {MOST_BYTES // 2**20} MB")
    for name, state in found.missing.items():
        print(f"{name}: left out ({state})")
    print(f"to commit it: git add {paths.relative(folder)}")
    return 0


def page(index: Mapping[str, Any], found: Found) -> str:
    """What a reader sees first: numbers, figures, tables."""
    made = index["machine"]
    where = ", ".join([made["processor"], f"Python {made['python']}", *(f"{name} {made[name]}" for name in VERSIONS)])
    lines = [
        f"# Results of scale {index['scale']}",
        "",
        *([f"**{note}.**", ""] if (note := found.params.note_of(index["scale"])) else []),
        f"Written by `python -m pipeline results collect`. Measured on: {where}. Every number with its error, samples, seed and run:",
        f"[{INDEX}]({INDEX}). Whether a run of yours agrees: `make check-results SCALE={index['scale']}`.",
        "",
        *([f"Data and features: {'; '.join(data)}.", ""] if (data := measured_on(found.params)) else []),
        "| model | sampler | FID | precision | recall | guidance | NFE |",
        "|---|---|---|---|---|---|---|",
    ]
    for job, groups in found.metrics.items():
        name = job.removeprefix("evaluate-").replace("-", " ")
        for at, values in groups.items():
            measured = [_shown(values, key) for key in ("fid", "precision", "recall")]
            lines.append(
                "| "
                + " | ".join([name, at, *measured, str(values.get("guidance", "")), str(values.get("nfe", ""))])
                + " |"
            )
    for name in sorted(found.files):
        if name.endswith(".png"):
            stem = name.removesuffix(".png")
            lines += ["", f"## {stem.capitalize()}", "", f"![{stem}]({name})"]
    tables = [name for name in sorted(found.files) if not name.endswith(".png")]
    return "\n".join([*lines, "", "## Tables", "", *(f"- [{name}]({name})" for name in tables), ""])


def measured_on(params: Params) -> list[str]:
    """What each slot was measured on, for a number is none without it."""
    from pipeline.tables import FEATURES

    lines = []
    for name, slot in params.active.slots.items():
        side, space = slot.dataset.resolution, slot.evaluation.spaces[0]
        lines.append(f"{name}: {slot.dataset.source}, {side} × {side}, FID in {FEATURES[space]}")
    return lines


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return ""
    error = values.get(f"{key}_se")
    return f"{values[key]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def read_index(scale: str) -> tuple[dict[str, Any], dict[Name, Number]]:
    """The committed results.json, and its numbers."""
    file = folder_of(scale) / INDEX
    name = paths.relative(file)
    if not file.exists():
        raise PipelineError(
            f"{name}: nothing is committed for scale {scale}; write it with: python -m pipeline results collect --scale {scale}"
        )
    index = read_json(file)
    if index is None or index.get("format") != FORMAT:
        raise PipelineError(
            f"{name}: is not what `results collect` of this version writes; restore it with: git checkout {name}"
        )
    try:
        kinds = {"machine": dict, "files": dict, "numbers": list}
        if wrong := [key for key, kind in kinds.items() if not isinstance(index[key], kind)]:
            raise TypeError(f"{wrong[0]} is of another kind")
        return index, cells.parse(index["numbers"])
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"{name}: damaged ({error!r}); restore it with: git checkout {name}") from None


def check(params: Params, sigmas: float, most: int | None) -> int:
    """Compares this run's numbers with the committed ones and says what differs; 1 if one is further away than allowed, or missing."""
    index, old = read_index(params.scale)
    found = Found(params)
    new = found.numbers
    both = [name for name in old if name in new]
    same = {name for name in both if old[name].same(new[name])}
    judged = [name for name in both if old[name].se is not None or new[name].se is not None]
    apart = {name: old[name].apart(new[name]) for name in judged if name not in same}
    beyond = sorted((name for name in apart if not apart[name] <= sigmas), key=lambda name: -apart[name])
    missing = [name for name in old if name not in new]
    unjudged = [name for name in both if name not in same and name not in apart]
    then, now = index["machine"], machine(found)
    print(f"scale {params.scale}: {paths.relative(folder_of(params.scale))} and this run")
    for key in then:
        print(f"  {key}: {then[key]}" + ("" if now.get(key) == then[key] else f", here {now.get(key)}"))
    equal = len(same.intersection(judged))
    print(
        f"{len(judged)} numbers with standard errors: {equal} bitwise equal, {len(apart) - len(beyond)} within {sigmas:g} standard errors "
        f"of the difference, {len(beyond)} beyond"
    )
    print(
        f"{len(both) - len(judged)} numbers without: {len(same) - equal} bitwise equal, {len(unjudged)} not, which is told and not judged"
    )
    _list(
        "beyond",
        [f"{n}: {old[n].text()} committed, {new[n].text()} here: {apart[n]:.1f} standard errors" for n in beyond],
        most,
    )
    _list("not in this run", [str(name) for name in missing], most)
    _list("not judged", [f"{n}: {old[n].text()} committed, {new[n].text()} here" for n in unjudged], most)
    _list("new, not committed", [str(name) for name in new if name not in old], most)
    _list("reports that this run lacks", [f"{name} ({state})" for name, state in found.missing.items()], most)
    changed = [
        name
        for name, digest in index["files"].items()
        if name in found.files and sha256_file(found.files[name]) != digest
    ]
    _list("files with other bytes", changed, most)
    _list("claims with another verdict, which is told and not judged", _verdicts(params.scale, found), most)
    if apart and sigmas == SIGMAS:
        print(f"By chance alone {CHANCE * len(apart):.1f} of {len(apart)} independent numbers would be beyond.")
    if apart and then == now and "not known" not in now.values():
        print(
            "The same processor and versions give the same digits, unless code or parameters changed: compare `commits` in results.json."
        )
    fine = not beyond and not missing
    print("the results agree" if fine else f"the results do not agree: {len(beyond)} beyond, {len(missing)} missing")
    return 0 if fine else 1


def _verdicts(scale: str, found: Found) -> list[str]:
    """Claims about which this run says something else than the committed one."""
    lines = []
    for name, file in found.files.items():
        committed = folder_of(scale) / name
        if file.suffix == ".csv" and committed.exists():
            before, now = cells.verdicts(cells.read_rows(committed)), cells.verdicts(cells.read_rows(file))
            lines += [
                f"{name}: {claim}: {before[claim]} committed, {now[claim]} here"
                for claim in before
                if now.get(claim, before[claim]) != before[claim]
            ]
    return lines


def _list(title: str, lines: Sequence[str], most: int | None) -> None:
    if not lines:
        return
    print(f"{title}:")
    for line in lines[:most]:
        print(f"  {line}")
    if most is not None and len(lines) > most:
        print(f"  and {len(lines) - most} more (--all names them)")
