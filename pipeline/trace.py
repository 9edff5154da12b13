# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline trace reports/table2.csv ROW`: the chain of runs, commits and digests behind a row of a table.

ROW is the number of a row (the first one below the header is 1), a run id, or a method such as sCD-M. Rows of a report that names no runs
(settings, the toy's numbers) come from the run that wrote it.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import manifest, paths, registry
from pipeline.cells import read_rows
from pipeline.cli import Parser
from pipeline.errors import PipelineError, suggestion
from pipeline.files import read_json, sha256_file
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, load

Cells = Mapping[str, str]
MISSING = "missing"  # as pipeline.writing has it, which needs pandas
PUBLISHED = Path("reports", "paper")
MAIN_FILES = 6  # files listed for each run; all of them are in its manifest


def main(argv: Sequence[str]) -> int:
    """Prints the chain of runs behind a row."""
    parser = Parser(prog="python -m pipeline trace", description=__doc__)
    parser.add_argument("table", metavar="TABLE", type=Path, help="such as reports/table2.csv")
    parser.add_argument("row", metavar="ROW", help="a row's number (from 1), a run id, or a method such as sCD-M")
    options = parser.parse_args(list(argv))
    rows = read_table(options.table)
    made = manifests()
    shown: set[str] = set()
    for number in choose(rows, options.row, options.table):
        cells = rows[number - 1]
        print(f"{options.table}, row {number}: " + ", ".join(f"{key} {value}" for key, value in cells.items() if value))
        runs = runs_of(options.table, cells, made)
        if not runs:
            print(f"  {unmade(options.table, cells)}; nothing here was run for it")
        for run in runs:
            if run not in made:
                raise PipelineError(
                    f"{options.table}: row {number}: run {run} is not in runs/; was the table made elsewhere? "
                    "`dvc pull` brings its outputs, or make it again"
                )
            if run in shown:
                print("  the same run as above")
            else:
                show(run, made, "  ", "", shown)
    return 0


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV table."""
    try:
        rows = read_rows(file)
    except FileNotFoundError:
        raise PipelineError(f"{file}: no such table; make it with: snakemake --profile cluster/local") from None
    except (UnicodeDecodeError, csv.Error, IsADirectoryError):
        raise PipelineError(f"{file}: is not a CSV table") from None
    if not rows:
        raise PipelineError(f"{file}: has no rows")
    return rows


def runs_of(table: Path, cells: Cells, made: Mapping[str, tuple[Job, dict[str, Any]]]) -> list[str]:
    """The runs behind a row: those that it names (several of repeated trainings, and of a claim), or the one that wrote the file."""
    if "run" in cells or "runs" in cells:
        return (cells.get("run") or cells.get("runs") or "").split()
    if table.resolve().parent == paths.root() / PUBLISHED:
        return []
    digest = sha256_file(table)
    for run, (job, entry) in made.items():
        if job.is_report and entry["files"].get(table.name, {}).get("sha256") == digest:
            return [run]
    raise PipelineError(
        f"{table}: has no column run or runs, and no run here has written it; give a table in reports/, or make it again"
    )


def choose(rows: Sequence[Cells], word: str, file: Path) -> list[int]:
    """The numbers (from 1) of the rows that ROW means."""
    if word.isdecimal():
        if not 1 <= int(word) <= len(rows):
            raise PipelineError(f"{file}: there is no row {word}; it has rows 1 to {len(rows)}")
        return [int(word)]
    # Our own rows come before published ones of the same name; those are found by their number, too.
    for names in (
        lambda cells: cells.get("run", ""),
        lambda cells: cells.get("method", "") if cells.get("run") else "",
        lambda cells: cells.get("method") or cells.get("id", ""),
    ):
        found = [number for number, cells in enumerate(rows, 1) if names(cells).lower() == word.lower()]
        if found:
            return found
    known = sorted({cells.get(key, "") for cells in rows for key in ("run", "method", "id")} - {""})
    raise PipelineError(f"{file}: no row is called {word}; {suggestion(word, known, 'rows')}")


def unmade(table: Path, cells: Cells) -> str:
    """Why a row has no run: it was published, or not run, or stands in the parameters, or was counted from them."""
    if MISSING in cells.values():
        return f"{MISSING}: not run at this scale"
    if cells.get("section", "").startswith("Ours"):
        return "a setting of params.yaml, not a run"
    return "a count, not a run" if "verdict" in cells else f"a published number: {citation(table, cells)}"


def citation(table: Path, cells: Cells) -> str:
    """Where a published number comes from: the citation in reports/paper/, which has the table's rows."""
    published = paths.root() / PUBLISHED / table.name
    if published.exists():
        for row in read_table(published):
            same = all(row.get(key) == cells.get(key) for key in ("section", "method", "nfe") if key in row)
            if same and row.get("citation"):
                return f"{row['citation']}, as quoted in Lu & Song 2024 (arXiv:2410.11081), {table.stem}"
    return f"Lu & Song 2024 (arXiv:2410.11081), {table.stem}"


def manifests() -> dict[str, tuple[Job, dict[str, Any]]]:
    """Every published run of every scale: run id -> its job and manifest."""
    params = load(paths.root() / PARAMS_FILE)
    found = {}
    for scale in params.scales:
        for job in registry.jobs(load(paths.root() / PARAMS_FILE, scale)):
            made = manifest.read(manifest.path_of(job))
            if made is not None:
                found[made["run"]] = (job, made)
    return found


def commits(record: Mapping[str, Any]) -> str:
    """The commits that a run was made with, in the order of its attempts; '' where none was recorded."""
    made_with = record.get("attempts") if isinstance(record.get("attempts"), list) else [record.get("git") or {}]
    words = [
        f"{code['commit']}{' + uncommitted changes' if code.get('dirty') else ''}"
        for code in made_with or []
        if code.get("commit")
    ]
    return ", then ".join(dict.fromkeys(words))


def show(run: str, made: Mapping[str, tuple[Job, dict[str, Any]]], indent: str, name: str, shown: set[str]) -> None:
    """Prints a run and, indented below it, the runs that made its inputs; each run's details once."""
    head = f"{indent}{name}: {run}" if name else f"{indent}{run}"
    if run in shown:
        print(f"{head} (see above)")
        return
    shown.add(run)
    if run not in made:
        print(f"{head} (no longer in runs/: it was made again since, or deleted)")
        return
    job, entry = made[run]
    record = read_json(paths.record_file(job)) or {}
    if record.get("run") != run:
        record = {}
    digest = manifest.digest(manifest.path_of(job))
    print(head)
    rest = f"{indent}    "
    print(f"{rest}stage {entry['stage']}, scale {entry['scale']}, fingerprint {entry['fingerprint'][:16]}")
    unknown = "not recorded here"
    print(f"{rest}commit {commits(record) or unknown}, MLflow run {record.get('mlflow_run') or unknown}")
    print(f"{rest}output {job.outputs[0].as_posix()}, manifest SHA-256 {digest[:16]}")
    # The largest files are what matters: weights and data.
    files = sorted(entry["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
    for file, facts in files[:MAIN_FILES]:
        print(f"{rest}  {file}  {facts['bytes']} bytes, SHA-256 {facts['sha256'][:16]}")
    if len(files) > MAIN_FILES:
        print(f"{rest}  and {len(files) - MAIN_FILES} smaller files")
    for key, source in entry["inputs"].items():
        if source["run"] is None:
            print(f"{rest}{key}: file {source['path']}, SHA-256 {source['digest'][:16]}")
        else:
            show(source["run"], made, rest, key, shown)
