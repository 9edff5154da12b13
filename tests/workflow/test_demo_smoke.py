# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline at scale smoke, as a user runs it: by Snakemake with a kill in the middle, and by DVC undisturbed.

Two copies of the repository are run once, side by side, and every test below looks at them:

- `snakemake`: everything is killed (SIGKILL) in the middle of the training of teacher M, then the same command is given again;
- `dvc`: `dvc repro`, uninterrupted.

A third copy, made of the first when it is there, is where the commands of the documents are run.
"""

import csv
import json
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.webpage.render import without_records
from tests.documents import DOCUMENTS, blocks, runnable
from tests.pipeline.pages import Page
from tests.workflow.copies import (
    LIMIT_S,
    PAGE,
    RESULTS,
    SNAKEMAKE,
    TABLES,
    TEACHER,
    Copy,
    Runs,
    activate,
    commit,
    finish,
    kill_in_the_middle_of_teacher_training,
    run_block,
)

pytestmark = pytest.mark.slow

COLUMNS = [
    "section",
    "method",
    "size",
    "nfe",
    "fid",
    "fid_se",
    "params",
    "guidance",
    "dataset",
    "features",
    "samples",
    "run",
    "seeds",
    "citation",
]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    copy_repository: Callable[[Path], Path],
    user_env: Callable[[Path], dict[str, str]],
) -> "Runs":
    folder = tmp_path_factory.mktemp("workflow")
    copies = [Copy(path, user_env(path)) for path in (copy_repository(folder / name) for name in ("snakemake", "dvc"))]
    snakemake, dvc = copies
    dvc.env["SCM_TRACKING"] = "off"  # it costs time, and the other copy has it
    dvc.use_scale("smoke")
    deadline = time.monotonic() + LIMIT_S
    try:
        with (folder / "dvc.log").open("wb") as dvc_log, (folder / "resumed.log").open("wb") as resumed_log:
            dvc_process = dvc.start(["dvc", "repro"], dvc_log)
            kill_in_the_middle_of_teacher_training(snakemake, folder / "killed.log", deadline)
            resumed = finish(snakemake.start(SNAKEMAKE, resumed_log), folder / "resumed.log", deadline)
            finish(dvc_process, folder / "dvc.log", deadline)
    finally:
        for copy in copies:
            copy.kill_everything()
    return Runs(snakemake, dvc, resumed)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_table2_has_the_agreed_columns(runs: Runs) -> None:
    header = (runs.snakemake.path / "reports/table2.csv").read_text().splitlines()[0]
    assert header.split(",") == COLUMNS


def test_table2_keeps_every_published_row(runs: Runs) -> None:
    published = _rows(runs.snakemake.path / "reports/paper/table2.csv")
    shown = [row for row in _rows(runs.snakemake.path / "reports/table2.csv") if not row["run"]]
    keys = ("section", "method", "nfe", "fid", "params")
    assert len(published) == 53
    assert [[row[key] for key in keys] for row in shown] == [[row[key] for key in keys] for row in published]


def test_our_rows_are_complete_and_name_where_they_were_measured(runs: Runs) -> None:
    ours = [row for row in _rows(runs.snakemake.path / "reports/table2.csv") if row["run"]]
    assert {(row["method"], row["size"]) for row in ours} >= {(f"{m}-{s}", s) for m in ("sCT", "sCD") for s in "SM"}
    for method in ("sCT", "sCD"):
        for size in "SM":
            assert [row["nfe"] for row in ours if row["method"] == f"{method}-{size}"] == ["1", "2"]
    for row in ours:
        assert float(row["fid"]) > 0, row
        assert float(row["fid_se"]) > 0, row
        assert row["dataset"], row
        assert row["features"], row
        assert int(row["samples"]) > 0, row
        assert re.fullmatch(r"evaluate-latent_guided-[SM]-\w+-[0-9a-f]{8}", row["run"]), row


def test_no_number_of_ours_is_put_beside_the_papers_data(runs: Runs) -> None:
    rows = _rows(runs.snakemake.path / "reports/table2.csv")
    papers = {row["dataset"] for row in rows if not row["run"]}
    assert not papers & {row["dataset"] for row in rows if row["run"]}


def test_table2_markdown_shows_every_row(runs: Runs) -> None:
    text = (runs.snakemake.path / "reports/table2.md").read_text()
    for row in _rows(runs.snakemake.path / "reports/table2.csv"):
        assert any(row["method"] in line and row["fid"] in line for line in text.splitlines()), row
    assert "Teacher: heun, 4 steps" in text


@pytest.mark.parametrize("number", range(1, 14))
def test_figures_are_pictures(runs: Runs, number: int) -> None:
    with Image.open(runs.snakemake.path / f"reports/figure{number}.png") as picture:
        picture.load()
        assert min(picture.size) >= 300
        extrema = picture.convert("L").getextrema()
        assert extrema[1] - extrema[0] > 100, "nothing is drawn on it"
    assert (runs.snakemake.path / f"reports/figure{number}.pdf").read_bytes().startswith(b"%PDF-")


@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_every_published_cell(runs: Runs, name: str) -> None:
    published = _rows(runs.snakemake.path / f"reports/paper/{name}.csv")
    shown = _rows(runs.snakemake.path / f"reports/{name}.csv")
    assert [{key: row[key] for key in cells} for row, cells in zip(shown, published, strict=False)] == published


def test_every_table_has_a_number_of_ours_with_its_run(runs: Runs) -> None:
    for name in ("table1", "table2", "table5", "table6", "table7", "tableE3"):
        rows = [row for row in _rows(runs.snakemake.path / f"reports/{name}.csv") if row["run"]]
        assert rows, name
        for row in rows:
            assert all(row[key] for key in ("dataset", "features", "samples", "seeds")), (name, row)
            assert all(re.fullmatch(r"evaluate-\w+-[SM]-\w+-[0-9a-f]{8}", run) for run in row["run"].split()), row


def test_claims_have_verdicts_and_runs(runs: Runs) -> None:
    rows = _rows(runs.snakemake.path / "reports/claims.csv")
    assert len(rows) >= 15
    assert {row["verdict"] for row in rows} <= {"holds", "does not hold", "not testable at this scale"}
    assert not [row["id"] for row in rows if row["ours"] == "missing"], "smoke has a run for every claim"
    assert [row["id"] for row in rows if not row["runs"]] == ["iteration_cost"]  # a count from params.yaml


def test_one_table_is_made_again_alone(runs: Runs) -> None:
    """What a user does to see a table in another form; nothing upstream is touched."""
    file = runs.snakemake.path / "reports/table5.md"
    before, times = file.read_bytes(), runs.snakemake.times()
    for ending in ("csv", "md", "tex"):
        file.with_suffix(f".{ending}").unlink()
    said = runs.snakemake.run(*SNAKEMAKE, "--", "reports/table5.md")
    assert set(re.findall(r"^(?:local)?rule (\w+):", said, re.MULTILINE)) == {"table5"}
    assert file.read_bytes() == before
    changed = {name for name, time_ in runs.snakemake.times().items() if time_ != times[name]}
    assert changed == {str(file.with_suffix(f".{ending}")) for ending in ("csv", "md", "tex")}


def test_trace_prints_the_chain_behind_a_row(runs: Runs) -> None:
    text = runs.snakemake.run("python", "-m", "pipeline", "trace", "reports/table2.csv", "sCD-M")
    for stage in (
        "evaluate-latent_guided-M-scd",
        "student-latent_guided-M-scd",
        "teacher-latent_guided-M",
        "latents",
        "vae",
        "dataset",
    ):
        assert stage in text, f"{stage} is not in:\n{text}"
    commit = runs.snakemake.run("git", "rev-parse", "--short=7", "HEAD").strip()
    assert commit in text, f"the commit {commit} is not in:\n{text}"


def test_samples_of_a_trained_model(runs: Runs) -> None:
    name, folder = "student-latent_guided-M-scd", "runs/smoke/latent_guided/student/M/scd"
    for run, picture in ((name, "a.png"), (folder, "b.png")):
        runs.snakemake.run("python", "-m", "pipeline", "sample", run, "-o", picture, "--scale", "smoke", "--rows", "2")
    a, b = (Image.open(runs.snakemake.path / name) for name in ("a.png", "b.png"))
    assert a.size == (2 * (10 * 33 - 1), 2 * (2 * 33 - 1))  # 10 labels, 2 rows of 32 × 32 pixels, twice as large
    assert a.tobytes() == b.tobytes()
    for picture in ("a.png", "b.png"):
        (runs.snakemake.path / picture).unlink()  # git status stays clean


def test_training_resumed_from_its_checkpoint(runs: Runs) -> None:
    logs = [p.read_text() for p in (runs.snakemake.path / "runs/smoke/.logs").glob("teacher-latent_guided-M*")]
    assert re.search(r"resum", "".join(logs) + runs.resumed_output, re.IGNORECASE), "nothing says that it resumed"


def test_killed_and_undisturbed_training_give_the_same_bytes(runs: Runs) -> None:
    interrupted, undisturbed = (copy.files(TEACHER) for copy in (runs.snakemake, runs.dvc))
    assert any(name.endswith(".safetensors") for name in undisturbed)
    assert interrupted.keys() == undisturbed.keys()
    assert [name for name in undisturbed if interrupted[name] != undisturbed[name]] == []


def test_both_engines_give_byte_identical_reports(runs: Runs) -> None:
    for name in RESULTS:
        if name == PAGE:  # records differ: see the test of the page
            continue
        assert (runs.snakemake.path / name).read_bytes() == (runs.dvc.path / name).read_bytes(), name


def test_the_run_of_one_engine_agrees_with_the_collected_results_of_the_other(runs: Runs) -> None:
    """Digit by digit: the machine is the same."""
    collected, place = (copy.path / "results/smoke" for copy in (runs.snakemake, runs.dvc))
    try:
        runs.snakemake.run("python", "-m", "pipeline", "results", "collect", "--scale", "smoke", "--partial")
        shutil.copytree(collected, place)
        text = runs.dvc.run("python", "-m", "pipeline", "results", "check", "--scale", "smoke")
    finally:
        for folder in (collected, place):
            shutil.rmtree(folder, ignore_errors=True)
    found = re.search(r"(\d+) numbers with standard errors: (\d+) bitwise equal, 0 within", text)
    assert found, text
    assert found[1] == found[2]
    assert int(found[1]) > 100


def test_trainings_leave_their_curves(runs: Runs) -> None:
    """By images seen, without the times that differ between two runs of the same."""
    for folder in ("vae", "features", "teacher/S", "student/M/scd"):
        rows = _rows(runs.dvc.path / "runs/smoke/latent_guided" / folder / "training.csv")
        assert [int(row["nimg"]) for row in rows] == sorted({int(row["nimg"]) for row in rows}), folder
        assert all(float(row["loss"]) == float(row["loss"]) for row in rows), folder
        assert not {"time", "images_per_second"} & set(rows[0]), folder


def test_both_engines_make_the_same_page_but_for_what_is_recorded(runs: Runs) -> None:
    pages = [(copy.path / PAGE).read_text() for copy in (runs.snakemake, runs.dvc)]
    commit = runs.snakemake.run("git", "rev-parse", "HEAD").strip()
    assert commit in pages[0]
    assert pages[0] != pages[1]
    first, second = map(without_records, pages)
    assert commit not in first
    assert first == second
    assert Page(pages[0]).errors == []
    assert max(len(page) for page in pages) < 15_000_000


def test_the_page_has_every_students_samples_over_steps_and_guidance(runs: Runs) -> None:
    slots = {
        file.parents[1].name: file.parent for file in (runs.snakemake.path / "runs/smoke").glob("*/gallery/grids.json")
    }
    every = {slot: json.loads((folder / "grids.json").read_text())["grids"] for slot, folder in slots.items()}
    assert every.keys() == {"latent_guided", "pixel_uncond", "pixel_cond"}
    folder, grids = slots["latent_guided"], every["latent_guided"]
    for size in "SM":
        own = [grid for grid in grids if (grid["size"], grid["method"]) == (size, "scd")]
        assert {(grid["steps"], grid["guidance"]) for grid in own} == {(n, s) for n in (1, 2) for s in (1.0, 1.5)}
        assert {
            (grid["steps"], grid["guidance"]) for grid in grids if (grid["size"], grid["method"]) == (size, "sct")
        } == {
            (1, None),
            (2, None),
        }
        pictures = {(folder / grid["file"]).read_bytes() for grid in own}
        assert len(pictures) == len(own), "two of them are the same"
    shown = Page((runs.snakemake.path / PAGE).read_text()).all("img")
    assert sum(image["alt"].startswith("Grid of samples") for image in shown) == sum(map(len, every.values()))


def test_a_run_leaves_git_status_clean(runs: Runs) -> None:
    status = runs.snakemake.run("git", "status", "--porcelain").splitlines()
    changed_here = {
        " M params.yaml",
        " M dvc.yaml",
        "?? dvc.lock",
        " M dvc.lock",
    }  # by the test of `sync` below, when it ran first
    assert [line for line in status if line not in changed_here] == []


def test_a_second_snakemake_runs_nothing(runs: Runs) -> None:
    before = runs.snakemake.times()
    assert "Nothing to be done" in runs.snakemake.run(*SNAKEMAKE)
    assert runs.snakemake.times() == before


def test_after_snakemake_and_sync_dvc_has_nothing_to_do(runs: Runs) -> None:
    runs.snakemake.use_scale("smoke")
    before = runs.snakemake.times()
    runs.snakemake.run("python", "-m", "pipeline", "sync")
    text = runs.snakemake.run("dvc", "repro")
    assert "Running stage" not in text, text
    assert runs.snakemake.times() == before


def test_after_dvc_and_sync_snakemake_has_nothing_to_do(runs: Runs) -> None:
    before = runs.dvc.files(Path("runs/smoke/latent_guided"))
    runs.dvc.run("python", "-m", "pipeline", "sync")
    assert "Nothing to be done" in runs.dvc.run("snakemake", "--profile", "cluster/local")
    assert runs.dvc.files(Path("runs/smoke/latent_guided")) == before


def test_an_input_made_again_by_hand_and_sync_leave_the_engines_nothing_to_do_below_it(runs: Runs) -> None:
    """What remedies suggest for a damaged input; what is not done, here a missing figure, is left for the engines."""
    before = runs.dvc.files(Path("runs/smoke/latent_guided"))
    runs.dvc.run("python", "-m", "pipeline", "run", "dataset", "scale=smoke", "slot=latent_guided")
    plan = ("snakemake", "--dry-run", "--profile", "cluster/local")
    assert "rule vae:" in runs.dvc.run(*plan), (
        "Snakemake goes by the folder's date: the rest of this test shows nothing"
    )
    (runs.dvc.path / "reports/figure2.png").unlink()
    told = runs.dvc.run("python", "-m", "pipeline", "sync")
    assert "2 are left to do, first figure2 (to do)" in told  # and the page, which shows it
    assert set(re.findall(r"^rule (\w+):", runs.dvc.run(*plan), re.MULTILINE)) == {"figure2", "report", "all"}
    # Without a target, DVC's rehearsal ends at the page: it has not made the figure that the page shows.
    assert re.findall(r"Running stage '(.*)'", runs.dvc.run("dvc", "repro", "--dry", "figure2")) == ["figure2"]
    assert runs.dvc.files(Path("runs/smoke/latent_guided")) == before


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if runnable(path)], ids=lambda path: path.relative_to(path.parents[1]).name
)
def test_commands_of_the_documents_work(
    document: Path, runs: Runs, tmp_path: Path, user_env: Callable[[Path], dict[str, str]]
) -> None:
    """From top to bottom, at scale smoke, where the pipeline has run; what is not run says why (tests/documents.py)."""
    path = tmp_path / "repository"
    shutil.copytree(runs.snakemake.path, path, symlinks=True)
    copy = Copy(path, user_env(path))
    activate(copy)
    copy.run("git", "checkout", "--quiet", "params.yaml")
    copy.use_scale("smoke")
    commit(copy, "Scale smoke")
    for block in runnable(document):
        run_block(copy, block)


def test_mlflows_interface_opens_as_the_documents_say(runs: Runs) -> None:
    lines = {
        line.strip()
        for document in DOCUMENTS
        for block in blocks(document)
        for line in block.text.splitlines()
        if line.startswith("mlflow ui")
    }
    (line,) = lines
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = runs.snakemake.path.parent / "mlflow.log"
    with log.open("wb") as file:
        server = runs.snakemake.start([*line.split(), "--port", str(port)], file)
    deadline = time.monotonic() + 120
    try:
        while True:
            assert server.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert b"<html" in answer.read().lower()
                    break
            except OSError:  # not there yet, or slow to answer
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
    finally:
        runs.snakemake.kill_everything()
        server.wait()
