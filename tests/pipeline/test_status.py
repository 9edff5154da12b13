# SPDX-License-Identifier: Apache-2.0
"""What people look at: status, watch, trace, doctor."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.progress import Progress, clock, describe
from pipeline.trace import unmade
from tests.pipeline.plain import plain_text


def command(repo: Any, *words: str, timeout: float = 60, **env: str) -> Any:
    """`python -m pipeline WORDS`."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        cwd=repo.root,
        env={**repo.env, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def rows(output: str) -> dict[str, str]:
    """Job name to state, of a status table."""
    return dict(re.findall(r"^(\w+) +(done|running|queued|waiting|failed|stale)\b", output, re.M))


def test_progress_counts_and_estimates(tmp_path: Path) -> None:
    now = [100.0]
    progress = Progress(100, "it", tmp_path / "progress.json", show=False, now=lambda: now[0])
    for done in range(1, 41):
        now[0] += 0.5
        progress.update(done, loss=1.0)
    state = json.loads((tmp_path / "progress.json").read_text())
    assert abs(state["rate"] - 2.0) < 0.1
    assert abs(state["eta_s"] - 30) < 2
    assert set(state) == {"done", "total", "unit", "rate", "eta_s", "scalars", "updated", "started_at"}
    assert describe("job", state).startswith("job: 40/100 it, 2 it/s, ETA 0:30, loss 1")


def test_progress_of_a_resumed_job_does_not_count_what_was_there(tmp_path: Path) -> None:
    now = [100.0]
    progress = Progress(1000, "it", tmp_path / "progress.json", show=False, now=lambda: now[0])
    now[0] += 5  # until the checkpoint is loaded
    progress.start(900)
    assert progress.rate is None
    now[0] += 10  # the first word after it comes with the next log line, not at once
    progress.update(910)
    assert progress.rate == pytest.approx(1.0)
    assert progress.eta_s == pytest.approx(90)
    assert json.loads((tmp_path / "progress.json").read_text())["eta_s"] == pytest.approx(90)


def test_clock() -> None:
    assert [clock(s) for s in (None, 0, 45, 727, 12000)] == ["?", "0:00", "0:45", "12:07", "3:20:00"]


def test_status(repo: Any) -> None:
    repo.run("first")
    repo.run("broken")
    sleeper = repo.start("sleeper", "local")
    repo.wait_for(lambda: (repo.work / "sleeper/progress.json").exists())
    time.sleep(1.2)
    started = time.monotonic()
    shown = command(repo, "status")
    passed = time.monotonic() - started
    os.kill(repo.pid("sleeper"), signal.SIGKILL)
    sleeper.wait(timeout=20)
    assert shown.stderr == ""
    assert shown.returncode == 1
    states = rows(shown.stdout)
    assert states["first"] == "done"
    assert states["second"] == "waiting"
    assert states["broken"] == "failed"
    assert "KeyError: 'missing thing'" in shown.stdout
    assert states["sleeper"] == "running"
    assert re.search(r"sleeper +running +\d+/600 s, .*ETA", shown.stdout)
    assert "scale tiny: 9 jobs: 1 done, 1 running, 6 waiting, 1 failed" in shown.stdout
    assert re.search(r"about .* left on \d+ core", shown.stdout)
    assert passed < 3, f"status took {passed:.1f} s"
    assert "died without a word" in command(repo, "status").stdout
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("value: 1", "value: 4"))
    assert rows(command(repo, "status").stdout)["first"] == "stale"


def test_status_imports_nothing_heavy(repo: Any) -> None:
    done = repo.python(
        "import sys; from pipeline import status; status.main([]);"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'numpy', 'submitit') if m in sys.modules])"
    )
    assert done.out.strip().endswith("[]")


ENGINE = """
import subprocess, sys
codes = [subprocess.run([sys.executable, "driver.py", stage, "local"]).returncode for stage in sys.argv[1:]]
print("engine chatter")
sys.exit(max(codes))
"""


def test_watch_prints_plain_lines(repo: Any) -> None:
    (repo.root / "engine.py").write_text(ENGINE)
    done = command(repo, "watch", "--", sys.executable, "engine.py", "first", "second")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"first: done, took \d+ s \(1 of 9\)", done.stdout)
    assert re.search(r"second: done, took \d+ s \(2 of 9\)", done.stdout)
    assert "chatter" not in done.stdout
    assert "chatter" in next(repo.root.glob("runs/.logs/python*.log")).read_text()


def test_watch_passes_warnings_on(repo: Any) -> None:
    """Those about checkpoints that were set aside, or that other code has made: the engine's log is read by few."""
    assert repo.run("broken").code == 1
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("value: 1", "value: 4"))
    (repo.root / "engine.py").write_text(ENGINE)
    done = command(repo, "watch", "--", sys.executable, "engine.py", "broken")
    assert done.stderr.count("warning: what broken had was made with other parameters") == 1


def test_watch_says_what_failed(repo: Any) -> None:
    (repo.root / "engine.py").write_text(ENGINE)
    done = command(repo, "watch", "--", sys.executable, "engine.py", "broken")
    assert done.returncode == 1
    assert "error: broken: failed: KeyError: 'missing thing'" in done.stderr
    assert "its log: runs/.logs/python" in done.stderr
    missing = command(repo, "watch", "--", "no-such-engine")
    assert "no-such-engine: no such command" in missing.stderr


def test_watch_draws_bars_in_a_terminal_and_passes_ctrl_c_on(repo: Any) -> None:
    (repo.root / "engine.py").write_text(ENGINE)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "watch", "--", sys.executable, "engine.py", "sleeper"],
        cwd=repo.root,
        env={**repo.env, "TERM": "xterm", "COLUMNS": "160"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    repo.started.append(process)
    job = repo.pid("sleeper")
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    text = b""
    while True:
        try:
            text += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert process.wait(timeout=20) != 0
    assert b"sleeper" in text
    assert b"everything" in text
    assert re.search(rb"\d+/600 s", text)
    repo.wait_for(lambda: not Path(f"/proc/{job}").exists(), 15)


def test_trace(repo: Any) -> None:
    for stage in ("first", "second", "report"):
        assert repo.run(stage).code == 0
    done = command(repo, "trace", "reports/table.csv", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    run = json.loads((repo.root / "runs/tiny/second/manifest.json").read_text())["run"]
    above = json.loads((repo.root / "runs/tiny/first/manifest.json").read_text())["run"]
    assert lines[1] == f"  {run}"
    assert any(line == f"      first: {above}" for line in lines)
    assert "data.bin  256 bytes, SHA-256" in done.stdout
    assert command(repo, "trace", "reports/table.csv", run).stdout == done.stdout
    for words, expected in (
        (("reports/table.csv", "7"), "there is no row 7; it has rows 1 to 1"),
        (("reports/table.csv", "sCD-M"), "no row is called sCD-M"),
        (("reports/none.csv", "1"), "no such table"),
        (("reports/table.csv", "²"), "no row is called ²"),
        (
            ("pipeline/registry.py", "1"),
            "pipeline/registry.py: has no column run or runs, and no run here has written it",
        ),
    ):
        bad = command(repo, "trace", *words)
        assert bad.returncode == 2
        assert expected in bad.stderr


def test_trace_of_a_published_number(repo: Any) -> None:
    folder = repo.root / "reports" / "paper"
    folder.mkdir(parents=True)
    (folder / "table2.csv").write_text("section,method,citation,nfe,fid\nX,ADM-G,Dhariwal & Nichol 2021,250x2,7.72\n")
    (repo.root / "reports" / "table2.csv").write_text("section,method,nfe,fid,run\nX,ADM-G,250x2,7.72,\n")
    done = command(repo, "trace", "reports/table2.csv", "ADM-G")
    assert done.returncode == 0
    assert "a published number: Dhariwal & Nichol 2021" in done.stdout


def test_trace_of_a_report_that_names_no_runs(repo: Any) -> None:
    """Its numbers are ours, not published ones: they come from the run that wrote it, as it is now."""
    (repo.root / "pipeline/stages/report.py").write_text(
        "def run(ctx):\n    (ctx.out / 'table.csv').write_text('t,value\\n0.5,1.0\\n')\n    (ctx.out / 'table.md').write_text('x')\n"
    )
    for stage in ("first", "second", "report"):
        assert repo.run(stage).code == 0
    done = command(repo, "trace", "reports/table.csv", "1")
    assert done.returncode == 0, done.stderr
    assert re.match(r"reports/table.csv, row 1: t 0.5, value 1.0\n  report-[0-9a-f]{8}\n", done.stdout)
    assert "second: second-" in done.stdout
    file = repo.root / "reports/table.csv"
    file.write_text(file.read_text().replace("1.0", "2.0"))
    other = command(repo, "trace", "reports/table.csv", "1")
    assert other.returncode == 2
    assert "no run here has written it" in other.stderr


def test_doctor(repo: Any) -> None:
    (repo.root / "pyproject.toml").write_text('[project]\ndependencies = ["pydantic==0.1", "no-such-package==1.0"]\n')
    done = command(repo, "doctor", "--quick")
    assert done.returncode == 1
    assert re.search(r"missing +pydantic: .*pinned is 0.1\n +→ make setup", done.stdout)
    assert re.search(r"missing +no-such-package: not installed", done.stdout)
    assert re.search(r"ok +parameters", done.stdout)
    assert "Traceback" not in done.stdout + done.stderr


def test_doctor_reads_the_commit(repo: Any) -> None:
    assert re.search(r"optional +git commit: not a git checkout", command(repo, "doctor", "--quick").stdout)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@x.invalid", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *words], cwd=repo.root, check=True)
    assert re.search(r"ok +git commit: [0-9a-f]{10}\n", command(repo, "doctor", "--quick").stdout)
    others = command(repo, "doctor", "--quick", GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert others.returncode == 1
    assert re.search(r"missing +git commit: git rev-parse HEAD: .*dubious ownership", others.stdout)
    assert f"git config --global --add safe.directory {repo.root}" in others.stdout


def test_doctor_names_the_weights_that_the_scale_needs(repo_copy: Path, tmp_path: Path) -> None:
    """Which file to put where; a file of another size or of other bytes is none."""
    folder = tmp_path / "weights"
    folder.mkdir()
    arguments = [sys.executable, "-m", "pipeline", "doctor"]

    def doctor(*more: str) -> str:
        environment = {**os.environ, "SCM_WEIGHTS": str(folder), "SCM_ROOT": str(repo_copy)}
        return subprocess.run(
            [*arguments, *more], cwd=repo_copy, env=environment, capture_output=True, text=True
        ).stdout

    assert "weights of" not in doctor("--quick")
    file = repo_copy / "params.yaml"
    head, mark, smoke = plain_text().partition("\n  smoke:")
    smoke = smoke.replace("spaces: [classifier]", "spaces: [inception, dinov2]").replace(
        "        features: ", "        removed: "
    )
    lines = smoke.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith("        removed:"))
    file.write_text(head + mark + "".join(lines[:start] + lines[start + 3 :]))
    assert "weights of" not in doctor("--quick")
    found = doctor("--quick", "--scale", "smoke")
    for space, name, digest in (
        ("inception", "weights-inception-2015-12-05-6726825d.pth", "6726825d0af5f729"),
        ("dinov2", "dinov2_vitl14_pretrain.pth", "d5383ea8f4877b24"),
    ):
        assert f"missing   weights of {space}: {folder / name} is not there\n" in found
        assert re.search(rf"→ put {name} there, from https://\S+ \(\d+ MB, SHA-256 {digest}", found)
    inception = folder / "weights-inception-2015-12-05-6726825d.pth"
    inception.write_bytes(b"short")
    assert f"{inception}: 5 bytes, 95628359 expected" in doctor("--quick", "--scale", "smoke")
    with inception.open("wb") as sparse:
        sparse.truncate(95_628_359)
    assert f"ok        weights of inception: {inception}\n" in doctor("--quick", "--scale", "smoke")
    assert f"{inception}: damaged or another file\n" in doctor("--scale", "smoke")


def test_doctor_on_this_installation() -> None:
    here = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor", "--quick"], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_trace_says_why_a_row_has_no_run(tmp_path: Path) -> None:
    table = tmp_path / "tableX.csv"
    assert unmade(table, {"method": "sCD-M", "fid": "missing", "run": ""}) == "missing: not run at this scale"
    assert unmade(table, {"id": "iteration_cost", "verdict": "holds", "runs": ""}) == "a count, not a run"
    setting = {"section": "Ours, scale demo", "quantity": "t_mid", "value": "1.1", "run": ""}
    assert unmade(table, setting) == "a setting of params.yaml, not a run"
    assert unmade(table, {"method": "EDM", "fid": "2.01", "run": ""}).startswith("a published number: Lu & Song 2024")


def test_trace_follows_every_run_of_repeated_trainings(repo: Any) -> None:
    for stage in ("first", "second"):
        repo.run(stage)
    made = [
        json.loads((repo.root / f"runs/tiny/{stage}/manifest.json").read_text())["run"] for stage in ("first", "second")
    ]
    (repo.root / "reports").mkdir(exist_ok=True)
    (repo.root / "reports" / "claims.csv").write_text(f"id,verdict,runs\nstable,holds,{' '.join(made)}\n")
    done = command(repo, "trace", "reports/claims.csv", "stable")
    assert done.returncode == 0, done.stderr
    assert all(f"  {run}\n" in done.stdout for run in made)
    (repo.root / "reports" / "claims.csv").write_text(f"id,verdict,runs\nstable,holds,{made[0]} gone-1\n")
    done = command(repo, "trace", "reports/claims.csv", "stable")
    assert done.returncode == 2
    assert "run gone-1 is not in runs/" in done.stderr
