# SPDX-License-Identifier: Apache-2.0
"""`doctor --cluster` on a real SLURM: a site in order, and what it says of sites that are not."""

import http.server
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import clusterdoctor, probe, site, trial
from pipeline.preflight import PROGRAMS

DOCTOR = ["python", "-m", "pipeline", "doctor", "--cluster"]


class Doctor:
    """A clean copy of the repository on a cluster; called, what the doctor says of it: what was checked to (verdict, detail, remedy)."""

    def __init__(self, slurm: Any, folder: Path, env: dict[str, str]) -> None:
        self.slurm, self.folder = slurm, folder
        self.env = {**env, "SLURM_CONF": str(slurm.conf)}
        self.status = -1

    def __call__(self, *options: str, **env: str) -> dict[str, tuple[str, str, str]]:
        command = [*DOCTOR, *(options or ("--scale", "smoke"))]
        done = subprocess.run(
            command, cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True, check=False, timeout=240
        )
        assert not done.stderr, done.stderr
        self.status = done.returncode
        found, what = {}, ""
        for line in done.stdout.splitlines()[:-2]:
            if line.startswith(" "):
                found[what] = (*found[what][:2], line.strip().removeprefix("→ "))
            else:
                verdict, _, rest = line.partition(" ")
                what, detail = _split(rest.strip())
                found[what] = (verdict, detail, "")
        assert not any(
            "doctor-" in name and state in ("RUNNING", "PENDING") for name, state in self.slurm.jobs().values()
        )
        assert not list((self.folder / "runs").glob(".doctor/*"))
        return found


def _split(line: str) -> tuple[str, str]:
    """What was checked, which for a job starts with its kind, and the detail."""
    what, _, detail = line.partition(": ")
    if what in site.Kinds.model_fields:
        name, _, detail = detail.partition(": ")
        what = f"{what}: {name}"
    return what, detail


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, copy_repository: Callable[[Path], Path]) -> Path:
    return copy_repository(tmp_path_factory.mktemp("doctor") / "repository")


@pytest.fixture
def doctor(slurm: Any, copy: Path, user_env: Any) -> Iterator[Doctor]:
    yield Doctor(slurm, copy, user_env(copy))
    (copy / site.SITE).unlink(missing_ok=True)


def test_a_site_in_order(doctor: Doctor) -> None:
    found = doctor()
    assert doctor.status == 0, found
    for what in ("a job", "clocks", "environment", "locks", "shared folder", "python", "requeue", "USR2", "scancel"):
        assert found[f"cpu: {what}"][0] == "ok", found
    assert found["SLURM's programs"] == ("ok", ", ".join(PROGRAMS), "")
    assert found["sacct"] == ("ok", "not there; not needed", "")
    assert "requeue, without the signal" in found["preemption"][1]
    assert found["after SIGTERM"][1].startswith("a job has 5 s (KillWait)")  # as the test cluster is configured
    assert found["a requeued job"][1] == "starts again after 5 s at the earliest"
    assert found["tracking store"][0] == "optional"


def test_sacct_where_there_is_accounting(slurm_accounting: Any, copy: Path, user_env: Any) -> None:
    found = Doctor(slurm_accounting, copy, user_env(copy))()
    assert found["sacct"] == ("ok", "there", "")
    assert found["cpu: scancel"][0] == "ok", found


def test_a_python_that_is_not_on_the_nodes(doctor: Doctor) -> None:
    (doctor.folder / site.SITE).write_text("python: /no/such/python\n")
    verdict, detail, remedy = doctor()["cpu: a job"]
    assert (verdict, doctor.status) == ("missing", 1)
    assert detail == "ended as FAILED before it could say anything"
    assert "/no/such/python: No such file or directory" in remedy


def test_nodes_without_what_the_scale_asks_for(doctor: Doctor) -> None:
    """Scale paper, the profile's, wants eight GPUs; the test cluster has none."""
    found = doctor("--wait", "30")
    assert doctor.status == 1
    assert (
        "asks for a node of 64 cores, 800 GB and 8 GPUs, and the cluster has none"
        in found["training at scale paper"][2]
    )
    assert found["training: a job"][0] == "missing"
    assert "gres" in found["training: a job"][2].lower()
    assert found["cpu: USR2"][0] == "ok"  # the kind that can run was tried


def test_a_kind_with_trainings_of_several_nodes_is_tried_on_as_many(doctor: Doctor) -> None:
    file = doctor.folder / "params.yaml"
    text = file.read_text()
    params = yaml.safe_load(text)
    spread = deepcopy(params["scales"]["smoke"])
    spread["slots"]["latent_guided"]["sizes"]["S"]["engine"] = {"processes": 2, "processes_per_node": 1}
    file.write_text(yaml.safe_dump({**params, "scales": {**params["scales"], "spread": spread}}, sort_keys=False))
    try:
        found = doctor("--scale", "spread")
    finally:
        file.write_text(text)
    assert doctor.status == 0, found
    assert found["cpu: nodes"] == ("ok", "2; all reach a port of n1", "")
    assert found["cpu: USR2"][0] == "ok"
    assert found["cpu: scancel"][0] == "ok", found


def test_a_node_that_does_not_reach_the_first_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE_S", 0.5)
    one = trial.Trial("training", {"nodes": 4}, tmp_path)
    for rank, trouble in enumerate((None, "[Errno 113] No route to host"), start=1):
        (tmp_path / f"node-{rank}.json").write_text(json.dumps({"node": f"n{rank + 1}", "trouble": trouble}))
    check = one._nodes("n1")
    assert not check.ok
    assert check.detail == "n3 does not reach n1: [Errno 113] No route to host; 1 of 3 said nothing for 0 s"


def test_it_leaves_nothing_when_it_is_interrupted(doctor: Doctor) -> None:
    doctor.slurm("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    command = [*DOCTOR, "--scale", "smoke", "--wait", "600"]
    process = subprocess.Popen(
        command, cwd=doctor.folder, env=doctor.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    pending = lambda: ("doctor-cpu", "PENDING") in doctor.slurm.jobs().values()  # noqa: E731
    try:
        doctor.slurm.wait_for(pending)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert not pending()
        assert not list((doctor.folder / "runs").glob(".doctor/*"))
    finally:
        process.kill()
        doctor.slurm("scontrol", "update", "nodename=n1,n2", "state=resume")
    assert process.returncode != 0


def test_a_queue_that_does_not_move(doctor: Doctor) -> None:
    doctor.slurm("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=test")
    try:
        verdict, detail, remedy = doctor("--scale", "smoke", "--wait", "2")["cpu: a job"]
    finally:
        doctor.slurm("scontrol", "update", "nodename=n1,n2", "state=resume")
    assert verdict == "optional"
    assert detail.startswith("waits in the queue after 2 s (")
    assert "--wait 600" in remedy


def test_what_stops_it_before_a_job(doctor: Doctor) -> None:
    before = doctor.slurm.jobs()
    assert doctor(SBATCH_EXPORT="NONE")["environment"] == (
        "missing",
        "",
        "SBATCH_EXPORT=NONE keeps variables from jobs that they need; unset SBATCH_EXPORT",
    )
    (doctor.folder / site.SITE).write_text("partitoin: main\n")
    assert doctor()["site settings"][2] == f"{site.SITE}: partitoin: unknown key; did you mean 'partition'?"
    assert doctor.status == 1
    assert doctor.slurm.jobs() == before


def test_a_tracking_server_that_nodes_do_not_reach(doctor: Doctor) -> None:
    verdict, detail, remedy = doctor(MLFLOW_TRACKING_URI="http://127.0.0.1:9")["cpu: tracking server"]
    assert (verdict, doctor.status) == ("optional", 0)
    assert detail.startswith("http://127.0.0.1:9 does not: ")
    assert "--allowed-hosts" in remedy


class _Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        refused = {"strict": 403, "locked": 401, "other": 500}.get(self.path.split("/")[1])
        self.send_response(200 if self.path.endswith("/health") else refused or 200)
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        return


def test_what_a_server_answers() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert probe.reach(address) is None
        assert probe.reach(f"{address}/") is None
        assert probe.reach(f"{address}/locked") is None  # it is there, and wants a password that the jobs have
        assert "--allowed-hosts" in str(probe.reach(f"{address}/strict"))
        assert "500" in str(probe.reach(f"{address}/other"))
        server.shutdown()
    assert probe.reach(address)


@pytest.mark.parametrize(
    ("known", "ok", "words"),
    [
        ({"PreemptType": "preempt/none", "PreemptMode": "OFF"}, True, "off"),
        ({"PreemptType": "preempt/qos", "PreemptMode": "CANCEL"}, False, "cancel, without the signal"),
        (
            {
                "PreemptType": "preempt/qos",
                "PreemptMode": "GANG,REQUEUE",
                "SlurmctldParameters": "preempt_send_user_signal",
            },
            True,
            "with the signal",
        ),
    ],
)
def test_preemption_in_words(known: dict[str, str], ok: bool, words: str) -> None:
    check = clusterdoctor.preemption(known)
    assert check.ok is ok
    assert words in check.detail


def test_the_kind_of_a_file_system(small_disk: Path) -> None:
    assert clusterdoctor.file_system(small_disk) == "tmpfs"
    assert clusterdoctor.file_system(small_disk / "missing") == ""
    assert os.path.ismount(small_disk)
