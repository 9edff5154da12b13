# SPDX-License-Identifier: Apache-2.0
"""Sends what the tracking store missed, and marks the runs whose process has died.

Jobs do this for one another, `python -m pipeline status --replay` by hand. Other jobs start and end while it goes on:
what a decision rests on is read after the store has been asked, and again right before it is acted on.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline import paths
from pipeline.files import Lock, is_locked, read_json, write_json
from pipeline.lineage import SENT, died, sent_bytes, unsent
from pipeline.provenance import place
from pipeline.tracking import client, remove_if_sent, send_new, sending

DIED = "the process died without a word (killed, out of memory, or the machine went down)"


def replay() -> list[str]:
    """Sends the journals of jobs that no longer run, and marks runs that died; returns a line for each.

    One process at a time does this; another one that comes meanwhile returns at once.
    """
    lock = Lock(paths.root() / "runs" / ".replay.lock")
    if not lock.acquire(wait=False):
        return []
    lines = []
    try:
        # Parents started before their children, so that a child finds its parent's run.
        for folder, header in sorted(_headers().items(), key=lambda item: item[1]["started"]):
            if not _running(folder, header):
                line = _replay(folder, header)
                if line:
                    lines.append(line)
        lines += _mark_orphans()
    finally:
        lock.release()
    return lines


def _headers() -> dict[Path, dict[str, Any]]:
    """Every journal's folder and run.json, as they are now."""
    found = {file.parent: read_json(file) for file in (paths.root() / "runs").glob("*/.lineage/*/run.json")}
    return {folder: header for folder, header in found.items() if header is not None}


def _running(folder: Path, header: dict[str, Any]) -> bool:
    """Whether the job goes on with this journal; one that was renamed is nobody's any more."""
    job = SimpleNamespace(scale=header["scale"], name=header["job"])
    return folder.name == header["job"] and is_locked(paths.lock_file(job, "run"))


def _replay(folder: Path, header: dict[str, Any]) -> str | None:
    with sending(folder):
        before = sent_bytes(folder)
        send_new(folder)
        sent = sent_bytes(folder) != before
        # Looked at after the sending: a job that takes the lock later notes its start later, too, and waits until this
        # is over to send it. So RUNNING comes after KILLED.
        last = died(folder)
        killed = last is not None and not _running(folder, header)
        if killed and last is not None:
            run = (read_json(folder / "run.json") or header)["mlflow_run"]
            client().set_tag(run, "scm.failure", DIED)
            client().set_terminated(run, "KILLED", last["time"])
            # Beside the number of bytes, so that it holds until the job notes something new.
            write_json(folder / SENT, {"bytes": sent_bytes(folder), "killed": True})
        removed = remove_if_sent(folder)
        if not removed and folder.name != header["job"] and not unsent(folder) and died(folder) is None:
            shutil.rmtree(folder)  # no later attempt will go on with it
    if killed:
        return f"{header['run']}: marked KILLED"
    return f"{header['run']}: sent" if sent else None


def _mark_orphans() -> list[str]:
    """Marks RUNNING runs of this copy of the repository that have no journal any more (runs/ was deleted)."""
    lines = []
    for experiment in client().search_experiments(filter_string="name LIKE 'scm-%'"):
        query = f"attributes.status = 'RUNNING' AND tags.`scm.place` = '{place()}'"
        for run in client().search_runs([experiment.experiment_id], query):
            # A run is created after its token has been written to run.json, and ended before that is removed.
            if run.data.tags.get("scm.token") in {header["token"] for header in _headers().values()}:
                continue
            if client().get_run(run.info.run_id).info.status != "RUNNING":
                continue
            client().set_terminated(run.info.run_id, "KILLED")
            lines.append(f"{run.info.run_name}: marked KILLED (its working folder is gone)")
    return lines
