# SPDX-License-Identifier: Apache-2.0
"""The test cluster itself: two nodes, jobs on both, accounting, and deaths that are as sudden as real ones."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil


def batch(slurm: Any, folder: Path, command: str, *options: str) -> str:
    """Submits a command; returns the job id. Its output is in <job id>.out."""
    return slurm("sbatch", "--parsable", f"--output={folder}/%j.out", *options, "--wrap", command)


def state(slurm: Any, job: str) -> str:
    """The job's state."""
    return slurm.jobs()[job][1]


def test_a_job_over_two_nodes(slurm: Any) -> None:
    said = slurm("srun", "-N2", "--label", "bash", "-c", "echo $SLURMD_NODENAME")
    assert sorted(said.splitlines()) == ["0: n1", "1: n2"]


def test_a_killed_node_takes_its_processes_with_it_and_its_job_is_requeued(slurm: Any, tmp_path: Path) -> None:
    job = batch(slurm, tmp_path, f"echo $$ >> {tmp_path}/pids; sleep 600", "--requeue")
    pid = slurm.wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split())[0]
    node = slurm("squeue", "-h", "-j", job, "-o", "%N")
    slurm.tool("kill-node", node)
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    assert state(slurm, job) == "RUNNING"  # nobody has noticed yet
    slurm.wait_for(lambda: state(slurm, job) == "PENDING", seconds=90)
    slurm.tool("start-node", node)
    slurm.wait_for(lambda: len((tmp_path / "pids").read_text().split()) == 2)


def test_a_controller_that_was_away_knows_its_jobs(slurm: Any, tmp_path: Path) -> None:
    job = batch(slurm, tmp_path, f"sleep 3; echo here > {tmp_path}/said")
    slurm.wait_for(lambda: state(slurm, job) == "RUNNING")
    slurm.tool("stop-controller")
    assert subprocess.run(["squeue"], env=slurm.env, capture_output=True, check=False).returncode != 0
    slurm.tool("start-controller")
    slurm.wait_for(lambda: state(slurm, job) == "COMPLETED")
    assert (tmp_path / "said").read_text() == "here\n"


def test_a_job_of_the_partition_urgent_preempts(slurm: Any, tmp_path: Path) -> None:
    low = batch(slurm, tmp_path, "sleep 600", "--requeue", "-N2", "--exclusive")
    slurm.wait_for(lambda: state(slurm, low) == "RUNNING")
    high = batch(slurm, tmp_path, "true", "-p", "urgent", "-N2", "--exclusive")
    slurm.wait_for(lambda: state(slurm, high) == "COMPLETED")
    assert int(slurm("squeue", "-h", "-j", low, "-O", "restartcnt")) == 1


def test_accounting_knows_jobs_and_refuses_accounts(slurm_accounting: Any, tmp_path: Path) -> None:
    job = batch(slurm_accounting, tmp_path, "exit 3", "-A", "research")
    rows = lambda: slurm_accounting("sacct", "-n", "-X", "-P", "-j", job, "-o", "state,exitcode,account")  # noqa: E731
    slurm_accounting.wait_for(lambda: rows() == "FAILED|3:0|research")
    refused = subprocess.run(
        ["sbatch", "-A", "nobodys", "--wrap", "true"],
        env=slurm_accounting.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "Invalid account" in refused.stderr


def test_what_is_said_when_there_is_none(tmp_path: Path) -> None:
    tool = str(Path(__file__).resolve().parents[2] / "cluster/testcluster")
    done = subprocess.run(
        [sys.executable, tool, "--folder", str(tmp_path), "status"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"error: no test cluster in {tmp_path}; start one: python cluster/testcluster start\n"
