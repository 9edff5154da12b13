# SPDX-License-Identifier: Apache-2.0
"""The attempts at a job that its working folder remembers (state.json): when each ran, and with which code.

The fingerprint of a job holds no code. What a job was made with is therefore written down attempt by attempt; `pipeline.unfinished`
decides whether another attempt may go on from it.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import manifest, paths
from pipeline.files import read_json, write_json
from pipeline.provenance import code_state

if TYPE_CHECKING:
    from pipeline.registry import Job

STATE = "state.json"
Attempt = dict[str, Any]  # started, ended (None while it runs), commit, dirty, code


def read(job: paths.JobName) -> list[Attempt]:
    """The attempts so far, the present one last."""
    found = (read_json(paths.job_folder(job) / STATE) or {}).get("attempts", [])
    return [item if isinstance(item, dict) else {"started": float(item)} for item in found]  # once only the time


def begin(job: "Job", mark: str, made_with: Mapping[str, str]) -> Attempt:
    """Notes the start of an attempt, with which parameters and inputs, and with which code."""
    close(job)
    now = {"started": time.time(), "ended": None, **code_state()}
    state = {
        "fingerprint": mark,
        "run": manifest.run_id(job, mark),
        "made_with": dict(made_with),
        "attempts": [*read(job), now],
    }
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


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
