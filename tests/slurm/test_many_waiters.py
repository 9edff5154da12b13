# SPDX-License-Identifier: Apache-2.0
"""Two hundred waiters at once: little memory, few questions to the scheduler."""

import shutil
import time
from pathlib import Path

import psutil
import pytest

from tests.pipeline.conftest import HERE
from tests.slurm.fakes import MANY, ClusterRepo

POLL_S = 15.0  # the default
WATCHED_S = 35.0
# Waiters are to be as heavy as with the real parameters, which the fake stages do not need.
REAL = """
import pipeline.real_params
HEAVY = pipeline.real_params.load("real.yaml", "paper")
"""


def make_heavy(root: Path) -> None:
    """Has every process of the repository load the project's own params.yaml at scale paper."""
    shutil.copy2(HERE / "pipeline/params.py", root / "pipeline/real_params.py")
    shutil.copy2(HERE / "params.yaml", root / "real.yaml")
    with (root / "pipeline/params.py").open("a") as f:
        f.write(REAL)


@pytest.mark.slow
def test_two_hundred_waiters(cluster_repo: ClusterRepo, tmp_path: Path) -> None:
    repo, slurm, log = cluster_repo, cluster_repo.slurm, tmp_path / "log"
    make_heavy(repo.root)
    queries = repo.count_queries()
    slurm("scontrol", "update", "nodename=n1,n2", "state=drain", "reason=full")
    try:
        began = time.time()
        engine = repo.snakemake(log, *(f"many/{n}" for n in range(MANY)), SCM_SLURM_POLL=str(POLL_S))
        # A minute, if the machine has nothing else to do.
        slurm.wait_for(lambda: len(repo.jobs()) == MANY, seconds=1200)
        started = time.time() - began
        time.sleep(WATCHED_S)
        used = [psutil.Process(pid).memory_full_info() for pid in repo.waiters()]
        asked = len(queries.read_text().split())
        passed = time.time() - began
        repo.kill_all(engine)
        assert len(repo.jobs()) == MANY
    finally:
        slurm("scancel", "-u", slurm("id", "-un"))
        slurm("scontrol", "update", "nodename=n1,n2", "state=resume")
    assert len(used) == MANY
    assert 1 < asked <= passed / POLL_S + 1
    assert max(memory.uss for memory in used) <= 40e6
    mean, most = sum(memory.pss for memory in used) / MANY / 1e6, max(memory.uss for memory in used) / 1e6
    print(f"{MANY} waiters: submitted in {started:.0f} s, {asked} looks in {passed:.0f} s")
    print(f"{mean:.1f} MB each (PSS; at most {most:.1f} MB private)")


def test_an_array_of_jobs_is_attached_to(cluster_repo: ClusterRepo, tmp_path: Path) -> None:
    repo, slurm, log = cluster_repo, cluster_repo.slurm, tmp_path / "log"
    count = 12
    registry = repo.root / "pipeline/registry.py"
    registry.write_text(registry.read_text().replace(f"MANY = {MANY}", f"MANY = {count}"))
    assert repo.waiter("first").wait(60) == 0
    said = repo.pipeline("submit", "many")
    assert (said.returncode, said.stderr) == (0, "")
    ids = sorted(repo.jobs(), key=lambda job: int(job.rpartition("_")[2] or 0) if "_" in job else -1)[-count:]
    array = ids[0].partition("_")[0]
    assert ids == [f"{array}_{n}" for n in range(count)]
    assert said.stdout == f"many: {count} submitted as SLURM job {array}_0 to {array}_{count - 1}\n{count} submitted\n"
    assert repo.pipeline("submit", "many").stdout == f"{count} submitted or running already\n"
    # One has lost its number, as if the submission had been killed before it had written it.
    file = repo.work / "many-7/ticket.json"
    file.write_text(file.read_text().replace(f'"{array}_7"', "null"))
    (repo.work / "many-7/process.json").unlink(missing_ok=True)
    assert repo.snakemake(log, *(f"many/{n}" for n in range(count))).wait(120) == 0, log.read_text()
    assert {(repo.root / f"runs/tiny/many/{n}/result").read_text() for n in range(count)} == {
        str(n) for n in range(count)
    }
    assert len(repo.jobs()) == count + 1
    assert "submitted" not in log.read_text()
    assert repo.pipeline("submit", "many").stdout == f"{count} done already\n"
    assert slurm.jobs()[f"{array}_3"][1] == "COMPLETED"
