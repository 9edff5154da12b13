# SPDX-License-Identifier: Apache-2.0
"""A real training on a real SLURM, disturbed in every way that ends in a requeue, beside one that nobody disturbs.

All copies of the repository train the same teacher at scale smoke, side by side; what each test looks at is made once.
"""

import contextlib
import functools
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TEACHER = "runs/smoke/latent_guided/teacher/S"
NAME = "teacher-latent_guided-S"
COMMAND = ("teacher", "scale=smoke", "slot=latent_guided", "size=S")
KINDS = ("node", "preempted", "requeued", "timed-out")
LIMIT_S = 1200.0


class Copy:
    """A copy of the repository, and the process that waits for its training."""

    def __init__(self, path: Path, env: dict[str, str], slurm: Any) -> None:
        self.path, self.env, self.slurm = path, env, slurm
        self.log = path.with_suffix(".log")
        self.waiter: subprocess.Popen[bytes] | None = None

    def run(self, *words: str) -> str:
        """A command of the pipeline, to its end."""
        command = [sys.executable, "-m", "pipeline", *words]
        done = subprocess.run(command, cwd=self.path, env=self.env, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def train(self, launcher: str) -> None:
        """Starts the training."""
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "pipeline", "run", *COMMAND, "--launcher", launcher]
            self.waiter = subprocess.Popen(command, cwd=self.path, env=self.env, stdout=log, stderr=log)

    @functools.cached_property
    def job(self) -> str:
        """Its number in SLURM; to be asked for while it runs."""
        return str(json.loads((self.path / f"runs/smoke/.work/{NAME}/ticket.json").read_text())["job_id"])

    def checkpoints(self) -> int:
        """The last step of which there is a checkpoint."""
        steps = (self.path / f"runs/smoke/.work/{NAME}/work/checkpoints").glob("step-*")
        return max((int(found[0]) for step in steps if (found := re.findall(r"step-(\d+)$", step.name))), default=0)

    def further(self, seconds: float = LIMIT_S) -> None:
        """Waits for another checkpoint."""
        before = self.checkpoints()
        self.slurm.wait_for(lambda: self.checkpoints() > before, seconds=seconds)
        assert self.job  # now that it runs

    def restarts(self) -> int:
        """How often SLURM has started the job again."""
        return int(self.slurm("squeue", "-h", "-t", "all", "-j", self.job, "-O", "restartcnt"))


@pytest.fixture(scope="module")
def trained(
    plain_slurm: Any,
    copy_repository: Callable[[Path], Path],
    user_env: Callable[[Path], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Copy]]:
    """The copies, by what was done to them: `undisturbed`, and KINDS."""
    slurm, folder = plain_slurm, tmp_path_factory.mktemp("trainings")
    slurm.idle()
    base = copy_repository(folder / "base")
    text = (base / "params.yaml").read_text()
    start = text.index("  smoke:\n")
    place = text.index("teacher:", start)
    own = re.sub(r"iterations: 60 ", "iterations: 8000 ", text[place:], count=1)  # long enough to be disturbed thrice
    (base / "params.yaml").write_text(text[:place] + own)
    more = {"SLURM_CONF": str(slurm.conf), "SCM_SLURM_POLL": "2"}
    for stage in ("dataset", "vae", "latents"):
        first = Copy(base, user_env(base) | more, slurm)
        said = first.run("run", stage, "scale=smoke", "slot=latent_guided")
        assert (base / f"runs/smoke/latent_guided/{stage}/manifest.json").exists(), said
    copies = {}
    for kind in ("undisturbed", *KINDS):
        shutil.copytree(base, folder / kind, symlinks=True)
        copies[kind] = Copy(folder / kind, user_env(folder / kind) | more, slurm)
    try:
        disturb(slurm, copies)
        for copy in copies.values():
            assert copy.waiter is not None
            assert copy.waiter.wait(LIMIT_S) == 0, copy.log.read_text()
        yield copies
    finally:
        for copy in copies.values():
            if copy.waiter is not None:
                copy.waiter.kill()
                copy.waiter.wait()
        slurm.tool("start-node", "n1")
        slurm("scontrol", "update", "nodename=n1,n2", "state=resume", check=False)


def disturb(slurm: Any, copies: dict[str, Copy]) -> None:
    """One training runs on n1, whose power fails; the others on n2, which a more urgent job must have. Then the two that are left."""
    slurm("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    copies["node"].train("slurm")
    copies["undisturbed"].train("inline")
    copies["node"].further()
    slurm.tool("kill-node", "n1")
    slurm("scontrol", "update", "nodename=n2", "state=resume")
    for kind in KINDS[1:]:
        copies[kind].train("slurm")
    for kind in KINDS[1:]:
        copies[kind].further()
    slurm("sbatch", "-p", "urgent", "-w", "n2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    slurm.wait_for(lambda: copies["preempted"].restarts() >= 1, seconds=120)
    # n1 stays away: a job that comes back to where it died so soon may be taken for its own remains.
    requeued, timed = copies["requeued"], copies["timed-out"]
    slurm.wait_for(lambda: min(requeued.restarts(), timed.restarts()) >= 1, seconds=120)
    before = {copy: copy.checkpoints() for copy in (requeued, timed)}
    restarts = 0

    def gone_on(copy: Copy) -> bool:
        """Whether it has written a checkpoint since it runs again; the one of its end may come when it is queued already."""
        if slurm.jobs()[copy.job][1] != "RUNNING":
            before[copy] = copy.checkpoints()
        return copy.checkpoints() > before[copy]

    while before:
        # Whichever comes first: with one node left, the other may get its turn only when this one is out of the way.
        copy = slurm.wait_for(lambda: next(filter(gone_on, before), None), seconds=LIMIT_S)
        del before[copy]
        if copy is timed:  # it has run for longer than 60 − 90 s: SIGUSR2 is due
            slurm("scontrol", "update", f"jobid={timed.job}", "TimeLimit=1")
        else:
            restarts = requeued.restarts()
            slurm("scontrol", "requeuehold", requeued.job)
    slurm.wait_for(lambda: slurm.jobs()[requeued.job][1] in ("PENDING", "REQUEUE_HOLD"))
    slurm.wait_for(lambda: "held" in requeued.log.read_text())  # the look that all share has seen it
    (requeued.path / "status.txt").write_text(requeued.run("status", "--scale", "smoke"))
    slurm("scontrol", "release", requeued.job)
    slurm.wait_for(lambda: timed.restarts() >= 2, seconds=120)
    slurm("scontrol", "update", f"jobid={timed.job}", "TimeLimit=30")
    slurm.wait_for(lambda: requeued.restarts() > restarts)
    slurm.wait_for(lambda: copies["node"].restarts() >= 1, seconds=120)  # last: SLURM takes its time to miss a node


def files(folder: Path) -> dict[str, bytes]:
    """Every file by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_as_undisturbed(trained: dict[str, Copy], kind: str) -> None:
    expected, got = files(trained["undisturbed"].path / TEACHER), files(trained[kind].path / TEACHER)
    assert any(name.endswith(".safetensors") for name in got)
    assert [name for name in expected if got.get(name) != expected[name]] == []
    assert got.keys() == expected.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_it_went_on_from_its_checkpoint_in_one_job_and_one_run(trained: dict[str, Copy], kind: str) -> None:
    copy = trained[kind]
    record = json.loads((copy.path / f"runs/smoke/.records/{NAME}.json").read_text())
    assert len(record["attempts"]) >= 2
    assert len(re.findall(r"submitted \(SLURM job", copy.log.read_text())) == 1
    resumed = re.findall(r"resum\w+ .*", (copy.path / f"runs/smoke/.logs/{NAME}.log").read_text())
    assert resumed  # not after each start: one may be cut short before it has read its checkpoint
    with contextlib.closing(sqlite3.connect(copy.path / "mlflow.db")) as store:
        query = (
            "SELECT run_uuid, status FROM runs JOIN tags USING (run_uuid) WHERE key = 'scm.stage' AND value = 'teacher'"
        )
        assert store.execute(query).fetchall() == [(record["mlflow_run"], "FINISHED")]


def test_status_says_that_a_requeued_job_waits(trained: dict[str, Copy]) -> None:
    said = (trained["requeued"].path / "status.txt").read_text()
    assert re.search(rf"{NAME} +queued +SLURM job \d+ waits.*; goes on from its checkpoint", said), said
