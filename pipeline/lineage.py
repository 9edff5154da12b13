# SPDX-License-Identifier: Apache-2.0
"""The record of one execution: a journal beside the job, which `pipeline.tracking` sends to MLflow.

Everything a job has to tell is first appended to `runs/<scale>/.lineage/<job>/journal.jsonl`. A thread sends what is
new every few seconds. So training never waits for the tracking store, and what a lost or locked store did not take is
still there: it is sent at the end of the job, by the next job, or by `python -m pipeline status --replay`. The folder
also holds the MLflow run's id (run.json), which a resumed job goes on with; it is removed when all has been sent.
"""

import importlib
import json
import math
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import manifest, paths
from pipeline.files import host, read_json, sha256_file, user, write_json
from pipeline.provenance import place, shown_params, trained_as
from pipeline.ranks import Silent

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job

SEND_SECONDS = 3.0
FLUSH_SECONDS = 20.0
ARTIFACT_BYTES = 20 * 2**20
SENT = "sent"  # beside the journal: how much of it the store has, and whether the run was marked KILLED since


def folder_of(job: paths.JobName) -> Path:
    """Where the journal of the job's last execution lies."""
    return paths.runs(job.scale) / ".lineage" / job.name


class Run:
    """One execution as a tracker: everything goes to the journal and, in the background, from there to MLflow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "journal.jsonl"
        whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
        self._journal = file.open("a", encoding="utf-8", buffering=1)
        if not whole:
            self._journal.write("\n")  # ends a line that a kill has cut off
        self._write_lock = threading.Lock()
        self._seen = _last_steps(file)
        self._broken = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_loop, name="tracking", daemon=True)
        self._artifacts = 0

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the store has been reached for the first time."""
        header = read_json(self.folder / "run.json")
        return None if header is None else header.get("mlflow_run")

    def begin(self, tags: Mapping[str, str]) -> None:
        """Notes the start of an attempt, and starts sending."""
        self._append({"event": "begin", "tags": dict(tags)})
        # Imported here and not in the thread: two threads that import large packages at once can meet half-made ones.
        try:
            importlib.import_module("pipeline.replay")
        except ImportError as error:
            print(f"warning: MLflow cannot be imported ({error}); records stay in {self.folder}", file=sys.stderr)
            return
        self._thread.start()

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars; those that an attempt before this one has recorded at this step are not repeated."""
        new = {key: float(value) for key, value in values.items() if step > self._seen.get(key, -1)}
        if new:
            self._append({"event": "metrics", "step": int(step), "values": _safe(new)})

    def log_model(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars about the model that this run measures: for this run, and for its parent, which made the model."""
        self._append({"event": "model", "step": int(step), "values": _safe(values)})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Records a small file as it is now; a large one by its size and digest only."""
        size = path.stat().st_size
        if size > ARTIFACT_BYTES:
            return self.set_tag(f"file.{path.name}", f"{size} bytes, SHA-256 {sha256_file(path)}")
        self._artifacts += 1
        copy = self.folder / "files" / f"{time.time_ns()}-{self._artifacts}" / path.name
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        except OSError as error:
            return self._warn(error)
        self._append({"event": "artifact", "file": copy.relative_to(self.folder).as_posix(), "folder": folder})
        return None

    def set_tag(self, key: str, value: str) -> None:
        """Records a fact about the run."""
        self._append({"event": "tag", "tags": {key: str(value)}})

    def finish(self, made: Path, metrics: Mapping[str, float]) -> None:
        """Ends the run well, with the digests of what it made (its manifest), and sends all that is left."""
        files = (read_json(made) or {}).get("files", {})
        tags = {f"scm.output.{name}": entry["sha256"] for name, entry in list(files.items())[:20]}
        self._append({"event": "tag", "tags": {"scm.output": manifest.digest(made), **tags}})
        self._append({"event": "metrics", "step": 0, "values": {f"job/{key}": value for key, value in metrics.items()}})
        self.log_artifact(made)
        self._end("FINISHED")

    def fail(self, status: str, reason: str) -> None:
        """Ends an attempt badly: FAILED, or KILLED when it was cancelled, or SCHEDULED when it will be resumed."""
        self._append({"event": "tag", "tags": {"scm.failure": reason[:500]}})
        self._end(status)

    def close(self) -> None:
        """Removes the journal if everything has been sent; call it when the job's result is staged."""
        from pipeline.tracking import remove_if_sent

        remove_if_sent(self.folder)

    def _end(self, status: str) -> None:
        self._append({"event": "end", "status": status})
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(FLUSH_SECONDS)
        try:
            self._journal.close()
        except OSError as error:  # what a full disk did not take is tried once more, and must not hide what went wrong
            self._warn(error)

    def _append(self, event: dict[str, Any]) -> None:
        line = json.dumps({"time": time.time_ns() // 1_000_000, **event}, allow_nan=False) + "\n"
        with self._write_lock:
            try:
                self._journal.write(line)
            except OSError as error:
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        # A full disk stops the job where it would lose work (checkpoints), not here.
        if not self._broken:
            print(f"warning: records are lost: {self.folder.name}: {error.strerror}", file=sys.stderr)
        self._broken = True

    def _send_loop(self) -> None:
        from pipeline import tracking
        from pipeline.replay import replay

        failures, replayed, ended = 0, False, False
        while not ended:
            self._stop.wait(SEND_SECONDS if failures == 0 else min(60.0, 5.0 * 2**failures))
            ended = self._stop.is_set()
            try:
                tracking.send(self.folder)
                if not replayed:
                    replayed = True
                    replay()
            except Exception as error:
                # Whatever the store or its client throws: the journal has it all, and training goes on.
                failures += 1
                if failures == 1 or ended:
                    words = " ".join(str(error).split())[:200]
                    print(
                        f"warning: the tracking store does not answer ({type(error).__name__}: {words}); "
                        "records are kept, and sent by the next job or `python -m pipeline status --replay`",
                        file=sys.stderr,
                    )
            else:
                failures = 0


def _safe(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN: a diverged loss is recorded as the word that float() reads."""
    return {key: float(value) if math.isfinite(value) else str(float(value)) for key, value in values.items()}


class NoRun(Silent):
    """A run that is not tracked (SCM_TRACKING=off)."""

    run_id: str | None = None

    def finish(self, made: Path, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def fail(self, status: str, reason: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def open_run(
    job: "Job",
    params: "Params",
    inputs: Mapping[str, manifest.Input],
    mark: str,
    code: Mapping[str, Any],
    launcher: str,
    job_id: str,
    resumed: bool,
) -> Run | NoRun:
    """Opens the run of a job: the one of the attempt before it, if it is resumed, else a new one.

    `code` is what `provenance.code_state` says of the sources.
    """
    if os.environ.get("SCM_TRACKING") == "off":
        return NoRun()
    folder = folder_of(job)
    header = read_json(folder / "run.json")
    if header is not None and not (resumed and header["fingerprint"] == mark):
        # Of another execution, and not sent yet: out of the way, for the next replay.
        folder.rename(folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}"))
        header = None
    if header is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", _header(job, params, inputs, mark))
    run = Run(folder)
    run.begin(
        {
            "mlflow.source.git.commit": code["commit"] or "none",
            "scm.git.dirty": str(code["dirty"]),
            "scm.code": code["code"],
            "scm.host": host(),
            "scm.pid": str(os.getpid()),
            "scm.launcher": launcher,
            "scm.job_id": job_id,
        }
    )
    return run


def _header(job: "Job", params: "Params", inputs: Mapping[str, manifest.Input], mark: str) -> dict[str, Any]:
    primary = next(iter(inputs.values()), None)
    run = manifest.run_id(job, mark)
    return {
        "fingerprint": mark,
        "job": job.name,
        "scale": job.scale,
        "run": run,
        "token": uuid.uuid4().hex,
        "mlflow_run": None,
        "started": time.time_ns() // 1_000_000,
        "parent": {"run": primary.run, "job": primary.job} if primary and primary.run else None,
        "params": shown_params(job, params),
        "tags": {
            "mlflow.runName": run,
            "mlflow.source.name": job.command,
            "mlflow.source.type": "JOB",
            "mlflow.user": user(),
            "scm.run": run,
            "scm.scale": job.scale,
            "scm.stage": job.stage,
            "scm.fingerprint": mark,
            "scm.place": place(),
            "mlflow.note.content": f"`{job.command}` makes `{job.outputs[0].as_posix()}`",
            **trained_as(job, params, inputs),
            **{f"scm.{axis}": value for axis, value in job.axes.items()},
            **{f"scm.input.{name}": item.run or item.digest[:16] for name, item in inputs.items()},
        },
        "inputs": [
            {"context": name, "name": item.run or item.path.name, "digest": item.digest, "path": str(item.path)}
            for name, item in inputs.items()
        ],
    }


def _last_steps(journal: Path) -> dict[str, int]:
    """The last step recorded for each metric by earlier attempts."""
    seen: dict[str, int] = {}
    for event in events(journal):
        if event["event"] == "metrics":
            seen |= {key: max(event["step"], seen.get(key, -1)) for key in event["values"]}
    return {key: step for key, step in seen.items() if not key.startswith("job/")}


def events(journal: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; the last line of a killed job may be cut off."""
    found = []
    try:
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def sent_bytes(folder: Path) -> int:
    """How much of a journal the store has."""
    return int((read_json(folder / SENT) or {"bytes": 0})["bytes"])


def unsent(folder: Path) -> int:
    """The bytes of whole lines that the store has not got; what a kill has cut off nobody will get."""
    try:
        with (folder / "journal.jsonl").open("rb") as f:
            f.seek(sent_bytes(folder))
            return f.read().rfind(b"\n") + 1
    except FileNotFoundError:
        return 0


def died(folder: Path) -> dict[str, Any] | None:
    """The last event of a journal that has no end, unless the run was marked KILLED since; else None."""
    found = events(folder / "journal.jsonl")
    if not found or found[-1]["event"] == "end" or (read_json(folder / SENT) or {}).get("killed"):
        return None
    return found[-1]
