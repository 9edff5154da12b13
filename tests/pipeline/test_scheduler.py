# SPDX-License-Identifier: Apache-2.0
"""The shared look at the queue: who asks, what is an end, what a scheduler that does not answer leaves standing."""

import json
import threading
import time
from pathlib import Path

import pytest

from pipeline import scheduler
from pipeline.errors import PipelineError
from pipeline.scheduler import LASTING_S, Look, Scheduler, Seen

NAME = "teacher@0123abcd"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that squeue shows; without it squeue fails. Each call leaves a line in queries."""
    (tmp_path / "params.yaml").touch()
    shown, program = tmp_path / "queue", tmp_path / "bin/squeue"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/queries\n[ -e {shown} ] || {{ echo 'slurm_load_jobs error: nobody there' >&2; exit 1; }}\n"
        f"cat {shown}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SCM_ROOT", str(tmp_path))
    return shown


def show(queue: Path, state: str, name: str = NAME, reason: str = "None") -> None:
    """Job 7 in a state."""
    queue.write_text(f"7|{state}|n1|{reason}|{name}\n8|RUNNING|n1|None|somebody|else\n")


def queries(queue: Path) -> int:
    """How often squeue was called."""
    file = queue.with_name("queries")
    return len(file.read_text().split()) if file.exists() else 0


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The clock of the scheduler goes on."""
    now = scheduler.time.time()
    monkeypatch.setattr(scheduler.time, "time", lambda: now + seconds)


def test_one_query_for_many_waiters(queue: Path) -> None:
    show(queue, "RUNNING")
    waiters = [Scheduler() for _ in range(20)]
    threads = [threading.Thread(target=waiter.look) for waiter in waiters]
    # One process's threads share POSIX locks: what is tested here is that a young look is not repeated.
    waiters[0].look()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queries(queue) == 1
    assert all(waiter.look().jobs["7"].state == "RUNNING" for waiter in waiters)
    assert list(waiters[0].look().jobs) == ["7"]  # the other is none of ours


def test_it_is_asked_again_after_a_while(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(queue, "RUNNING")
    first = Scheduler().look()
    show(queue, "COMPLETED")
    assert Scheduler().look() == first
    later(monkeypatch, 15.1)
    assert Scheduler().look().jobs["7"].over
    assert queries(queue) == 2


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("PENDING", "waits in the queue (Resources)"),
        ("REQUEUED", "waits: requeued (Resources)"),
        ("REQUEUE_HOLD", "waits: requeue_hold (Resources)"),
        ("SPECIAL_EXIT", "waits: special_exit (Resources)"),
        ("CONFIGURING", "waits: configuring (Resources)"),
        ("PREEMPTED", "waits: preempted (Resources)"),
        ("COMPLETING", ""),
        ("SUSPENDED", ""),
        ("RUNNING", ""),
    ],
)
def test_states_that_are_no_end(queue: Path, state: str, words: str) -> None:
    show(queue, state, reason="Resources")
    seen = Scheduler().look().jobs["7"]
    assert not seen.over
    assert seen.queued == words


def test_what_is_preempted_for_long_was_cancelled_by_that() -> None:
    assert not Seen("PREEMPTED", "", "", NAME, since=0, last=LASTING_S - 1).over
    assert Seen("PREEMPTED", "", "", NAME, since=0, last=LASTING_S + 1).over


def test_a_job_that_is_not_shown_twice_is_over_and_its_last_state_is_kept(
    queue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(queue, "RUNNING")
    one = Scheduler()
    one.look()
    queue.write_text("")
    over = []
    for _ in range(2):
        later(monkeypatch, 16)
        over.append(one.look().jobs["7"].over)
    assert over == [False, True]
    assert one.look().jobs["7"].node == "n1"
    later(monkeypatch, 90_000)
    assert one.look().jobs == {}


def test_a_scheduler_that_does_not_answer_changes_nothing(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(queue, "RUNNING")
    one = Scheduler()
    before = one.look()
    queue.unlink()
    for _ in range(5):
        later(monkeypatch, 16)
        look = one.look()
        assert (look.jobs, look.time) == (before.jobs, before.time)
        assert look.trouble == "slurm_load_jobs error: nobody there"
    assert queries(queue) == 6  # no more often than else
    show(queue, "RUNNING")
    later(monkeypatch, 16)
    assert one.look().trouble == ""


def test_nothing_is_known_without_a_scheduler(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    look = Scheduler().look()
    assert (look.jobs, look.time) == ({}, 0.0)
    assert "No such file" in look.trouble
    assert Look().jobs == {}


def test_what_a_user_has_squeue_show_by_default_hides_no_job(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = queue.parent / "bin/squeue"
    program.write_text(program.read_text().replace("cat", '[ -n "$SQUEUE_PARTITION" ] || cat'))
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu")
    show(queue, "RUNNING")
    assert list(Scheduler().look().jobs) == ["7"]


@pytest.mark.parametrize(
    ("said", "state"),
    [("COMPLETED\n", "COMPLETED"), ("NODE_FAIL\nCANCELLED by 1000\n", "CANCELLED"), ("", None), (None, None)],
    ids=["one", "of the last start", "unknown", "no accounting"],
)
def test_what_the_accounting_says_of_a_job(queue: Path, said: str | None, state: str | None) -> None:
    (queue.parent / "said").write_text(said or "")
    program = queue.parent / "bin/sacct"
    program.write_text(f"#!/bin/sh\ncat {queue.parent}/said\nexit {int(said is None)}\n")
    program.chmod(0o755)
    assert scheduler.accounting("7") == state


def test_a_damaged_look_is_replaced(queue: Path) -> None:
    show(queue, "RUNNING")
    one = Scheduler()
    one.cache.parent.mkdir()
    one.cache.write_text("{")
    assert one.look().jobs["7"].state == "RUNNING"
    assert json.loads(one.cache.read_text())["jobs"]["7"]["state"] == "RUNNING"


@pytest.mark.parametrize("text", ["0", "soon", "1e9"])
def test_an_interval_that_is_none(queue: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SCM_SLURM_POLL", text)
    with pytest.raises(PipelineError, match=f"SCM_SLURM_POLL={text}: expected seconds"):
        Scheduler().look()


def test_clocks_that_differ_do_not_stop_the_looking(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(queue, "RUNNING")
    later(monkeypatch, 10_000)
    Scheduler().look()  # by a machine whose clock is ahead
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{queue.parent}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SCM_ROOT", str(queue.parent))
    show(queue, "COMPLETED")
    assert time.time() < Scheduler().known().time
    assert Scheduler().look().jobs["7"].over
