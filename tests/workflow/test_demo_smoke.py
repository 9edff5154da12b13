# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline at scale smoke, as a user runs it: by Snakemake with a kill in the middle, and by DVC undisturbed.

Two copies of the repository are run once, side by side, and every test below looks at them:

- `snakemake`: everything is killed (SIGKILL) in the middle of the training of teacher M, then the same command is given again;
- `dvc`: `dvc repro`, uninterrupted.
"""

import csv
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import pytest
from PIL import Image

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
]
RESULTS = [
    "reports/table2.csv",
    "reports/table2.md",
    "reports/figure2.png",
    "reports/figure3.png",
    "reports/figure3.csv",
    "reports/figure7.png",
    "reports/figure7.csv",
    "reports/evaluations.csv",
]
SNAKEMAKE = ["snakemake", "--profile", "cluster/local", *RESULTS, "--config", "scale=smoke"]
TEACHER = Path("runs/smoke/latent_guided/teacher/M")
WORK = Path("runs/smoke/.work/teacher-latent_guided-M/work")
LIMIT_S = 900  # for one run of the whole pipeline, on two cores shared with the other; four minutes alone


class Copy(NamedTuple):
    """A copy of the repository and the environment its commands run in."""

    path: Path
    env: dict[str, str]

    def start(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Starts a command in the repository, with its output in a file."""
        return subprocess.Popen(command, cwd=self.path, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def run(self, *command: str, timeout: float = 120) -> str:
        """Runs a command, requires success, returns what it printed."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def processes(self) -> list[int]:
        """Every process whose working directory lies in this copy."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    cwd = Path(os.readlink(entry / "cwd"))
                except OSError:  # it has ended
                    continue
                if cwd.is_relative_to(self.path):
                    found.append(int(entry.name))
        return found

    def kill_everything(self) -> None:
        """SIGKILL to every process of this copy, until there is none."""
        deadline = time.monotonic() + 30
        while pids := [pid for pid in self.processes() if not _ended(pid)]:
            assert time.monotonic() < deadline, f"still running: {pids}"
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def use_scale(self, scale: str) -> None:
        """Sets the scale on top of params.yaml."""
        text = (self.path / "params.yaml").read_text()
        changed, count = re.subn(r"^scale: \w+", f"scale: {scale}", text, flags=re.MULTILINE)
        assert count == 1, "params.yaml: expected one line `scale: …`"
        (self.path / "params.yaml").write_text(changed)

    def files(self, folder: Path) -> dict[str, bytes]:
        """The contents of a folder, without the engines' own marks (.snakemake_timestamp)."""
        return {
            p.relative_to(self.path).as_posix(): p.read_bytes()
            for p in sorted((self.path / folder).rglob("*"))
            if p.is_file() and not p.name.startswith(".")
        }

    def times(self) -> dict[str, int]:
        """When each published file was last written."""
        outputs = [p for p in (self.path / "runs/smoke").rglob("*") if p.is_file() and not _is_working_file(p)]
        return {str(p): p.stat().st_mtime_ns for p in [*outputs, *(self.path / name for name in RESULTS)]}


class Runs(NamedTuple):
    """Both copies after their runs, and what the second `snakemake` command printed."""

    snakemake: Copy
    dvc: Copy
    resumed_output: str


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _is_working_file(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts[path.parts.index("smoke") :])


def _finish(process: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    try:
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done in time; last lines:\n{log.read_text()[-3000:]}")
    text = log.read_text()
    assert code == 0, f"ended with {code}; last lines:\n{text[-3000:]}"
    return text


def _kill_in_the_middle_of_teacher_training(copy: Copy, log: Path, deadline: float) -> None:
    with log.open("wb") as file:
        process = copy.start(SNAKEMAKE, file)
        while not any((copy.path / WORK).rglob("latest")):  # the pointer that a checkpoint gets last
            assert process.poll() is None, f"ended before a checkpoint of the teacher:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no checkpoint of the teacher in time:\n{log.read_text()[-3000:]}"
            time.sleep(0.02)
        copy.kill_everything()
        process.wait()
    assert not (copy.path / TEACHER).exists(), (
        "the teacher was published before the kill: smoke trains too briefly for this test"
    )


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
            _kill_in_the_middle_of_teacher_training(snakemake, folder / "killed.log", deadline)
            resumed = _finish(snakemake.start(SNAKEMAKE, resumed_log), folder / "resumed.log", deadline)
            _finish(dvc_process, folder / "dvc.log", deadline)
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


def test_figure2_is_a_picture(runs: Runs) -> None:
    with Image.open(runs.snakemake.path / "reports/figure2.png") as picture:
        picture.load()
        assert min(picture.size) >= 300
        extrema = picture.convert("L").getextrema()
        assert extrema[1] - extrema[0] > 100, "nothing is drawn on it"


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


def test_both_engines_give_byte_identical_tables(runs: Runs) -> None:
    for name in ("reports/table2.csv", "reports/table2.md", "reports/figure7.csv", "reports/evaluations.csv"):
        assert (runs.snakemake.path / name).read_bytes() == (runs.dvc.path / name).read_bytes(), name


def test_a_run_leaves_git_status_clean(runs: Runs) -> None:
    status = runs.snakemake.run("git", "status", "--porcelain").splitlines()
    changed_here = {" M params.yaml", "?? dvc.lock", " M dvc.lock"}  # by the test of `sync` below, when it ran first
    assert [line for line in status if line not in changed_here] == []


def test_a_second_snakemake_runs_nothing(runs: Runs) -> None:
    before = runs.snakemake.times()
    assert "Nothing to be done" in runs.snakemake.run(*SNAKEMAKE, timeout=30)
    assert runs.snakemake.times() == before


def test_after_snakemake_and_sync_dvc_has_nothing_to_do(runs: Runs) -> None:
    runs.snakemake.use_scale("smoke")
    before = runs.snakemake.times()
    runs.snakemake.run("python", "-m", "pipeline", "sync", timeout=180)
    text = runs.snakemake.run("dvc", "repro", timeout=180)
    assert "Running stage" not in text, text
    assert runs.snakemake.times() == before


def test_after_dvc_and_sync_snakemake_has_nothing_to_do(runs: Runs) -> None:
    before = runs.dvc.files(Path("runs/smoke/latent_guided"))
    runs.dvc.run("python", "-m", "pipeline", "sync", timeout=180)
    assert "Nothing to be done" in runs.dvc.run("snakemake", "--profile", "cluster/local", *RESULTS)
    assert runs.dvc.files(Path("runs/smoke/latent_guided")) == before


def test_an_input_made_again_by_hand_and_sync_leave_the_engines_nothing_to_do_below_it(runs: Runs) -> None:
    """What remedies suggest for a damaged input; what is not done, here a missing figure, is left for the engines."""
    before = runs.dvc.files(Path("runs/smoke/latent_guided"))
    runs.dvc.run("python", "-m", "pipeline", "run", "dataset", "scale=smoke", "slot=latent_guided")
    plan = ("snakemake", "--dry-run", "--profile", "cluster/local", *RESULTS)
    assert "rule vae:" in runs.dvc.run(*plan), (
        "Snakemake goes by the folder's date: the rest of this test shows nothing"
    )
    (runs.dvc.path / "reports/figure2.png").unlink()
    told = runs.dvc.run("python", "-m", "pipeline", "sync", timeout=180)
    assert "1 are left to do, first figure2 (to do)" in told
    assert set(re.findall(r"^rule (\w+):", runs.dvc.run(*plan), re.MULTILINE)) == {"figure2"}
    assert re.findall(r"Running stage '(.*)'", runs.dvc.run("dvc", "repro", "--dry")) == ["figure2"]
    assert runs.dvc.files(Path("runs/smoke/latent_guided")) == before
