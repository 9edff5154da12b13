# SPDX-License-Identifier: Apache-2.0
"""Copies of the repository in which the pipeline is run as a user runs it: starting, killing, looking at files, pasting commands."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from tests.documents import Block

TABLES = [f"table{name}" for name in (*range(1, 8), "E3")]
WITH_NUMBERS = [f"figure{number}" for number in (1, 3, 4, 5, 6, 7)]
PAGE = "reports/report.html"
RESULTS = [
    *(f"reports/{name}.{kind}" for name in (*TABLES, "claims") for kind in ("csv", "md", "tex")),
    *(f"reports/figure{number}.{kind}" for number in range(1, 14) for kind in ("png", "pdf")),
    *(f"reports/{name}.csv" for name in (*WITH_NUMBERS, "evaluations")),
    PAGE,
]
SNAKEMAKE = ["snakemake", "--profile", "cluster/local", "--config", "scale=smoke"]
TEACHER = Path("runs/smoke/latent_guided/teacher/M")
WORK = Path("runs/smoke/.work/teacher-latent_guided-M/work")
LIMIT_S = 2400  # for one run of the whole pipeline, on two cores shared with the other; five minutes alone


class Copy(NamedTuple):
    """A copy of the repository and the environment its commands run in."""

    path: Path
    env: dict[str, str]

    def start(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Starts a command in the repository, with its output in a file."""
        return subprocess.Popen(command, cwd=self.path, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def run(self, *command: str, timeout: float = 600) -> str:
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
        return done.stdout + ("" if "dvc" in command and "pipeline" in command else done.stderr)

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
        while pids := [pid for pid in self.processes() if not ended(pid)]:
            assert time.monotonic() < deadline, f"still running: {pids}"
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def use_scale(self, scale: str) -> None:
        """Sets the scale on top of params.yaml, and makes dvc.yaml for it."""
        text = (self.path / "params.yaml").read_text()
        changed, count = re.subn(r"^scale: \w+", f"scale: {scale}", text, flags=re.MULTILINE)
        assert count == 1, "params.yaml: expected one line `scale: …`"
        (self.path / "params.yaml").write_text(changed)
        (self.path / "dvc.yaml").write_text(self.run("python", "-m", "pipeline", "dvc"))

    def files(self, folder: Path) -> dict[str, bytes]:
        """The contents of a folder, without the engines' own marks (.snakemake_timestamp)."""
        return {
            p.relative_to(self.path).as_posix(): p.read_bytes()
            for p in sorted((self.path / folder).rglob("*"))
            if p.is_file() and not p.name.startswith(".")
        }

    def times(self) -> dict[str, int]:
        """When each published file was last written."""
        outputs = [p for p in (self.path / "runs/smoke").rglob("*") if p.is_file() and not is_working_file(p)]
        return {str(p): p.stat().st_mtime_ns for p in [*outputs, *(self.path / name for name in RESULTS)]}


class Runs(NamedTuple):
    """Both copies after their runs, and what the second `snakemake` command printed."""

    snakemake: Copy
    dvc: Copy
    resumed_output: str


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def is_working_file(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts[path.parts.index("smoke") :])


def finish(process: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    try:
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"not done in time; last lines:\n{log.read_text()[-3000:]}")
    text = log.read_text()
    assert code == 0, f"ended with {code}; last lines:\n{text[-3000:]}"
    return text


def kill_in_the_middle_of_teacher_training(copy: Copy, log: Path, deadline: float) -> None:
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


def activate(copy: Copy) -> None:
    """Give a copy a .venv that has what this process runs in, for commands that begin with make: it installs nothing."""
    venv = copy.path / ".venv"
    venv.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (venv / entry.name).symlink_to(entry)
    pinned = (copy.path / "requirements.lock").read_bytes() + (copy.path / "pyproject.toml").read_bytes()
    (venv / ".installed").write_text(hashlib.sha256(pinned).hexdigest() + "\n")
    copy.env["PATH"] = os.pathsep.join([str(venv / "bin"), copy.env["PATH"]])


def commit(copy: Copy, message: str) -> None:
    copy.run("git", "commit", "--quiet", "--all", "--message", message)


def run_block(copy: Copy, block: Block) -> None:
    """Run a block of a document as a reader would who pastes it into a shell; fail with what it printed."""
    shell = ["bash", "-eu", "-o", "pipefail", "-c", block.text]
    command = shell if block.language == "bash" else ["python", "-c", block.text]
    done = subprocess.run(
        command,
        cwd=copy.path,
        env=copy.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{block.where} ended with {done.returncode}:\n{block.text}\n{done.stdout[-5000:]}"
