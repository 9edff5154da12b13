# SPDX-License-Identifier: Apache-2.0
"""The attempts at a job that its working folder remembers (state.json): when each ran, and with which code.

The fingerprint of a job holds no code, so that a comment does not throw away a day of training. What a resumed job was
made with is therefore written down attempt by attempt, and said aloud where it is not the same.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import manifest, paths
from pipeline.files import read_json, write_json
from pipeline.provenance import code_state, sources_digest

if TYPE_CHECKING:
    from pipeline.registry import Job

STATE = "state.json"
Attempt = dict[str, Any]  # started, ended (None while it runs), commit, dirty, code


def read(job: paths.JobName) -> list[Attempt]:
    """The attempts so far, the present one last."""
    found = (read_json(paths.job_folder(job) / STATE) or {}).get("attempts", [])
    return [item if isinstance(item, dict) else {"started": float(item)} for item in found]  # once only the time


def begin(job: "Job", mark: str) -> Attempt:
    """Notes the start of an attempt, and with which code; warns if it goes on from what other code has made."""
    warn_of_other_code(job)
    close(job)
    now = {"started": time.time(), "ended": None, **code_state()}
    state = {"fingerprint": mark, "run": manifest.run_id(job, mark), "attempts": [*read(job), now]}
    write_json(paths.job_folder(job) / STATE, state)
    return now


def close(job: paths.JobName) -> None:
    """Gives the last attempt, if it died without a word, the time of its last sign of life for its end.

    Call it before what a new attempt begins with removes the signs.
    """
    folder = paths.job_folder(job)
    state, attempts = read_json(folder / STATE), read(job)
    if state is None or not attempts or attempts[-1].get("ended") is not None:
        return
    signs = [folder / "exit.json", folder / "progress.json", *(folder / "work").rglob("*")]
    times = [_modified(path) for path in signs]
    attempts[-1]["ended"] = max([attempts[-1]["started"], *times])
    write_json(folder / STATE, {**state, "attempts": attempts})


def finished(job: paths.JobName, ended: float) -> list[Attempt]:
    """What a record says of the attempts: start, seconds and code of each, the last of which ends at `ended`."""
    return [
        {
            **{key: attempt.get(key) for key in ("started", "commit", "dirty", "code")},
            "seconds": round(max(0.0, (attempt.get("ended") or ended) - attempt["started"]), 3),
        }
        for attempt in read(job)
    ]


def warn_of_other_code(job: paths.JobName) -> None:
    """Says on stderr, in one line, that the checkpoints of a job were made by other code than there is now."""
    attempts, folder = read(job), paths.job_folder(job)
    if not attempts or not any((folder / "work").glob("*")) or attempts[-1].get("code") == sources_digest():
        return
    print(
        f"warning: {job.name}: what it has so far was made by other code ({describe(attempts[-1])}; now "
        f"{describe(code_state())}): training goes on from its checkpoints, an evaluation measures its points again; "
        f"to start anew, remove {paths.relative(folder)}",
        file=sys.stderr,
        flush=True,
    )


def describe(code: Mapping[str, Any]) -> str:
    """Code in words: `1a2b3c4d of commit 5e6f7a8 + uncommitted changes`."""
    commit = f"commit {code['commit'][:7]}" if code.get("commit") else "no commit"
    return f"{(code.get('code') or 'unknown')[:8]} of {commit}{' + uncommitted changes' if code.get('dirty') else ''}"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
