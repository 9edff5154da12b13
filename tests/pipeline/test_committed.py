# SPDX-License-Identifier: Apache-2.0
"""Results that are committed, and a fresh run beside them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.committed import measured_on
from pipeline.params import load

# A table of two numbers, one of which grows by a standard error for each step of `value`; the first row is published.
REPORT = """
def run(ctx):
    fid = 1 + ctx.scale.value
    run = ctx.input_runs["second"]
    rows = ["published,2.0,,", f"ours,{fid},1.0,{run}", f"other,5.0,1.0,{run}"]
    if ctx.scale.value == 100:
        del rows[2]
    (ctx.out / "table.csv").write_text("\\n".join(["method,fid,fid_se,run", *rows]) + "\\n")
    (ctx.out / "table.md").write_text(str(fid))
"""
METRICS = """
import json
def run(ctx):
    (ctx.out / "size.txt").write_text("1")
    (ctx.out / "metrics.json").write_text(json.dumps({"2-step": {"fid": 0.5, "fid_se": 0.1, "guidance": 1.2}}))
"""
Results = Callable[..., Any]


@pytest.fixture
def made(repo: Any) -> Any:
    """A repository in which a table was made."""
    (repo.root / "pipeline/stages/report.py").write_text(REPORT)
    (repo.root / "pipeline/stages/second.py").write_text(METRICS)
    make(repo, 1)
    return repo


def make(repo: Any, value: int) -> None:
    """Makes everything that the table needs, with another parameter."""
    file = repo.root / "params.yaml"
    file.write_text(f"scale: tiny\nscales:\n  tiny: {{seed: 7, value: {value}}}\n")
    for stage in ("first", "second", "report"):
        done = repo.run(stage)
        assert done.code == 0, done.err


def results(repo: Any, *words: str) -> Any:
    """`python -m pipeline results WORDS`."""
    command = [sys.executable, "-m", "pipeline", "results", *words]
    return subprocess.run(command, cwd=repo.root, env=repo.env, capture_output=True, text=True, timeout=60, check=False)


def test_an_unchanged_run_agrees_digit_by_digit(made: Any) -> None:
    done = results(made, "collect")
    assert (done.returncode, done.stderr) == (0, "")
    assert "results/tiny: 2 tables and figures, 3 numbers" in done.stdout
    folder = made.root / "results/tiny"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "results.json",
        "metrics.json",
        "table.csv",
        "table.md",
    }
    index = json.loads((folder / "results.json").read_text())
    entry = next(entry for entry in index["numbers"] if entry["row"] == {"method": "ours"})
    run = json.loads((made.root / "runs/tiny/second/manifest.json").read_text())["run"]
    assert (entry["value"], entry["se"], entry["seed"], entry["run"]) == (2.0, 1.0, "7", run)
    page = (folder / "README.md").read_text()
    assert "| second | 2-step | 0.500 ± 0.100 |" in page
    assert page.startswith("# Results of scale tiny\n\n**Scale tiny: of fakes.**\n")
    same = results(made, "check")
    assert (same.returncode, same.stderr) == (0, "")
    assert (
        "3 numbers with standard errors: 3 bitwise equal, 0 within 3 standard errors of the difference, 0 beyond"
        in same.stdout
    )
    assert same.stdout.endswith("the results agree\n")


def test_the_page_says_what_was_measured_on_what() -> None:
    """A FID in the features of a small classifier is not one in Inception's."""
    root = Path(__file__).resolve().parents[2]
    smoke, paper = (measured_on(load(root / "params.yaml", scale)) for scale in ("smoke", "paper"))
    assert smoke[0] == "latent_guided: mnist5k, 32 × 32, FID in the features of a small classifier, not in Inception's"
    assert "pixel_uncond: cifar10, 32 × 32, FID in Inception's features" in paper


def test_what_lies_within_the_errors_agrees_and_what_does_not_is_named(made: Any) -> None:
    """Two numbers with an error of 1 each: 4 apart are 2.8 standard errors of the difference, 5 apart 3.5."""
    assert results(made, "collect").returncode == 0
    make(made, 5)
    near = results(made, "check")
    assert near.returncode == 0, near.stdout
    assert "2 bitwise equal, 1 within 3 standard errors of the difference, 0 beyond" in near.stdout
    assert "files with other bytes:\n  table.csv\n  table.md" in near.stdout
    assert results(made, "check", "--sigmas", "2").returncode == 1
    make(made, 6)
    far = results(made, "check")
    assert far.returncode == 1
    assert "  table.csv: ours: fid: 2 ± 1 committed, 7 ± 1 here: 3.5 standard errors\n" in far.stdout
    assert far.stdout.endswith("the results do not agree: 1 beyond, 0 missing\n")


def test_what_is_missing_is_named(made: Any) -> None:
    assert results(made, "collect").returncode == 0
    make(made, 100)
    done = results(made, "check", "--sigmas", "1000")
    assert done.returncode == 1
    assert "not in this run:\n  table.csv: other: fid\n" in done.stdout
    (made.root / "reports/table.csv").unlink()
    gone = results(made, "check")
    assert gone.returncode == 1
    assert "reports that this run lacks:\n  report (to do)\n" in gone.stdout
    assert gone.stdout.endswith("0 beyond, 2 missing\n")


def test_a_claim_that_is_judged_otherwise_is_told(made: Any) -> None:
    """A verdict has no error: the number behind it decides whether the results agree."""
    claims = """
def run(ctx):
    verdict = "holds" if ctx.scale.value < 3 else "does not hold"
    run = ctx.input_runs["second"]
    rows = [f"gap,{ctx.scale.value},10.0,{verdict},{run}", f"other,5.0,1.0,holds,{run}"]
    (ctx.out / "table.csv").write_text("\\n".join(["id,ours,standard_error,verdict,runs", *rows]) + "\\n")
    (ctx.out / "table.md").write_text("claims")
"""
    (made.root / "pipeline/stages/report.py").write_text(claims)
    make(made, 1)
    assert results(made, "collect").returncode == 0
    assert "another verdict" not in results(made, "check").stdout
    make(made, 3)
    done = results(made, "check")
    assert done.returncode == 0, done.stdout
    said = "claims with another verdict, which is told and not judged:\n  table.csv: gap: holds committed, does not hold here\n"
    assert said in done.stdout


def test_only_what_is_done_is_collected(made: Any) -> None:
    (made.root / "reports/table.md").write_text("by hand")
    refused = results(made, "collect")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: report (changed): not made at scale tiny; make everything first")
    assert not (made.root / "results").exists()
    done = results(made, "collect", "--partial")
    assert done.returncode == 0
    assert "report: left out (changed)" in done.stdout
    assert json.loads((made.root / "results/tiny/results.json").read_text())["not_made"] == ["report"]


def test_collecting_again_replaces_what_was_there(made: Any) -> None:
    assert results(made, "collect").returncode == 0
    before = {file.name: file.read_bytes() for file in (made.root / "results/tiny").iterdir()}
    (made.root / "results/tiny/old.png").write_text("of a figure that is no more")
    assert results(made, "collect").returncode == 0
    assert {file.name: file.read_bytes() for file in (made.root / "results/tiny").iterdir()} == before


def test_faults_in_one_sentence(made: Any) -> None:
    remedy = "write it with: python -m pipeline results collect --scale tiny\n"
    nothing = f"error: results/tiny/results.json: nothing is committed for scale tiny; {remedy}"
    assert results(made, "check").stderr == nothing
    assert (
        results(made, "check", "--sigmas", "0").stderr == "error: results check: --sigmas 0: must be > 0 and finite\n"
    )
    assert (
        "results collect: --sigmas: is an option of `results check`" in results(made, "collect", "--sigmas", "2").stderr
    )
    assert "results check: --partial: is an option of `results collect`" in results(made, "check", "--partial").stderr
    assert results(made, "collect").returncode == 0
    file = made.root / "results/tiny/results.json"
    text = file.read_text()
    for damaged, words in (
        (text.replace('"column"', '"colum"'), "damaged (KeyError('column'))"),
        (text.replace('"format": 1', '"format": 2'), "is not what `results collect` of this version writes"),
        (text.replace('"machine"', '"machines"'), "damaged (KeyError('machine'))"),
        (text.replace('"files": {', '"files": [], "others": {'), "damaged (TypeError('files is of another kind'))"),
        (text[:100], "is not what `results collect` of this version writes"),
    ):
        file.write_text(damaged)
        done = results(made, "check")
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
