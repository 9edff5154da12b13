# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: real signals to this process, to forked children and to a job of submitit, and what comes of them afterwards."""

import ctypes
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from scm_core.train import signals as signals_module
from scm_core.train.signals import REQUEUE_STATUS, SIGNALS, TIME_BUDGET, Stopped, StopRequest, pass_on

ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")  # a child has torch without importing it again
PATIENCE = 20.0  # seconds that a child has for what takes it none
TERM, USR1, USR2 = SIGNALS


@pytest.fixture(autouse=True)
def delivered() -> Iterator[list[int]]:
    """What comes to the handlers that are there before a `StopRequest`: recorders, so that no signal ends the tests."""
    seen: list[int] = []
    before = {signum: signal.signal(signum, lambda signum, frame: seen.append(signum)) for signum in SIGNALS}
    yield seen
    for signum, handler in before.items():
        signal.signal(signum, handler)


def to_itself(*signums: int) -> None:
    for signum in signums:
        os.kill(os.getpid(), signum)


def stopped_by(*signums: int) -> Stopped:
    """What leaves the block of a loop that saves and leaves at the first of these signals, and gets all of them."""
    try:
        with StopRequest() as stop:
            to_itself(*signums)
            reason = stop.reason()
            assert reason is not None
            raise Stopped(reason, 7)
    except Stopped as stopped:
        return stopped


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_a_signal_is_a_request_and_nothing_else(signum: signal.Signals, delivered: list[int]) -> None:
    """Within the block only the flag is set, whoever sends it how often; after it the handler before is there and untouched."""
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        assert (stop.requested(), stop.reason()) == (None, None)
        to_itself(signum, signum, signum)
        assert (stop.requested(), stop.reason()) == (signum, signum.name)
        assert delivered == []
    assert signal.getsignal(signum) is before
    to_itself(signum)
    assert delivered == [signum]


def test_the_first_signal_is_the_reason_and_all_are_remembered_once() -> None:
    stopped = stopped_by(USR1, TERM, USR1, USR2, TERM)
    assert (stopped.reason, stopped.iteration, stopped.signals) == ("SIGUSR1", 7, (USR1, TERM, USR2))
    assert str(stopped) == "stopped by SIGUSR1 at iteration 7, saved; started again it goes on from there"


@pytest.mark.parametrize("error", [Stopped("SIGTERM", 3), KeyboardInterrupt(), ValueError("loss")], ids=repr)
def test_handlers_come_back_however_the_block_ends(error: BaseException) -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with pytest.raises(type(error)), StopRequest():
        raise error
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_ctrl_c_is_no_request() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested() is None


def test_a_handler_that_is_not_pythons_stays(monkeypatch: pytest.MonkeyPatch, delivered: list[int]) -> None:
    """Python says None for it and could not put it back."""
    real = signal.getsignal
    monkeypatch.setattr(signals_module.signal, "getsignal", lambda signum: None if signum == USR1 else real(signum))
    with StopRequest() as stop:
        to_itself(USR1)
        assert stop.requested() is None
    assert delivered == [USR1]


def test_in_another_thread_the_budget_alone_counts(delivered: list[int]) -> None:
    found: list[Any] = []

    def run() -> None:
        with StopRequest(budget_s=3600) as stop:
            to_itself(TERM)
            found.append(stop.requested())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]
    assert delivered == [TERM]


def test_a_time_budget_ends_a_margin_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the start of the block; a signal that came counts more, for it has a handler to be passed on to."""
    now = [1000.0]
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now[0])
    request = StopRequest(budget_s=60, margin_s=10)
    now[0] += 100
    with request as stop:
        now[0] += 49.9
        assert stop.requested() is None
        now[0] += 0.2
        assert (stop.requested(), stop.reason()) == (TIME_BUDGET, "time budget")
        to_itself(USR2)
        assert stop.reason() == "SIGUSR2"
    with StopRequest() as unlimited:
        now[0] += 1e9
        assert unlimited.requested() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_s": 0}, "budget_s: expected seconds > 0, or None for no limit, got 0"),
        ({"budget_s": math.nan}, "budget_s: .*got nan"),
        ({"budget_s": math.inf}, "budget_s: .*got inf"),
        ({"budget_s": 60, "margin_s": -1}, r"margin_s: expected seconds >= 0 and below budget_s \(60\), got -1"),
        ({"budget_s": 60, "margin_s": 60}, "margin_s: .*got 60"),
        ({"margin_s": math.nan}, "margin_s: .*got nan"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StopRequest(**arguments)


# --- passing on -------------------------------------------------------------------------------------------------------------


def test_signals_are_passed_on_to_the_handlers_before(delivered: list[int]) -> None:
    """In their order; nothing for a stop that no signal asked for."""
    stopped = stopped_by(USR2, TERM)
    assert delivered == []
    pass_on(*stopped.signals)
    assert delivered == [USR2, TERM]
    pass_on()
    assert delivered == [USR2, TERM]


def test_what_a_handler_raises_comes_through() -> None:
    """submitit's leaves by SystemExit, a cancelled job's by KeyboardInterrupt."""

    def leave(signum: int, frame: object) -> None:
        raise SystemExit(144)

    signal.signal(USR2, leave)
    with pytest.raises(SystemExit) as caught:
        pass_on(*stopped_by(USR2).signals)
    assert caught.value.code == 144


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(USR1, signal.SIG_IGN)
    pass_on(*stopped_by(USR1).signals)
    assert signal.getsignal(USR1) is signal.SIG_IGN


def test_passing_on_from_within_requests(delivered: list[int]) -> None:
    """Two blocks, one in the other: the handler before both gets it, the other signals remain requests."""
    with StopRequest() as outer, StopRequest() as inner:
        to_itself(USR2)
        assert (outer.requested(), inner.requested()) == (None, USR2)
        pass_on(USR2)
        assert delivered == [USR2]
        to_itself(TERM)
        assert inner.received == [USR2, TERM]
    assert delivered == [USR2]


# --- children ---------------------------------------------------------------------------------------------------------------


def child(body: Callable[[Connection], None], handler: Any = signal.SIG_DFL) -> tuple[Any, Connection]:
    """A forked process that runs `body` with `handler` for all signals, and the pipe to it; it says "ready" when they may come."""
    here, there = FORK.Pipe()

    def run() -> None:
        here.close()
        for signum in SIGNALS:
            signal.signal(signum, handler)
        body(there)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    there.close()
    assert here.poll(PATIENCE)
    assert here.recv() == "ready"
    return process, here


def end(process: Any) -> int | None:
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
    return process.exitcode


def test_signals_in_a_long_matmul_then_the_systems_handler(tmp_path: Path) -> None:
    """They come into C code that takes a while: it ends undisturbed, the loop saves, and the signal passed on ends the process."""
    file = tmp_path / "saved"

    def body(pipe: Connection) -> None:
        torch.set_num_threads(1)
        a = torch.eye(1800) * 2
        try:
            with StopRequest() as stop:
                pipe.send("ready")
                while stop.requested() is None:
                    b = a @ a
                pipe.send((bool((b == 2 * a).all()), stop.reason()))
                file.write_text("saved")
                raise Stopped("SIGTERM", 1)
        except Stopped as stopped:
            pass_on(*stopped.signals)
        os._exit(3)

    process, pipe = child(body)
    time.sleep(0.02)
    os.kill(process.pid, TERM)
    os.kill(process.pid, TERM)
    assert pipe.poll(PATIENCE)
    assert pipe.recv() == (True, "SIGTERM")
    assert end(process) == -TERM
    assert file.read_text() == "saved"


def test_signals_in_the_midst_of_a_write_and_no_handler_to_requeue(tmp_path: Path) -> None:
    """A save that is under way ends, whole and not entered again, however many come; where they are ignored the caller says the status."""
    file = tmp_path / "state"
    block = os.urandom(1 << 20)
    count = 0

    def body(pipe: Connection) -> None:
        def save(iteration: int) -> None:
            nonlocal count
            count += 1
            assert count == iteration  # one at a time: not entered again by a signal
            with open(file, "wb") as f:
                for _ in range(16):
                    f.write(block)
                    os.fsync(f.fileno())
                    if f.tell() == len(block):
                        pipe.send("ready")
                    time.sleep(0.01)

        try:
            with StopRequest() as stop:
                iteration = 0
                while True:
                    iteration += 1
                    save(iteration)
                    if (reason := stop.reason()) is not None:
                        raise Stopped(reason, iteration)
        except Stopped as stopped:
            pass_on(*stopped.signals)
            pipe.send((stopped.iteration, count, len(stopped.signals)))
            os._exit(REQUEUE_STATUS)

    process, pipe = child(body, signal.SIG_IGN)
    for _ in range(30):
        os.kill(process.pid, USR2)
        os.kill(process.pid, TERM)
    assert pipe.poll(PATIENCE)
    assert pipe.recv() == (1, 1, 2)
    assert end(process) == REQUEUE_STATUS == 75
    assert file.read_bytes() == 16 * block


def test_a_system_call_of_foreign_code_is_not_broken_off() -> None:
    """A library that does not ask again after EINTR (here libc's read itself) still gets its data."""

    def body(pipe: Connection) -> None:
        reading, writing = os.pipe()
        pipe.send("ready")
        libc, buffer = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(8)
        with StopRequest() as stop:
            threading.Thread(target=answers, args=(pipe, writing)).start()
            number = libc.read(reading, buffer, 8)
            pipe.send((number, buffer.value, stop.requested()))

    def answers(pipe: Connection, writing: int) -> None:
        time.sleep(0.1)  # the read above has begun
        signal.pthread_kill(threading.main_thread().ident, USR1)  # type: ignore[arg-type]
        time.sleep(0.1)
        os.write(writing, b"data")

    process, pipe = child(body)
    assert pipe.poll(PATIENCE)
    assert pipe.recv() == (4, b"data", USR1)
    assert end(process) == 0


# --- submitit ---------------------------------------------------------------------------------------------------------------

JOB = '''
import os, sys, time
from pathlib import Path
from submitit.helpers import DelayedSubmission
from scm_core.train.signals import REQUEUE_STATUS, Stopped, StopRequest, pass_on

class Job:
    """Counts to 40, a "step" every tenth of a second; a file is its checkpoint."""

    def __init__(self, file):
        self.file = file

    def __call__(self):
        file = Path(self.file)
        start = done = int(file.read_text()) if file.exists() else 0
        try:
            with StopRequest() as stop:
                while done < 40:
                    time.sleep(0.1)
                    done += 1
                    if (reason := stop.reason()) is not None:
                        file.write_text(str(done))
                        raise Stopped(reason, done)
        except Stopped as stopped:
            print("passing on", stopped.reason, flush=True)
            pass_on(*stopped.signals)
            sys.exit(REQUEUE_STATUS)
        return start, done, "torch" in sys.modules

    def checkpoint(self):
        return DelayedSubmission(self)
'''


@pytest.mark.slow
def test_submitit_requeues_a_job_that_ran_out_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its SIGUSR2 comes 2 s before the time limit of 5: the job saves, submitit's own handler requeues it, and it goes on from there."""
    import submitit

    (tmp_path / "counting.py").write_text(JOB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    from counting import Job  # type: ignore[import-not-found]

    executor = submitit.LocalExecutor(tmp_path / "log", max_num_timeout=3)
    executor.update_parameters(timeout_min=5 / 60, signal_delay_s=2)
    job = executor.submit(Job(str(tmp_path / "state")))
    start, done, torch_was_loaded = job.result()
    saved = int((tmp_path / "state").read_text())
    assert 0 < start == saved < done == 40
    assert not torch_was_loaded  # the module is light, for processes that only watch
    log = job.stderr() + job.stdout()
    assert "passing on SIGUSR2" in log
    assert "Requeued job" in log


def test_submitits_handlers_after_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed over submitit's and gone again: SIGTERM is passed over by it, a signal to preempt saves the job anew and requeues it."""
    from submitit.core.utils import DelayedSubmission, JobPaths
    from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, LocalJobEnvironment

    for name in ("SUBMITIT_LOCAL_JOB_ID", "SUBMITIT_LOCAL_GLOBALID"):
        monkeypatch.setenv(name, "0")
    delayed = DelayedSubmission(Resumed())
    delayed.set_timeout(60, 3)
    paths = JobPaths(tmp_path, "0", 0)
    LocalJobEnvironment()._handle_signals(paths, delayed)
    stopped = stopped_by(TERM, USR2)
    assert not paths.submitted_pickle.exists()
    with pytest.raises(SystemExit) as caught:
        pass_on(*stopped.signals)
    assert caught.value.code == LOCAL_REQUEUE_RETURN_CODE
    assert paths.submitted_pickle.exists()


class Resumed:
    """A job that can be requeued."""

    def __call__(self) -> None: ...

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(math.sqrt, 2)
