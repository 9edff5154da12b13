# SPDX-License-Identifier: Apache-2.0
"""Stopping a training run at the end of a step: signals and a time budget are requests, which the loop answers by saving and leaving.

try:
    with StopRequest(budget_s, margin_s) as stop:
        ...  # after each step: if stop.requested() is not None: save, raise Stopped(stop.reason(), iteration)
except Stopped as stopped:
    pass_on(*stopped.signals)  # a launcher's handler requeues the job and ends the process here
    sys.exit(REQUEUE_STATUS)
"""

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_STATUS = (
    75  # EX_TEMPFAIL of sysexits.h: the exit status of a run that was stopped and wants to be started again
)
TIME_BUDGET = signal.SIGALRM  # what a spent time budget is reported as; the signal itself is neither sent nor caught


class Stopped(Exception):
    """A run was asked to stop and has saved its state: `reason` in words, the `iteration` it goes on from.

    `signals` are the numbers of the signals that came, in their order; the `StopRequest` that the exception leaves fills them in.
    """

    def __init__(self, reason: str, iteration: int) -> None:
        super().__init__(f"stopped by {reason} at iteration {iteration}, saved; started again it goes on from there")
        self.reason, self.iteration = reason, iteration
        self.signals: tuple[int, ...] = ()


class StopRequest:
    """Within its `with` block SIGTERM, SIGUSR1 and SIGUSR2 only set a flag; at its end they have their former handlers again.

    So nothing happens in the middle of a step or of a write, however often signals come and whatever code they come in; each is remembered
    once. A budget in seconds, counted from the start of the block, is spent `margin_s` before its end: room for a step and for saving.
    In a thread that is not the main one no handlers are installed (Python allows none) and the budget alone counts. A handler that is not
    Python's is left in place: it could not be put back. SIGINT is none of the signals: Ctrl-C stays a KeyboardInterrupt.

    Raises ValueError for a budget that is not positive, and for a margin that is negative or not below it.
    """

    def __init__(self, budget_s: float | None = None, margin_s: float = 0.0) -> None:
        if budget_s is not None and not (math.isfinite(budget_s) and budget_s > 0):
            raise ValueError(f"budget_s: expected seconds > 0, or None for no limit, got {budget_s}")
        if not 0 <= margin_s < (math.inf if budget_s is None else budget_s):
            raise ValueError(f"margin_s: expected seconds >= 0 and below budget_s ({budget_s}), got {margin_s}")
        self.budget_s, self.margin_s = budget_s, margin_s
        self.received: list[int] = []
        self._former: dict[int, Any] = {}
        self._deadline = math.inf

    def __enter__(self) -> Self:
        if self.budget_s is not None:
            self._deadline = time.monotonic() + self.budget_s - self.margin_s
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                former = signal.getsignal(signum)
                if former is not None:
                    self._former[signum] = former
                    signal.signal(signum, self._note)
                    signal.siginterrupt(signum, False)  # a system call in the midst of a write goes on
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum in list(self._former):
            self._give_back(signum)
        if isinstance(error, Stopped):
            error.signals = tuple(dict.fromkeys(self.received))

    def requested(self) -> int | None:
        """The number of the first signal that came, or `TIME_BUDGET` when that is spent; None: go on."""
        if self.received:
            return self.received[0]
        return TIME_BUDGET if time.monotonic() >= self._deadline else None

    def reason(self) -> str | None:
        """`requested()` in words: a signal's name or "time budget"."""
        signum = self.requested()
        if signum is None:
            return None
        return "time budget" if signum == TIME_BUDGET else signal.Signals(signum).name

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)  # and nothing else: this runs between any two instructions, a save's too

    def _give_back(self, signum: int) -> None:
        signal.signal(signum, self._former.pop(signum))


def pass_on(*signums: int) -> None:
    """Deliver signals, one after the other, to the handlers that they had before `StopRequest`; to be called in the main thread.

    Where a handler ends the process this does not return: the system's does so for all `SIGNALS`, submitit's for the one that it requeues
    a job at (by SystemExit). It returns where they ignore the signals or only log them. Within a `StopRequest` the signals' former handlers
    are put back first.
    """
    for signum in signums:
        while isinstance(owner := getattr(signal.getsignal(signum), "__self__", None), StopRequest):
            owner._give_back(signum)
        signal.raise_signal(signum)
