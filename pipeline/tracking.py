# SPDX-License-Identifier: Apache-2.0
"""Sends journals to MLflow.

Only jobs and `status --replay` (`pipeline.replay`) import this module: MLflow costs a second and a hundred megabytes.
"""

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.files import Lock, read_json, write_json
from pipeline.lineage import SENT, events, sent_bytes

# Before MLflow is imported: nothing may reach for the network by itself, and a lost server must not hold up a job's end.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

if TYPE_CHECKING:
    from mlflow.entities import Run

NOTE = """\
Runs form a tree: below a model's run are its evaluations, below a teacher's its students.
Curves are over images seen: `loss`, `tangent_norm`, `grad_norm` of a training; `eval/<steps>-step/fid` (`_se`, `guidance`, `nfe`,
`precision`, `recall`) of what was measured of a model, on its own run and on that of its evaluation; `eval/fid` at its most steps.
Tags to filter and group by: `scm.stage`, `scm.slot`, `scm.size`, `scm.method` (the name in params.yaml), `scm.objective`, `scm.seed`.
`select/…` and `report/…` of an evaluation are over guidance, in hundredths. More: docs/runs.md."""
BATCH = 500  # records per request; MLflow takes at most 1,000, of which 100 parameters and 100 tags
_clients: dict[str, MlflowClient] = {}


def uri() -> str:
    """The tracking store: MLFLOW_TRACKING_URI, else mlflow.db in the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.root() / 'mlflow.db'}"


def client() -> MlflowClient:
    """MLflow's client; creates the database on first use, once, however many jobs start together."""
    where = uri()
    if where not in _clients:
        with _store_lock():
            if where.startswith("sqlite:///"):
                file = Path(where.removeprefix("sqlite:///"))
                file.parent.mkdir(parents=True, exist_ok=True)
                # Write-ahead logging, a property of the file: a reader (the UI) and writers do not block each other.
                with contextlib.closing(sqlite3.connect(file, timeout=30)) as database:
                    database.execute("PRAGMA journal_mode=WAL")
            made = MlflowClient(tracking_uri=where)
            made.search_experiments(max_results=1)  # creates or checks the tables
        _clients[where] = made
    return _clients[where]


@contextlib.contextmanager
def _store_lock() -> Iterator[None]:
    """One process at a time creates the database, experiments and root runs."""
    with Lock(paths.root() / "runs" / ".tracking.lock").held():
        yield


@contextlib.contextmanager
def sending(folder: Path) -> Iterator[None]:
    """One sender at a time for a job: what is sent later, such as RUNNING after KILLED, has the last word."""
    header = read_json(folder / "run.json") or {"job": folder.name}
    job = SimpleNamespace(scale=folder.parents[1].name, name=header["job"])
    with Lock(paths.lock_file(job, "sending")).held():
        yield


def send(folder: Path) -> None:
    """Sends what is new in a journal; raises whatever MLflow raises when the store cannot take it.

    Sending twice does no harm: a record that is sent again has the same time, step and value.
    """
    with sending(folder):
        send_new(folder)


def send_new(folder: Path) -> None:
    """`send` for a caller that holds `sending`."""
    header = read_json(folder / "run.json")
    if header is None:
        return
    run = header["mlflow_run"] or _create(folder, header)
    try:
        _send_lines(folder, run)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        # The database was deleted meanwhile: the journal has it all, from the first line on.
        header["mlflow_run"] = None
        write_json(folder / "run.json", header)
        (folder / SENT).unlink(missing_ok=True)
        _send_lines(folder, _create(folder, header))


def _send_lines(folder: Path, run: str) -> None:
    journal = folder / "journal.jsonl"
    while True:
        offset = sent_bytes(folder)
        with journal.open("rb") as f:
            f.seek(offset)
            data = f.read(2**18)
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return
        _send_events(folder, run, [e for e in map(_parse, data.splitlines()) if e is not None])
        write_json(folder / SENT, {"bytes": offset + len(data)})


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None  # cut off by a kill, and completed by the next attempt's first line
    return value if isinstance(value, dict) else None


def _send_events(folder: Path, run: str, found: list[dict[str, Any]]) -> None:
    store = client()
    metrics: list[Metric] = []
    about: list[Metric] = []  # the model that this run measures
    tags: dict[str, str] = {}

    def flush() -> None:
        for start in range(0, len(metrics), BATCH):
            store.log_batch(run, metrics=metrics[start : start + BATCH])
        if about and (model := _model_run(run)) is not None:
            for start in range(0, len(about), BATCH):
                store.log_batch(model, metrics=about[start : start + BATCH])
        items = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(items), 100):
            store.log_batch(run, tags=items[start : start + 100])
        metrics.clear()
        about.clear()
        tags.clear()

    for event in found:
        kind = event["event"]
        if kind in ("metrics", "model"):
            found_here = [Metric(k, float(v), event["time"], event["step"]) for k, v in event["values"].items()]
            metrics += found_here
            about += found_here if kind == "model" else []
        elif kind in ("tag", "begin"):
            tags |= event["tags"]
            if kind == "begin":
                store.update_run(run, status="RUNNING")
        elif kind == "artifact":
            file = folder / event["file"]
            if file.exists():
                store.log_artifact(run, str(file), event["folder"] or None)
                shutil.rmtree(file.parent)
        elif kind == "end":
            flush()
            store.set_terminated(run, event["status"], event["time"])
    flush()


def _model_run(run: str) -> str | None:
    """The run of the model that a run measures, its parent; None if it is not in the store: it was made elsewhere, or deleted."""
    store = client()
    parent = store.get_run(run).data.tags.get("mlflow.parentRunId", "")
    if not parent or not _exists(parent):
        return None
    found = store.get_run(parent)
    return None if "scm.root" in found.data.tags or found.info.lifecycle_stage != "active" else parent


def _create(folder: Path, header: dict[str, Any]) -> str:
    """The MLflow run of a journal: created with its parameters, tags, inputs and parent."""
    store = client()
    experiment, root = scale_root(header["scale"])
    known = _find(experiment, "scm.token", header["token"]) if header.get("creating") else None
    if known is None:
        # Should this process die before the id is written, the next one finds the run by its token.
        write_json(folder / "run.json", {**header, "creating": True})
        tags = {**header["tags"], "scm.token": header["token"], "mlflow.parentRunId": _parent(experiment, root, header)}
        known = store.create_run(experiment, start_time=header["started"], tags=tags, run_name=header["run"])
    run: str = known.info.run_id
    params = [Param(key[:250], value[:6000]) for key, value in header["params"].items()]
    for start in range(0, len(params), 100):
        store.log_batch(run, params=params[start : start + 100])
    inputs = [
        DatasetInput(
            Dataset(name=item["name"], digest=item["digest"][:16], source_type="local", source=item["path"]),
            [InputTag("mlflow.data.context", item["context"])],
        )
        for item in header["inputs"]
    ]
    if inputs:
        store.log_inputs(run, inputs)
    header |= {"mlflow_run": run, "creating": False}
    write_json(folder / "run.json", header)
    return run


def scale_root(scale: str) -> tuple[str, str]:
    """The experiment `scm-<scale>` and the run at the top of its tree, made if they are not there."""
    store, name = client(), f"scm-{scale}"
    with _store_lock():
        experiment = store.get_experiment_by_name(name)
        if experiment is None:
            local = uri().startswith("sqlite:")
            artifacts = (paths.root() / "mlartifacts" / name).as_uri() if local else None
            # The kind spares the interface its question; the note stands above the list of runs.
            tags = {"mlflow.note.content": NOTE, "mlflow.experimentKind": "custom_model_development"}
            experiment_id = store.create_experiment(name, artifact_location=artifacts, tags=tags)
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                store.restore_experiment(experiment_id)
        root = _find(experiment_id, "scm.root", scale)
        if root is None:
            tags = {"scm.root": scale, "scm.scale": scale, "mlflow.source.name": "params.yaml"}
            root = store.create_run(experiment_id, tags=tags, run_name=name)
            store.set_terminated(root.info.run_id)
    return experiment_id, root.info.run_id


def _find(experiment: str, tag: str, value: str) -> "Run | None":
    found = client().search_runs(
        [experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time DESC"], max_results=1
    )
    return found[0] if found else None


def _parent(experiment: str, root: str, header: dict[str, Any]) -> str:
    """The MLflow run of the primary input, by its job's record or its run id; the scale's root where there is none."""
    parent = header["parent"]
    if parent is None:
        return root
    record = read_json(paths.record_file(SimpleNamespace(scale=header["scale"], name=parent["job"]))) or {}
    if record.get("run") == parent["run"] and record.get("mlflow_run") and _exists(record["mlflow_run"]):
        return str(record["mlflow_run"])
    made = _find(experiment, "scm.run", parent["run"])
    return made.info.run_id if made is not None else root


def _exists(run: str) -> bool:
    try:
        client().get_run(run)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def remove_if_sent(folder: Path) -> bool:
    """Removes the journal of an execution that ended well, once all of it has been sent."""
    journal = folder / "journal.jsonl"
    header, found = read_json(folder / "run.json"), events(journal)
    if header is None or not found or found[-1].get("status") != "FINISHED":
        return False
    if sent_bytes(folder) < journal.stat().st_size:
        return False
    _complete_record(header)
    shutil.rmtree(folder)
    return True


def _complete_record(header: dict[str, Any]) -> None:
    """Writes the MLflow run into the record of a job that was published before the store could be reached."""
    file = paths.record_file(SimpleNamespace(scale=header["scale"], name=header["job"]))
    record = read_json(file)
    if record is not None and record.get("run") == header["run"] and record.get("mlflow_run") is None:
        write_json(file, {**record, "mlflow_run": header["mlflow_run"]})
