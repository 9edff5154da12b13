# SPDX-License-Identifier: Apache-2.0
"""A real SLURM of two nodes for the tests of this folder (`cluster/testcluster`); where it is not installed they are skipped."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.fakes import ClusterRepo

ROOT = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(ROOT / "cluster/testcluster")]
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"])


class TestCluster:
    """A cluster that runs; `conf` is for SLURM_CONF."""

    __test__ = False

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self.tool("start", *options)

    @property
    def env(self) -> dict[str, str]:
        """What makes SLURM's commands speak to it, without what a cluster that the tests may run on has set."""
        return {**{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}, "SLURM_CONF": str(self.conf)}

    def tool(self, *words: str) -> str:
        """A command of `cluster/testcluster`."""
        done = subprocess.run(
            [*TOOL, "--folder", str(self.folder), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def __call__(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Every job that the controller remembers: id to name and state."""
        rows = (line.split("|") for line in self("squeue", "-h", "-r", "-t", "all", "-o", "%i|%j|%T").splitlines())
        return {row[0]: (row[1], row[2]) for row in rows}

    def wait_for(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        """Waits until `condition()` is true and returns its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"the condition never came true; jobs: {self.jobs()}")

    def idle(self) -> None:
        """No jobs, all nodes up and the controller there: what a test may rely on and must leave."""
        self.tool("start-controller")
        self("scancel", "-f", "-u", self("id", "-un"), check=False)
        for node in self("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split():
            self.tool("start-node", node)
        words = ("sinfo", "-h", "-N", "-p", "main", "-o", "%T")
        self.wait_for(lambda: set(self(*words).split()) == {"idle"})


def _cluster(*options: str) -> Iterator[TestCluster]:
    needed = ("slurmctld", "slurmd", "sbatch", *(("slurmdbd", "mariadbd") if "--accounting" in options else ()))
    missing = [name for name in needed if shutil.which(name, path=SBIN) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: sockets' names are
        cluster = TestCluster(Path(folder) / "c", *options)
        yield cluster
        cluster.tool("stop")


@pytest.fixture(scope="session")
def plain_slurm() -> Iterator[TestCluster]:
    """Without accounting, as many clusters are."""
    yield from _cluster()


@pytest.fixture(scope="session")
def accounting_slurm() -> Iterator[TestCluster]:
    """With slurmdbd: sacct works, accounts are enforced; the account of this user is `research`."""
    yield from _cluster("--accounting")


@pytest.fixture
def slurm(plain_slurm: TestCluster) -> TestCluster:
    """The cluster without accounting, idle."""
    plain_slurm.idle()
    return plain_slurm


@pytest.fixture
def slurm_accounting(accounting_slurm: TestCluster) -> TestCluster:
    """The cluster with accounting, idle."""
    accounting_slurm.idle()
    return accounting_slurm


@pytest.fixture
def cluster_repo(slurm: TestCluster, tmp_path: Path) -> Iterator[ClusterRepo]:
    """A repository of fake stages on the cluster without accounting."""
    made = ClusterRepo(tmp_path / "repo", slurm)
    yield made
    made.close()
