# SPDX-License-Identifier: Apache-2.0
"""Lineage: one MLflow run per execution, linked to the runs that made its inputs, whatever is killed or unreachable."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # every job imports MLflow

ON = {"SCM_TRACKING": "on"}


@pytest.fixture(autouse=True)
def store(request: pytest.FixtureRequest, repo: Any, empty_store: Path) -> None:
    """Most tests start with a database; the one where several jobs start together has none."""
    if "together" not in request.node.name:
        shutil.copyfile(empty_store, repo.root / "mlflow.db")


def query(repo: Any, sql: str) -> list[tuple[Any, ...]]:
    """Rows of the tracking database, read without MLflow."""
    with sqlite3.connect(repo.root / "mlflow.db", timeout=30) as database:
        return database.execute(sql).fetchall()


def runs(repo: Any) -> dict[str, dict[str, Any]]:
    """Every run by name: id, status, tags, params, metrics (key -> list of (step, value))."""
    found: dict[str, dict[str, Any]] = {}
    for uuid, name, status in query(repo, "SELECT run_uuid, name, status FROM runs ORDER BY start_time"):
        assert name not in found, f"two runs are called {name}"
        metrics: dict[str, list[tuple[int, float]]] = {}
        for key, step, value in query(
            repo, f"SELECT key, step, value FROM metrics WHERE run_uuid='{uuid}' ORDER BY step"
        ):
            metrics.setdefault(key, []).append((step, value))
        found[name] = {
            "id": uuid,
            "status": status,
            "tags": dict(query(repo, f"SELECT key, value FROM tags WHERE run_uuid='{uuid}'")),
            "params": dict(query(repo, f"SELECT key, value FROM params WHERE run_uuid='{uuid}'")),
            "metrics": metrics,
            "inputs": query(
                repo,
                "SELECT d.name, d.digest FROM inputs i JOIN datasets d ON d.dataset_uuid = i.source_id "
                f"WHERE i.destination_id='{uuid}'",
            ),
        }
    return found


def one(found: dict[str, dict[str, Any]], stage: str) -> dict[str, Any]:
    """The only run of a stage."""
    return next(run for name, run in found.items() if run["tags"].get("scm.stage") == stage)


def record(repo: Any, name: str) -> dict[str, Any]:
    """The record of a published job."""
    return json.loads((repo.root / f"runs/tiny/.records/{name}.json").read_text())


def test_a_chain_of_runs(repo: Any) -> None:
    for stage in ("first", "second", "report"):
        done = repo.run(stage, "inline", **ON)
        assert (done.code, done.err) == (0, ""), done.err
    found = runs(repo)
    root, first, second, report = found["scm-tiny"], one(found, "first"), one(found, "second"), one(found, "report")
    assert {run["status"] for run in found.values()} == {"FINISHED"}
    assert first["tags"]["mlflow.parentRunId"] == root["id"]
    assert second["tags"]["mlflow.parentRunId"] == first["id"]
    assert report["tags"]["mlflow.parentRunId"] == second["id"]
    assert second["metrics"]["loss"] == [(1, 0.5), (2, 0.25)]
    assert second["params"] == {"seed": "0", "value": "1"}
    assert second["tags"]["kind"] == "fake"
    assert second["tags"]["scm.input.first"] == record(repo, "first")["run"]
    assert second["inputs"] == [(record(repo, "first")["run"], second["inputs"][0][1])]
    assert record(repo, "second")["mlflow_run"] == second["id"]
    assert list(repo.root.glob("mlartifacts/scm-tiny/*/artifacts/tables/size.txt"))
    assert list((repo.root / "runs/tiny").glob(".lineage/*")) == []
    assert query(repo, "PRAGMA journal_mode") == [("wal",)]


MEASURING = """
def run(ctx):
    (ctx.out / "size.txt").write_text("256")
    ctx.tracker.log_model(1280, {"eval/fid": 4.5, "eval/1-step/fid": float("nan")})
    ctx.tracker.log_model(2560, {"eval/fid": 3.5})
"""


def test_what_is_measured_of_a_model_is_on_the_models_run_too(repo: Any) -> None:
    """On that of the primary input, over images seen; measured again, the last numbers stand. A model's run that is gone does no harm."""
    (repo.root / "pipeline/stages/second.py").write_text(MEASURING)
    for stage in ("first", "second"):
        done = repo.run(stage, "inline", **ON)
        assert (done.code, done.err) == (0, ""), done.err
    found = runs(repo)
    for run in (one(found, "first"), one(found, "second")):
        assert run["metrics"]["eval/fid"] == [(1280, 4.5), (2560, 3.5)]
        assert run["tags"]["scm.seed"] == "0"
    assert one(found, "first")["status"] == "FINISHED"
    assert "eval/fid" not in found["scm-tiny"]["metrics"]
    with sqlite3.connect(repo.root / "mlflow.db", timeout=30) as database:
        database.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (one(found, "first")["id"],))
    (repo.root / "pipeline/stages/second.py").write_text(MEASURING.replace("3.5", "2.5"))
    shutil.rmtree(repo.root / "runs/tiny/second")
    done = repo.run("second", "inline", **ON)
    assert (done.code, done.err) == (0, ""), done.err
    assert list((repo.root / "runs/tiny").glob(".lineage/*")) == []


def test_the_experiment_says_how_to_compare(repo: Any) -> None:
    assert repo.run("first", "inline", **ON).code == 0
    tags = dict(
        query(
            repo,
            "SELECT t.key, t.value FROM experiment_tags t JOIN experiments e USING (experiment_id) WHERE e.name = 'scm-tiny'",
        )
    )
    assert "eval/<steps>-step/fid" in tags["mlflow.note.content"]
    assert (
        one(runs(repo), "first")["tags"]["mlflow.note.content"]
        == "`python -m pipeline run first scale=tiny` makes `runs/tiny/first`"
    )


def test_a_killed_job_keeps_its_run(repo: Any) -> None:
    repo.run("first", "inline")
    job = repo.start("steps", "inline", **ON, STEP_SECONDS="1")  # time enough to be killed after MLflow has been loaded
    header = repo.root / "runs/tiny/.lineage/steps/run.json"
    repo.wait_for(lambda: header.exists() and json.loads(header.read_text())["mlflow_run"], 40)
    before = json.loads(header.read_text())["mlflow_run"]
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert one(runs(repo), "steps")["status"] == "RUNNING"
    done = repo.run("steps", "inline", **ON)
    assert done.code == 0, done.err
    run = one(runs(repo), "steps")
    assert (run["id"], run["status"]) == (before, "FINISHED")
    # Every step once, also those that the killed attempt had recorded after its last checkpoint.
    assert [step for step, _ in run["metrics"]["loss"]] == [64 * step for step in range(1, 31)]


def test_a_run_that_died_is_marked_by_the_next_job(repo: Any) -> None:
    job = repo.start("sleeper", "inline", **ON)
    header = repo.root / "runs/tiny/.lineage/sleeper/run.json"
    repo.wait_for(lambda: header.exists() and json.loads(header.read_text())["mlflow_run"], 40)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert repo.run("first", "inline", **ON).code == 0
    run = one(runs(repo), "sleeper")
    assert run["status"] == "KILLED"
    assert "died" in run["tags"]["scm.failure"]


def test_failed_and_cancelled_runs_are_marked(repo: Any) -> None:
    assert repo.run("broken", "inline", **ON).code == 1
    job = repo.start("sleeper", "inline", **ON)
    header = repo.root / "runs/tiny/.lineage/sleeper/run.json"
    repo.wait_for(lambda: header.exists() and json.loads(header.read_text())["mlflow_run"], 40)
    job.terminate()
    assert job.wait(timeout=30) == 130
    found = runs(repo)
    assert one(found, "broken")["status"] == "FAILED"
    assert "missing thing" in one(found, "broken")["tags"]["scm.failure"]
    assert one(found, "sleeper")["status"] == "KILLED"


def test_a_job_that_dies_hard_is_marked_by_its_waiter(repo: Any) -> None:
    assert repo.run("dying", "local", timeout=90, **ON).code == 1
    assert one(runs(repo), "dying")["status"] == "KILLED"


def test_records_are_replayed_when_the_store_is_back(repo: Any) -> None:
    away = {**ON, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    started = time.monotonic()
    for stage in ("first", "second"):
        done = repo.run(stage, "inline", **away)
        assert done.code == 0
        assert "records are kept" in done.err
    assert time.monotonic() - started < 60
    assert record(repo, "second")["mlflow_run"] is None
    replayed = repo.python("from pipeline.replay import replay; print(replay())", **ON)
    assert replayed.code == 0, replayed.err
    found = runs(repo)
    first, second = one(found, "first"), one(found, "second")
    assert second["tags"]["mlflow.parentRunId"] == first["id"]
    assert (first["status"], second["status"]) == ("FINISHED", "FINISHED")
    assert second["metrics"]["loss"] == [(1, 0.5), (2, 0.25)]
    assert record(repo, "second")["mlflow_run"] == second["id"]
    assert list((repo.root / "runs/tiny").glob(".lineage/*")) == []


def test_a_server_that_dies_in_the_middle(repo: Any) -> None:
    """A real tracking server, killed while a job trains: the job trains on, and its records are there when the server is back."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{repo.root / 'mlflow.db'}", "--no-serve-artifacts"]

    def server() -> "subprocess.Popen[bytes]":
        log = (repo.root / "server.log").open("ab")
        with log:
            process = subprocess.Popen(command, cwd=repo.root, start_new_session=True, stdout=log, stderr=log)
        repo.wait_for(lambda: answers(port), seconds=60)
        return process

    there = {**ON, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    first = server()
    try:
        repo.run("first")
        go = repo.root / "go"
        job = repo.start("steps", STEP_SECONDS="0.4", STEP_HOLD=str(go), **there)
        repo.wait_for(lambda: query(repo, "SELECT count(*) FROM metrics") > [(2,)], seconds=60)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    sent = len(one(runs(repo), "steps")["metrics"]["loss"])
    go.touch()
    assert job.wait(60) == 0
    assert 0 < sent < 30
    second = server()
    try:
        assert repo.python("from pipeline.replay import replay; print(replay())", **there).code == 0
    finally:
        os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    run = one(runs(repo), "steps")
    assert run["status"] == "FINISHED"
    assert [step for step, _ in run["metrics"]["loss"]] == [64 * (k + 1) for k in range(30)]


def answers(port: int) -> bool:
    """Whether something listens there."""
    with contextlib.closing(socket.socket()) as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_locked_database_stops_nothing(repo: Any) -> None:
    assert repo.run("first", "inline", **ON).code == 0
    with sqlite3.connect(repo.root / "mlflow.db") as database:
        database.execute("BEGIN EXCLUSIVE")
        done = repo.run("second", "inline", timeout=90, **ON)
        database.rollback()
    assert done.code == 0
    assert (repo.root / "runs/tiny/second/size.txt").exists()
    assert repo.python("from pipeline.replay import replay; print(replay())", **ON).code == 0
    assert one(runs(repo), "second")["metrics"]["loss"] == [(1, 0.5), (2, 0.25)]


def test_jobs_that_start_together_share_one_root(repo: Any) -> None:
    jobs = [repo.start(stage, "inline", **ON) for stage in ("first", "silent", "broken")]
    for job in jobs:
        job.wait(timeout=90)
    # On a busy machine the store may have been taken for so long that a job has kept its records.
    assert repo.python("from pipeline.replay import replay; print(replay())", **ON).code == 0
    found = runs(repo)
    assert len(found) == 4
    assert {run["tags"].get("mlflow.parentRunId") for run in found.values()} == {None, found["scm-tiny"]["id"]}


def test_nothing_reaches_for_the_network(repo: Any) -> None:
    """Every connection attempt of a job is an error here."""
    (repo.root / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(self, address):\n"
        "    if self.family != socket.AF_UNIX:\n"
        "        open('connections', 'a').write(f'{address}\\n')\n"
        "        raise OSError('no network here')\n"
        "socket.socket.connect = refuse\n"
    )
    assert repo.run("first", "inline", **ON).code == 0
    assert not Path(repo.root / "connections").exists()


INTERLEAVED = """
import os
from pathlib import Path
from types import SimpleNamespace
from pipeline import lineage, manifest, params, paths, provenance, registry, replay, tracking
from pipeline.files import Lock, read_json
os.environ["SCM_TRACKING"] = "on"
loaded = params.load()
job = registry.find(loaded, "sleeper", {})
lineage.Run._send_loop = lambda self: None  # who sends what, and when, is said below

class Store:
    '''MLflow's client, with something that happens at a chosen call.'''
    def __init__(self, name, event, before):
        self.true, self.name, self.event, self.before = tracking.client(), name, event, before
    def __getattr__(self, name):
        def call(*args, **kwargs):
            if name == self.name and self.before:
                self.event()
            result = getattr(self.true, name)(*args, **kwargs)
            if name == self.name and not self.before:
                self.event()
            return result
        return call

def open_run(resumed=False):
    code = {"commit": None, "dirty": None, "code": "c" * 64}
    return lineage.open_run(job, loaded, {}, "f" * 64, code, "inline", "", resumed)

def status_of(folder=lineage.folder_of(job)):
    return tracking.client().get_run(read_json(folder / "run.json")["mlflow_run"]).info.status
"""


def test_a_run_that_starts_while_another_job_looks_for_dead_ones_is_left_alone(repo: Any) -> None:
    """It starts right before the store is asked for running runs; in `creating`, MLflow's id is not in run.json yet."""
    code = f"""{INTERLEAVED}
        def start():
            if not lineage.folder_of(job).exists():
                global run
                run = open_run()
                tracking.send(run.folder)
                header = read_json(run.folder / "run.json")
                lineage.write_json(run.folder / "run.json", {{**header, "mlflow_run": None, "creating": True}})
                ids.append(header["mlflow_run"])
        ids = []
        true = tracking.client()
        tracking.scale_root("tiny")
        replay.client = lambda: Store("search_runs", start, before=True)
        print(replay.replay())
        print(true.get_run(ids[0]).info.status)
    """
    done = repo.python(_script(code), **ON)
    assert done.out.splitlines() == ["[]", "RUNNING"], done.err


def test_a_run_that_ends_while_another_job_looks_for_dead_ones_stays_finished(repo: Any) -> None:
    code = f"""{INTERLEAVED}
        import shutil
        run = open_run()
        tracking.send(run.folder)
        id = read_json(run.folder / "run.json")["mlflow_run"]
        true = tracking.client()
        def end():
            if run.folder.exists():
                true.set_terminated(id, "FINISHED")
                shutil.rmtree(run.folder)
        lock = Lock(paths.lock_file(job, "run"))
        lock.acquire()
        replay.client = lambda: Store("search_runs", end, before=False)
        print(replay.replay())
        print(true.get_run(id).info.status)
    """
    done = repo.python(_script(code), **ON)
    assert done.out.splitlines() == ["[]", "FINISHED"], done.err


@pytest.mark.parametrize(
    ("when", "said"), [("before", "[]"), ("after", "['sleeper-ffffffff: marked KILLED']")], ids=["before", "after"]
)
def test_a_job_that_is_resumed_while_its_death_is_recorded_runs(repo: Any, when: str, said: str) -> None:
    """Whether it begins again before or after the last look at its lock, RUNNING is what the store hears last."""
    code = f"""{INTERLEAVED}
        run = open_run()
        tracking.send(run.folder)
        lock = Lock(paths.lock_file(job, "run"))
        again = []
        def resume():
            if not again:
                lock.acquire()
                again.append(open_run(resumed=True))
        replay.client = lambda: Store("set_terminated", resume, before=True)
        if {when!r} == "before":
            true_send = replay.send_new
            replay.send_new = lambda folder: (true_send(folder), resume())
        print(replay.replay())
        tracking.send(run.folder)
        print(status_of())
    """
    done = repo.python(_script(code), **ON)
    assert done.out.splitlines() == [said, "RUNNING"], done.err


def _script(code: str) -> str:
    """The indented part after `INTERLEAVED` at the margin."""
    return INTERLEAVED + textwrap.dedent(code.removeprefix(INTERLEAVED))


def test_status_claims_only_what_the_store_has_not_got(repo: Any) -> None:
    away = {**ON, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}

    def claim() -> str:
        done = repo.python("from pipeline import __main__; __main__.main(['status'])")
        return "\n".join(line for line in done.out.splitlines() if "has not got" in line)

    assert repo.run("broken", "inline", **ON).code == 1
    assert claim() == ""  # all of it was sent, though the journal stays for the attempt that goes on with it
    assert repo.run("broken", "inline", **away).code == 1
    assert claim().startswith("1 run has records or an end that the tracking store has not got")
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("value: 1", "value: 4"))
    assert repo.run("broken", "inline", **ON).code == 1  # another execution: the journal of the first is renamed
    assert repo.run("first", "inline", **ON).code == 0  # and sent and dropped by the next job, if not by this one
    assert claim() == ""
    assert [path.name for path in (repo.root / "runs/tiny/.lineage").iterdir()] == ["broken"]
    statuses = [run["status"] for name, run in runs(repo).items() if name.startswith("broken")]
    assert statuses == ["FAILED", "FAILED"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_is_full_at_the_very_end_hides_no_reason(repo: Any) -> None:
    """The journal's last lines find no room: what made the job fail is still what it says."""
    (repo.root / "pipeline/stages/first.py").write_text(
        "def run(ctx):\n"
        "    ctx.tracker._journal = open('/dev/full', 'w', buffering=1)\n"
        "    raise RuntimeError('the true reason')\n"
    )
    done = repo.run("first", "inline", **ON)
    assert done.code == 1
    assert "the true reason" in done.err
    assert "records are lost" in done.err
