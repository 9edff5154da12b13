# SPDX-License-Identifier: Apache-2.0
"""What the documents say that the demo gave is what is committed of it, results/demo: by digits, not by word."""

import re
from pathlib import Path

import pytest

from pipeline import registry
from pipeline.cells import read_rows
from pipeline.committed import read_index
from pipeline.params import load
from tests.documents import ROOT, prose

COMMITTED = ROOT / "results/demo"
README, REPORT = ROOT / "README.md", ROOT / "docs/reproduction.md"
WITH_ERROR = re.compile(r"(-?\d+\.(\d+)) ± (\d+\.\d+)")


def cells(document: Path) -> list[list[str]]:
    """The rows of a document's tables."""
    lines = [line for line in prose(document).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("document", [README, REPORT], ids=lambda path: path.name)
def test_numbers_with_errors_are_committed(document: Path) -> None:
    _, numbers = read_index("demo")
    known = [(n.value, n.se) for n in numbers.values() if n.se is not None]
    quoted = WITH_ERROR.findall(prose(document))
    assert len(quoted) > 5
    for value, decimals, error in quoted:
        digits = len(decimals)
        assert any(f"{v:.{digits}f}" == value and f"{se:.{digits}f}" == error for v, se in known), f"{value} ± {error}"


def test_the_table_of_the_readme_is_table_2() -> None:
    committed = {
        (row["method"].rpartition("-")[0].lower(), row["nfe"], row["size"]): f"{row['fid']} ± {row['fid_se']}"
        for row in read_rows(COMMITTED / "table2.csv")
        if row["run"]
    }
    shown = {}
    for name, nfe, *values in [row for row in cells(README) if len(row) == 6 and WITH_ERROR.search(row[2])]:
        for size, value in zip("SM", values[::2], strict=True):
            shown[name.partition(",")[0].lower(), nfe.replace(" × ", "x"), size] = value
    assert {key: value for key, value in shown.items() if key in committed} == committed


def test_the_report_has_every_claim_with_its_verdict() -> None:
    shown = [tuple(row) for row in cells(REPORT)]
    for row in read_rows(COMMITTED / "claims.csv"):
        ours = f"{row['ours']} ± {row['standard_error']}" if row["standard_error"] else row["ours"]
        assert (row["statement"], row["paper"], ours, row["verdict"]) in shown, row["id"]


def test_committed_results_are_of_todays_jobs() -> None:
    """A job that is gone leaves numbers behind that nobody can make again."""
    index, numbers = read_index("demo")
    assert index["not_made"] == []
    jobs = {job.name for job in registry.jobs(load(ROOT / "params.yaml", "demo"))}
    runs = {run for number in numbers.values() for run in number.run.split()}
    assert runs
    assert {run.rpartition("-")[0] for run in runs} <= jobs
