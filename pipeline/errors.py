# SPDX-License-Identifier: Apache-2.0
"""Errors that the command line reports as one sentence, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PipelineError(Exception):
    """Something the user can mend; its message is one sentence that names the key or file and the remedy."""


class ParamsError(PipelineError, ValueError):
    """params.yaml cannot be read or holds something impossible."""


class RegistryError(PipelineError, ValueError):
    """An unknown stage, axis or axis value was asked for."""


class StoppedError(PipelineError):
    """A training was asked to stop and has saved: it wants to be started again. `signals` are the numbers of those that came."""

    status = 75  # EX_TEMPFAIL of sysexits.h, as scm_core.train.signals.REQUEUE_STATUS

    def __init__(self, message: str, signals: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.signals = signals


class NotYetError(PipelineError):
    """It cannot be done at this moment, and will work later: the scheduler is away, or lets nobody in."""


def suggestion(word: object, known: Iterable[str], noun: str = "names") -> str:
    """The end of a sentence about an unknown `word`: the nearest of `known`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known {noun} are {', '.join(known)}" if known else f"no {noun} are known here"
