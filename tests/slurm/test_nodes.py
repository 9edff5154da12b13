# SPDX-License-Identifier: Apache-2.0
"""A training of four processes on two nodes of a real SLURM: equal to one process, through a node's death, and its own failures."""

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.pipeline.plain import plain

pytestmark = pytest.mark.slow

JOB = "teacher-pixel_cond-S"
SPREAD = {"processes": 4, "processes_per_node": 2}
SCALES = {
    "one": {},
    "four": SPREAD,
    "killed": SPREAD,
    "failing": SPREAD,
    "absent": SPREAD,
}  # to the engine of the network
ITERATIONS, EVERY = 160, 20
LIMIT_S = 300


class Trainings:
    """A copy of the repository with one tiny training at several scales, which differ in their processes alone."""

    def __init__(self, path: Path, env: dict[str, str]) -> None:
        self.path, self.env = path, env
        params = plain()
        smoke = params["scales"]["smoke"]["slots"]["latent_guided"]
        slot = {key: value for key, value in smoke.items() if key not in ("vae", "figure2")}
        slot["dataset"] = {"source": "digits", "resolution": 8, "channels": 1, "labels": 10}
        slot["teacher"] |= {"iterations": ITERATIONS, "checkpoint_every": EVERY, "sample_every": ITERATIONS}
        for name, engine in SCALES.items():
            sizes = {"S": {**slot["sizes"]["S"], "engine": engine}}
            params["scales"][name] = {"seed": 0, "slots": {"pixel_cond": {**slot, "sizes": sizes}}}
        (path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def start(self, scale: str, launcher: str, stage: str = "teacher", **env: str) -> "subprocess.Popen[str]":
        """A command of the pipeline, as a user gives it."""
        axes = ["slot=pixel_cond", *(["size=S"] if stage == "teacher" else [])]
        command = [sys.executable, "-m", "pipeline", "run", stage, *axes, f"scale={scale}", "--launcher", launcher]
        return subprocess.Popen(
            command,
            cwd=self.path,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, scale: str, launcher: str, stage: str = "teacher", **env: str) -> None:
        """The same, to its end, which must be good."""
        process = self.start(scale, launcher, stage, **env)
        said, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, said + self.logs(scale)

    def logs(self, scale: str) -> str:
        """What the job and each of its tasks have said."""
        folder = self.path / "runs" / scale
        files = sorted([*folder.glob(".logs/*.log"), *folder.glob(".work/*.submitit/*.out")])
        return "".join(f"\n--- {file.name}\n{file.read_text()}" for file in files)

    def weights(self, scale: str) -> torch.Tensor:
        """All that the training made, in one vector."""
        tensors = load_file(self.path / "runs" / scale / "pixel_cond/teacher/S/model.safetensors")
        return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])

    def checkpoints(self, scale: str) -> list[Path]:
        """Those that are whole."""
        return list((self.path / "runs" / scale / ".work" / JOB / "work/checkpoints").glob("step-*"))

    def tasks(self) -> dict[int, psutil.Process]:
        """The Python processes of the running job, by rank."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                python = "submitit.core._submit" in (process.info["cmdline"] or []) and "python" in process.exe()
                if python and Path(process.cwd()) == self.path:
                    found[int(process.environ()["SLURM_PROCID"])] = process
        return found


@pytest.fixture(scope="module")
def trainings(
    plain_slurm: Any,
    tmp_path_factory: pytest.TempPathFactory,
    copy_repository: Callable[[Path], Path],
    user_env: Callable[[Path], dict[str, str]],
) -> Trainings:
    """The copy, with every scale's images, and the training by one process."""
    path = copy_repository(tmp_path_factory.mktemp("nodes") / "repository")
    made = Trainings(path, {**user_env(path), "SLURM_CONF": str(plain_slurm.conf)})
    for scale in SCALES:
        made.run(scale, "inline", "dataset", SCM_TRACKING="off")
    made.run("one", "inline")
    return made


def assert_equal_to_one(trainings: Trainings, scale: str) -> None:
    """To 1e-5 of the weights, by norm; two processes' sums differ in their order, and Adam amplifies."""
    one, several = trainings.weights("one"), trainings.weights(scale)
    assert float((several - one).norm() / one.norm()) < 1e-5


def test_four_processes_on_two_nodes_train_what_one_trains(slurm: Any, trainings: Trainings) -> None:
    trainings.run("four", "slurm")
    assert_equal_to_one(trainings, "four")
    titles = [trainings.path / f"runs/four/.logs/{JOB}{rank}.log" for rank in ("", ".rank-1", ".rank-2", ".rank-3")]
    places = [title.read_text().partition(",")[0] for title in titles]
    assert places == [f"--- process {rank} on {node}" for rank, node in enumerate(("n1", "n1", "n2", "n2"))]


def test_a_node_dies_and_the_training_goes_on(slurm: Any, trainings: Trainings) -> None:
    """SLURM starts all four processes again once the node is back, from the checkpoint, in the same MLflow run."""
    waiter = trainings.start("killed", "slurm")
    slurm.wait_for(lambda: trainings.checkpoints("killed") or waiter.poll() is not None, seconds=LIMIT_S)
    slurm.tool("kill-node", "n2")
    assert waiter.poll() is None, waiter.communicate()[0] + trainings.logs("killed")
    slurm.wait_for(lambda: [state for _, state in slurm.jobs().values() if state == "PENDING"], seconds=120)
    assert waiter.poll() is None, waiter.communicate()[0] + trainings.logs("killed")
    slurm.tool("start-node", "n2")
    said, _ = waiter.communicate(timeout=LIMIT_S)
    assert waiter.returncode == 0, said + trainings.logs("killed")
    assert_equal_to_one(trainings, "killed")
    log = (trainings.path / f"runs/killed/.logs/{JOB}.log").read_text()
    assert log.count("--- process 0 on n1") == 2
    resumed = int(log.partition("resumed from step-")[2].partition(":")[0])
    assert EVERY <= resumed < ITERATIONS
    with contextlib.closing(sqlite3.connect(trainings.path / "mlflow.db")) as store:
        query = "SELECT status FROM runs JOIN experiments USING (experiment_id) WHERE experiments.name = 'scm-killed' AND runs.name LIKE ?"
        assert store.execute(query, (f"{JOB}%",)).fetchall() == [("FINISHED",)]


def test_a_process_that_is_killed_ends_the_job_and_is_named(slurm: Any, trainings: Trainings) -> None:
    """One on the second node, in the middle of the training: the user reads which, where and how."""
    waiter = trainings.start("failing", "slurm")
    slurm.wait_for(lambda: trainings.checkpoints("failing") or waiter.poll() is not None, seconds=LIMIT_S)
    assert waiter.poll() is None, waiter.communicate()[0] + trainings.logs("failing")
    trainings.tasks()[3].kill()
    said, _ = waiter.communicate(timeout=LIMIT_S)
    assert waiter.returncode == 1
    assert f"error: {JOB}: process 3 on n2 died: Killed (log: runs/failing/.logs/{JOB}.rank-3.log)" in said
    slurm.wait_for(lambda: not trainings.tasks(), seconds=60)
    assert "process 3 on n2 died: Killed" in (trainings.path / f"runs/failing/.logs/{JOB}.log").read_text()


def test_a_process_that_cannot_begin_ends_the_job_with_its_words(slurm: Any, trainings: Trainings) -> None:
    """As where a disk is missing on one node: the others wait for it to connect, and must not do so for long."""
    stage = trainings.path / "pipeline/stages/teacher.py"
    text = stage.read_text()
    here = "    slot, size = ctx.slot"
    assert text.count(here) == 1
    missing = 'raise FileNotFoundError(2, "No such file or directory", "/scratch/data")'
    fault = f'    if __import__("os").environ.get("RANK") == "3":\n        {missing}\n'
    stage.write_text(text.replace(here, fault + here))
    waiter = trainings.start("absent", "slurm")
    said, _ = waiter.communicate(timeout=LIMIT_S)
    assert waiter.returncode == 1
    words = "process 3 on n2: FileNotFoundError: [Errno 2] No such file or directory: '/scratch/data'"
    assert f"error: {JOB}: {words} (log: runs/absent/.logs/{JOB}.rank-3.log)" in said, said
    assert f"error: {words}" in (trainings.path / f"runs/absent/.logs/{JOB}.log").read_text()
    assert "Traceback" in (trainings.path / f"runs/absent/.logs/{JOB}.rank-3.log").read_text()
