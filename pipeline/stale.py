# SPDX-License-Identifier: Apache-2.0
"""Remove the lock that a killed Snakemake leaves behind, so that the same command simply goes on.

Snakemake's lock files do not say who made them: after `kill -9` every later call stops with "directory cannot be
locked". Each Snakemake that reads our Snakefile therefore holds a second lock, one that the kernel frees with the
process. Whoever finds nobody else holding it knows that lock files are left over.
"""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path
from typing import IO

_held: list[IO[str]] = []  # open until the process ends


def clear_stale_locks(folder: Path) -> None:
    """Mark this process as using `folder`'s `.snakemake`, and remove lock files if no other live process does."""
    state = folder / ".snakemake"
    state.mkdir(exist_ok=True)
    file = (state / "users.lock").open("a")
    _held.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # another Snakemake lives: its lock files, if any, are meant
    except OSError as error:
        print(f"warning: {state}: cannot be locked ({error.strerror}); a killed run may need --unlock", file=sys.stderr)
        return
    else:
        for left in sorted((state / "locks").glob("*.lock")):
            print(f"{left.name}: left by a Snakemake that was killed; removed", file=sys.stderr)
            left.unlink(missing_ok=True)
    fcntl.flock(file, fcntl.LOCK_SH)
