# SPDX-License-Identifier: Apache-2.0
"""Launching: waiting is cheap, nothing runs twice, a dead job is noticed, a dead waiter costs nothing."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import Lock


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def starts(repo: Any) -> list[str]:
    """The steps at which the stage `steps` started, one per attempt."""
    return (repo.work.parent / "starts.txt").read_text().split()


def reached(repo: Any, step: int) -> Any:
    """Whether the stage `steps` has its checkpoint of this step."""
    file = repo.work / "steps" / "work" / "step"
    return lambda: file.exists() and int(file.read_text() or 0) >= step


def test_a_local_job_publishes(repo: Any) -> None:
    done = repo.run("first", "local")
    assert (done.code, done.err) == (0, "")
    assert "submitted" in done.out
    assert (repo.root / "runs/tiny/first/data.bin").stat().st_size == 256
    assert (repo.root / "runs/tiny/.logs/first.log").exists()
    assert not (repo.work / "first").exists()


def test_waiting_is_cheap_and_cancelling_stops_the_job(repo: Any) -> None:
    waiter = repo.start("sleeper", "local")
    pid = repo.pid("sleeper")
    time.sleep(1)
    used = memory_mb(waiter.pid)
    loaded = Path(f"/proc/{waiter.pid}/maps").read_text()
    waiter.send_signal(signal.SIGINT)
    out, err = waiter.communicate(timeout=20)
    # Resident, with the libraries that all of them share; 40 is promised.
    assert used <= 36, f"the waiting process needs {used:.1f} MB"
    assert "libtorch" not in loaded
    assert "numpy" not in loaded
    assert waiter.returncode == 130
    assert "cancelling the job" in err
    assert "Traceback" not in out + err
    assert not Path(f"/proc/{pid}").exists()
    assert not (repo.root / "runs/tiny/sleeper").exists()


def test_sigterm_cancels_too(repo: Any) -> None:
    waiter = repo.start("sleeper", "local")
    pid = repo.pid("sleeper")
    waiter.terminate()
    assert waiter.wait(timeout=20) == 130
    assert not Path(f"/proc/{pid}").exists()
    assert "cancelled" in (repo.root / "runs/tiny/.logs/sleeper.log").read_text()


def test_a_cancel_before_the_job_has_started(repo: Any) -> None:
    waiter = repo.start("sleeper", "local")
    repo.wait_for((repo.work / "sleeper" / "ticket.json").exists)
    waiter.terminate()
    assert waiter.wait(timeout=20) == 130
    time.sleep(1.5)  # a process left over by the cancel would have come to its log by now
    processes = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(repo.root) in _command_line(p)]
    assert processes == []


def _command_line(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_a_job_that_dies_hard_is_noticed_at_once(repo: Any) -> None:
    started = time.monotonic()
    done = repo.run("dying", "local")
    assert done.code == 1
    assert "killed by SIGKILL" in done.err
    assert "runs/tiny/.logs/dying.log" in done.err
    assert "| last words" in done.err
    assert time.monotonic() - started < 10


def test_a_job_killed_together_with_its_parents_is_noticed(repo: Any) -> None:
    waiter = repo.start("sleeper", "local")
    pid = repo.pid("sleeper")
    controller = json.loads((repo.work / "sleeper" / "ticket.json").read_text())["pid"]
    os.kill(controller, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    _, err = waiter.communicate(timeout=10)
    assert waiter.returncode == 1
    assert "killed" in err


@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_failures_are_one_sentence(repo: Any, launcher: str) -> None:
    broken = repo.run("broken", launcher)
    assert broken.code == 1
    assert broken.err.count("\n") == 1
    assert "KeyError: 'missing thing'" in broken.err
    assert "runs/tiny/.logs/broken.log" in broken.err
    assert "Traceback" in (repo.root / "runs/tiny/.logs/broken.log").read_text()
    assert not (repo.root / "runs/tiny/broken").exists()
    refusing = repo.run("refusing", launcher)
    assert refusing.code == 1
    assert refusing.err == "error: refusing: the data says no; give it other data\n"


def test_two_waiters_one_job(repo: Any) -> None:
    repo.run("first")
    one = repo.start("steps", "local")
    repo.pid("steps")
    two = repo.start("steps", "local")
    three = repo.start("steps", "local")
    outs = [process.communicate(timeout=30) for process in (one, two, three)]
    assert [process.returncode for process in (one, two, three)] == [0, 0, 0], outs
    assert "attached to the running job" in outs[1][0]
    assert starts(repo) == ["0"]


def test_cancelling_one_of_two_waiters_leaves_the_job(repo: Any) -> None:
    repo.run("first")
    one = repo.start("steps", "local")
    repo.pid("steps")
    two = repo.start("steps", "local")
    time.sleep(1)
    one.terminate()
    assert one.wait(timeout=20) == 130
    assert "left running" in one.communicate()[1]
    assert two.wait(timeout=30) == 0
    assert starts(repo) == ["0"]


def test_a_job_outlives_its_waiter_and_is_found_again(repo: Any) -> None:
    repo.run("first")
    waiter = repo.start("steps", "local")
    repo.wait_for(reached(repo, 3))
    os.killpg(waiter.pid, signal.SIGKILL)  # the waiter and all that shares its process group
    done = repo.run("steps", "local")
    assert done.code == 0
    assert "attached" in done.out
    assert starts(repo) == ["0"]


def test_a_job_that_ended_without_a_waiter_is_published(repo: Any) -> None:
    repo.run("first")
    waiter = repo.start("steps", "local")
    repo.pid("steps")
    waiter.kill()
    repo.wait_for((repo.work / "steps" / "exit.json").exists)
    assert not (repo.root / "runs/tiny/steps").exists()
    time.sleep(0.5)
    done = repo.run("steps", "local")
    assert done.code == 0
    assert "publishing what it staged" in done.out
    assert (repo.root / "runs/tiny/steps/result").read_text() == "30"
    assert starts(repo) == ["0"]


def test_everything_killed_resumes(repo: Any) -> None:
    repo.run("first")
    waiter = repo.start("steps", "local")
    repo.wait_for(reached(repo, 5))
    job = repo.pid("steps")
    waiter.kill()
    os.kill(job, signal.SIGKILL)
    assert not (repo.root / "runs/tiny/steps").exists()
    time.sleep(0.3)
    done = repo.run("steps", "local")
    assert done.code == 0, done.err
    first, second = starts(repo)
    assert first == "0"
    assert int(second) >= 5
    assert not (repo.root / "runs/tiny/steps/half").exists()


def test_other_parameters_do_not_attach(repo: Any) -> None:
    waiter = repo.start("sleeper", "local")
    repo.pid("sleeper")
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("value: 1", "value: 5"))
    other = repo.run("sleeper", "local")
    waiter.terminate()
    waiter.wait(timeout=20)
    assert other.code == 1
    assert "is running with other parameters" in other.err


def test_a_running_inline_job_is_attached_to(repo: Any) -> None:
    repo.run("first")
    inline = repo.start("steps", "inline")
    repo.wait_for(reached(repo, 1))
    done = repo.run("steps", "local")
    assert (done.code, inline.wait(timeout=20)) == (0, 0), done.err
    assert "attached" in done.out
    assert starts(repo) == ["0"]


def test_an_unknown_launcher(repo: Any) -> None:
    done = repo.run("first", "cloud")
    assert done.code == 1
    assert "unknown launcher 'cloud'; it must be one of inline, local, slurm" in done.err


@pytest.mark.parametrize("left", [{}, {"pid": 2**22, "started": "long ago", "host": socket.gethostname()}])
def test_a_job_that_is_just_being_started_is_waited_for(repo: Any, left: dict[str, Any]) -> None:
    """Its process holds the lock, and has not said yet who it is; what an earlier one with other parameters has left is not its."""
    folder = repo.work / "first"
    folder.mkdir(parents=True)
    if left:
        (folder / "process.json").write_text(json.dumps(left))
        (folder / "state.json").write_text(json.dumps({"fingerprint": "other", "attempts": []}))
    lock = Lock(repo.work / "first.run.lock")
    lock.acquire()
    try:
        waiter = repo.start("first", "local")
        said = waiter.stdout.readline()
    finally:
        lock.release()
    assert said == "first: is just being started by another process; trying again until it works\n", (
        waiter.communicate()
    )
    out, err = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, err
    assert "first: submitted" in out
