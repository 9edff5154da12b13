# SPDX-License-Identifier: Apache-2.0
"""Work that any number of processes share without a word between them: whoever comes takes the next part that nobody has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scm_core.disk import failure
from scm_core.train.lock import HeldError, exclusive

SHORTEST, LONGEST, PATIENCE = 0.05, 2.0, 300.0  # seconds: between looks at what others make, and until it is said who


@contextlib.contextmanager
def claimed(lock: Path, what: str, stays: str) -> Iterator[None]:
    """Hold the lock file of a part while it is made; it goes when that is done. Raises HeldError, which says who has it, and StoreError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(lock))
        except HeldError:
            raise
        except OSError as error:
            raise failure(lock, error, f"claiming {what}", stays) from error
        yield
        # A process that has this file open may lock it, and another one a new file of its name: both will find the part made.
        lock.unlink(missing_ok=True)


def work_off(
    parts: int, settle: Callable[[int], str | None], shard: tuple[int, int], waiting: Callable[[int, str], None]
) -> None:
    """Call `settle(i)` for every i < `parts` until each is there: it makes part i or finds it made (None), or says who is making it now.

    Of the `ranks` processes in `shard` = (rank, ranks) each begins with parts of its own, so that they seldom meet, and then takes what
    the others have left. After long without news `waiting(i, who)` is told. Raises ValueError for an impossible shard, and whatever
    `settle` raises.
    """
    rank, ranks = shard
    if not 0 <= rank < ranks:
        raise ValueError(f"shard: expected (rank, ranks) with 0 ≤ rank < ranks, got {shard}")
    left = sorted(range(parts), key=lambda index: index % ranks != rank)  # a stable order
    pause, news = SHORTEST, time.monotonic()
    while True:
        held: list[int] = []
        holder = ""
        for index in left:
            busy = settle(index)
            if busy is not None:
                held.append(index)
                holder = busy
        if not held:
            return
        if len(held) < len(left):
            pause, news = SHORTEST, time.monotonic()
        elif time.monotonic() - news > PATIENCE:
            waiting(held[-1], holder)
            news = time.monotonic()
        left = held
        time.sleep(pause)
        pause = min(2 * pause, LONGEST)
