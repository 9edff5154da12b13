# SPDX-License-Identifier: Apache-2.0
"""Forked children that do one thing to its end while signals wait."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import NotYetError, PipelineError
from pipeline.publish import explain


@contextmanager
def deferred_signals() -> Iterator[list[str]]:
    """Notes Ctrl-C and SIGTERM instead of acting on them: a job must not be submitted and its ticket not written."""
    late: list[str] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {
        kind: signal.signal(kind, lambda signum, frame: late.append(signal.Signals(signum).name)) for kind in kinds
    }
    try:
        yield late
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def in_child(submit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Calls `submit` in a forked process, so that the one that waits never loads submitit (13 MB).

    A signal to this process, or its death, does not cut it off.
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)
        try:
            answer: dict[str, Any] = {"result": submit()}
        except NotYetError as error:
            answer = {"later": str(error)}
        except PipelineError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": explain(error, "cannot submit:")}
        except BaseException as error:
            answer = {"error": f"cannot submit: {type(error).__name__}: {' '.join(str(error).split())}"}
        try:
            with os.fdopen(writable, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(0)  # also where nobody listens any more: what waits is the parent's to do
    os.close(writable)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise NotYetError("the submitting process was killed")
    answer = json.loads(text)
    if "later" in answer:
        raise NotYetError(answer["later"])
    if "error" in answer:
        raise PipelineError(answer["error"])
    result: dict[str, Any] = answer["result"]
    return result
