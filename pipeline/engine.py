# SPDX-License-Identifier: Apache-2.0
"""What Snakemake's own process does for jobs that run elsewhere."""

import os
import signal
import threading
from types import FrameType

from pipeline.backends import descendants, signal_all


def cancel_at_sigterm() -> None:
    """From now on SIGTERM stops this process and cancels what it waits for, as Ctrl-C does; call it in the main thread.

    Snakemake alone would start no more jobs, and wait for those that run, be it for days.
    """
    before = signal.getsignal(signal.SIGTERM)

    def cancel(signum: int, frame: FrameType | None) -> None:
        if callable(before):
            # Not here: it takes a lock, which the code that this has interrupted may hold.
            threading.Thread(target=before, args=(signum, None), daemon=True).start()
        # Not SIGTERM: the shells between would die of it, and nobody would wait for the words of those that cancel.
        signal_all(descendants([os.getpid()]), signal.SIGINT)

    signal.signal(signal.SIGTERM, cancel)
