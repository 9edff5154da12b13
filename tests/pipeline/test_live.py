# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline watch` without a command: the runs that others have started."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

WATCH = [sys.executable, "-m", "pipeline", "watch"]


def watch(repo: Any, *words: str) -> Any:
    """`python -m pipeline watch WORDS`, with its output in pipes."""
    return subprocess.run(
        [*WATCH, *words], cwd=repo.root, env=repo.env, capture_output=True, text=True, timeout=60, check=False
    )


def started(repo: Any, stage: str) -> None:
    """Starts a job that takes a minute, and waits until it says how far it is."""
    repo.start(stage, "local")
    file = repo.work / stage / "progress.json"
    repo.wait_for(lambda: file.exists() and json.loads(file.read_text())["done"])


def test_once(repo: Any) -> None:
    """What runs, with its share and launcher; what failed, with its reason and log; what waits, by name."""
    repo.run("first")
    repo.run("broken", "local")
    started(repo, "sleeper")
    done = watch(repo, "--once")
    assert (done.returncode, done.stderr) == (1, "")  # a job has failed
    head, sleeper, broken, waiting = done.stdout.splitlines()
    assert re.fullmatch(
        r"scale tiny: 9 jobs: 1 done, 1 running, 6 waiting, 1 failed; about .+ left on \d+ cores?", head
    )
    assert re.fullmatch(r"  sleeper  running   +\d+%, \d+/600 s, .*ETA .*, local \d+", sleeper)
    assert "  broken  failed  failed: KeyError: 'missing thing'" in broken
    assert broken.endswith("runs/tiny/.logs/broken.log")
    assert waiting == "  waiting: second, steps, refusing, dying, silent, report"


def test_a_job_that_says_nothing_for_long_is_told(repo: Any) -> None:
    started(repo, "sleeper")
    os.kill(repo.pid("sleeper"), signal.SIGSTOP)
    file = repo.work / "sleeper/progress.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "updated": time.time() - 3600}))
    try:
        assert "no news for 1:00:0" in watch(repo, "--once").stdout
    finally:
        os.kill(repo.pid("sleeper"), signal.SIGCONT)


def test_other_scales_are_shown_while_their_jobs_run(repo: Any) -> None:
    started(repo, "sleeper")
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("scale: tiny", "scale: other"))
    (repo.root / "pipeline/params.py").write_text(
        (repo.root / "pipeline/params.py").read_text() + "    \n_load = load\ndef load(path=PARAMS_FILE, scale=None):\n"
        "    made = _load(path, scale)\n    made.with_scale = lambda name: _load(path, name)\n    return made\n"
    )
    text = watch(repo, "--once").stdout
    assert re.findall(r"^scale (\w+):", text, re.MULTILINE) == ["tiny", "other"]
    assert re.findall(r"^scale (\w+):", watch(repo, "--once", "--scale", "other").stdout, re.MULTILINE) == ["other"]


def test_lines_tell_what_changes_until_everything_is_done(repo: Any) -> None:
    registry = repo.root / "pipeline/registry.py"
    text = registry.read_text()
    for stage in ("steps", "sleeper", "broken", "refusing", "dying", "silent"):
        text = re.sub(rf'        job\("{stage}".*\),\n', "", text)
    registry.write_text(text)
    process = subprocess.Popen(
        [*WATCH, "--interval", "0.2"], cwd=repo.root, env=repo.env, stdout=subprocess.PIPE, text=True
    )
    repo.started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("scale tiny: 3 jobs: 3 waiting; about")
    assert process.stdout.readline() == "  waiting: first, second, report\n"
    for stage in ("first", "second", "report"):
        assert repo.run(stage).code == 0
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if re.search(r"  done  took \d+ s$", line)] == [
        "first",
        "second",
        "report",
    ]
    assert lines[-1] == "scale tiny: 3 jobs: 3 done"


def test_params_that_make_no_sense_for_a_moment_do_not_end_it(repo: Any, tmp_path: Path) -> None:
    code = """
        from pathlib import Path
        from pipeline.errors import PipelineError
        from pipeline import live, params
        look = live.Looker(None, 2)
        print(look()[0].head)
        def load(path, scale=None):
            raise PipelineError("params.yaml: broken")
        live.load, kept = load, live.load
        Path("params.yaml").write_text(Path("params.yaml").read_text() + "# edited\\n")
        print(look()[0].rest[0])
        live.load = kept
        print(look()[0].rest[0])
    """
    done = repo.python(code)
    assert done.out.splitlines()[1:] == [
        "as params.yaml was before: params.yaml: broken",
        "waiting: first, second, steps, sleeper, broken, refusing and 3 more",
    ], done.err


def read_until(terminal: int, pattern: bytes, seconds: float = 20) -> bytes:
    """What a terminal shows until a pattern has appeared."""
    text, deadline = b"", time.monotonic() + seconds
    while not re.search(pattern, text):
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 65536)
    return text


def test_ctrl_c_ends_the_table_and_no_job(repo: Any) -> None:
    started(repo, "sleeper")
    job = repo.pid("sleeper")
    ours, theirs = pty.openpty()
    env = {**repo.env, "TERM": "xterm", "COLUMNS": "140", "LINES": "30"}
    process = subprocess.Popen([*WATCH, "--interval", "0.2"], cwd=repo.root, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    repo.started.append(process)
    text = read_until(ours, rb"(?s)sleeper.*\d+/600 s.*sleeper")  # drawn twice
    assert b"ETA" in text
    assert b"Ctrl-C ends this display only" in text
    process.send_signal(signal.SIGINT)
    read_until(ours, rb"the display ended; jobs go on")
    assert process.wait(timeout=20) == 0
    os.close(ours)
    assert Path(f"/proc/{job}").exists()
    before = json.loads((repo.work / "sleeper/progress.json").read_text())["done"]
    repo.wait_for(lambda: json.loads((repo.work / "sleeper/progress.json").read_text())["done"] > before)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--interval", "0"), "error: watch: --interval 0: must be > 0 and at most 3600; leave it out for 2"),
        (("--interval", "inf"), "error: watch: --interval inf: must be > 0 and at most 3600; leave it out for 2"),
        (("--cores", "0"), "error: watch: --cores 0: must be at least 1; leave it out for this machine's"),
        (("--onc",), None),  # argparse completes it
        (("--twice",), "error: unrecognized arguments: --twice; see `python -m pipeline watch --help`"),
        (("--",), "error: watch: which command? Write for example: python -m pipeline watch -- snakemake all"),
    ],
)
def test_options_are_checked(repo: Any, words: tuple[str, ...], sentence: str | None) -> None:
    done = watch(repo, *words)
    if sentence is None:
        assert done.returncode == 0
    else:
        assert (done.returncode, done.stderr.strip()) == (2, sentence)
