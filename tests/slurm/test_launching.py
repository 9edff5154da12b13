# SPDX-License-Identifier: Apache-2.0
"""Jobs of the pipeline on a real SLURM: honest causes of death, nothing submitted twice, cancellation, a scheduler that is away."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.fakes import ClusterRepo

# What each stage's waiter has to say; `cancelled` is cancelled by the test.
CAUSES = {
    "exits": r"its process ended with status 3 without saying why",
    "dying": r"its process was killed by SIGKILL; out of memory\? It asked for 200MB",
    "hungry": r"it was killed for using more memory than it asked for \(200MB\)",
    "broken": r"failed: KeyError: 'missing thing' \(traceback in runs/tiny/\.logs/broken\.log\)",
    "sleeper": r"it was cancelled",
}
SLOW_CAUSES = {
    "stuck": r"it ran into its time limit of 1 minutes",
    "idle": r"ran into its time limit of 1 minutes before it had saved anything; give it more time",
}
LAST_WORDS = {
    "exits": "last words",
    "dying": "last words",
    "hungry": "last words",
    "broken": "about to break",
    "stuck": "last words",
}


def ended(repo: ClusterRepo, name: str) -> bool:
    """Whether SLURM has done with a job."""
    return repo.state(name) not in ("PENDING", "RUNNING", "COMPLETING")


def start(repo: ClusterRepo, causes: dict[str, str]) -> "dict[str, subprocess.Popen[str]]":
    """Waiters of stages that die, and of one that depends on nothing of them."""
    return {name: repo.waiter(name) for name in (*causes, "first")}


def deaths(
    repo: ClusterRepo, causes: dict[str, str], waiters: "dict[str, subprocess.Popen[str]]", seconds: float
) -> None:
    """Checks what the waiters say, and that they say it within a minute of the death."""
    if "sleeper" in causes:
        repo.repo.pid("sleeper")
        repo.slurm("scancel", repo.ticket("sleeper")["job_id"])
    said = {}
    for name, waiter in waiters.items():
        repo.slurm.wait_for(lambda name=name: repo.submissions(name) and ended(repo, name), seconds=seconds)
        said[name] = waiter.communicate(timeout=60)
    assert waiters["first"].returncode == 0, said["first"]
    assert (repo.root / "runs/tiny/first/data.bin").exists()
    for name, cause in causes.items():
        err = said[name][1]
        assert waiters[name].returncode == 1
        assert re.search(cause, err), err
        assert re.search(rf"SLURM job {repo.submissions(name)[0]} on n[12]\b", err), err
        assert f"  | {LAST_WORDS.get(name, '')}" in err, err
        assert f"runs/tiny/.logs/{name}.log" in err, err
        assert len(repo.submissions(name)) == 1


def test_each_death_has_its_cause_without_accounting(cluster_repo: ClusterRepo) -> None:
    deaths(cluster_repo, CAUSES, start(cluster_repo, CAUSES), 60)


def test_each_death_has_its_cause_with_accounting(slurm_accounting: Any, tmp_path: Path) -> None:
    repo = ClusterRepo(tmp_path / "repo", slurm_accounting)
    repo.env["SCM_SLURM_ACCOUNT"] = "research"
    try:
        deaths(repo, CAUSES, start(repo, CAUSES), 60)
    finally:
        repo.close()


@pytest.fixture(scope="module")
def timing_out(accounting_slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Jobs that run into their time limit, on the other cluster: SLURM takes two minutes for that, in which other tests go on."""
    accounting_slurm.idle()
    repo = ClusterRepo(tmp_path_factory.mktemp("limits") / "repo", accounting_slurm)
    repo.env["SCM_SLURM_ACCOUNT"] = "research"
    yield repo, start(repo, SLOW_CAUSES)
    repo.close()


def reached(repo: ClusterRepo, step: int) -> Any:
    """Whether the stage `steps` has its checkpoint of this step."""
    file = repo.work / "steps/work/step"
    return lambda: file.exists() and int(file.read_text() or 0) >= step


def starts(repo: ClusterRepo) -> list[int]:
    """The steps at which the stage `steps` started, one for each start."""
    return [int(step) for step in (repo.root / "runs/tiny/starts.txt").read_text().split()]


def test_a_requeued_job_is_waited_for(cluster_repo: ClusterRepo) -> None:
    repo, slurm = cluster_repo, cluster_repo.slurm
    assert repo.waiter("first").wait(60) == 0
    waiter = repo.waiter("steps", STEP_SECONDS="0.2")
    slurm.wait_for(reached(repo, 3))
    job = repo.ticket("steps")["job_id"]
    slurm("scontrol", "requeuehold", job)
    slurm.wait_for(lambda: slurm.jobs()[job][1] in ("PENDING", "REQUEUE_HOLD"))
    time.sleep(5)  # two looks at the queue, that must not take this for an end
    assert waiter.poll() is None
    shown = repo.pipeline("logs", job, "-n", "1")
    assert "--- steps, attempt" not in shown.stdout
    assert f"steps (queued: SLURM job {job} waits" in shown.stderr
    slurm("scontrol", "release", job)
    out, err = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, err
    assert re.search(rf"steps: SLURM job {job} waits.*\(.*[Hh]eld.*\)|steps: SLURM job {job} waits", out), out
    first, second = starts(repo)
    assert (first, second >= 3) == (0, True)
    assert repo.submissions("steps") == [job]


def test_killed_engines_find_their_jobs_again(cluster_repo: ClusterRepo, tmp_path: Path) -> None:
    repo, slurm, log = cluster_repo, cluster_repo.slurm, tmp_path / "log"
    targets = ("second", "steps", "many/0", "many/1")
    first = repo.snakemake(log, *targets, STEP_SECONDS="0.4")
    slurm.wait_for(reached(repo, 1))
    repo.kill_all(first)
    second = repo.snakemake(log, *targets)  # while `steps` runs
    slurm.wait_for(lambda: "attached to the running job" in log.read_text())
    repo.kill_all(second)
    slurm.wait_for(lambda: repo.state("steps") == "COMPLETED")
    third = repo.snakemake(log, *targets)  # and when it has ended
    assert third.wait(60) == 0, log.read_text()
    assert "had ended meanwhile; publishing what it staged" in log.read_text()
    assert (repo.root / "runs/tiny/steps/result").read_text() == "30"
    for name in ("first", "second", "steps", "many-0", "many-1"):
        assert len(repo.submissions(name)) == 1, slurm.jobs()
    log.write_text("")
    assert repo.snakemake(log, *targets).wait(60) == 0
    assert "Nothing to be done" in log.read_text()


def test_a_waiter_leaves_when_its_engine_dies(cluster_repo: ClusterRepo, tmp_path: Path) -> None:
    repo, slurm, log = cluster_repo, cluster_repo.slurm, tmp_path / "log"
    engine = repo.snakemake(log, "steps", STEP_SECONDS="0.3")
    slurm.wait_for(reached(repo, 1))
    engine.kill()
    slurm.wait_for(lambda: not repo.waiters())
    assert "whoever started this has died; SLURM job" in log.read_text()
    slurm.wait_for(lambda: repo.state("steps") == "COMPLETED")
    assert not (repo.root / "runs/tiny/steps").exists()
    assert repo.snakemake(log, "steps").wait(60) == 0
    assert len(repo.submissions("steps")) == 1


def test_a_waiter_killed_between_sbatch_and_its_ticket(cluster_repo: ClusterRepo) -> None:
    repo, slurm = cluster_repo, cluster_repo.slurm
    (repo.root / "bin").mkdir()
    program = repo.root / "bin/sbatch"
    real = slurm("bash", "-c", "command -v sbatch")
    # Asked whether it would take the job, it answers; having taken it, it kills the whole group: the waiter and its child.
    asked = f'case "$*" in *--test-only*) exec {real} "$@";; esac'
    program.write_text(f'#!/bin/sh\n{asked}\n{real} "$@" > /dev/null\nkill -9 0\n')
    program.chmod(0o755)
    lost = repo.waiter("sleeper")
    assert lost.wait(60) == -signal.SIGKILL
    assert json.loads((repo.work / "sleeper/ticket.json").read_text())["job_id"] is None
    program.unlink()
    found = repo.waiter("sleeper")
    job = repo.ticket("sleeper")["job_id"]
    assert repo.submissions("sleeper") == [job]
    repo.repo.pid("sleeper")  # what it is to run was put there by whoever found it
    found.terminate()
    out, err = found.communicate(timeout=60)
    assert "attached to the running job" in out
    assert f"cancelling the job (SLURM job {job}" in err
    slurm.wait_for(lambda: repo.state("sleeper") == "CANCELLED")
    assert repo.submissions("sleeper") == [job]


@pytest.mark.parametrize("kind", ["SIGINT to the terminal", "SIGTERM to Snakemake"])
def test_cancelling_snakemake_cancels_the_jobs(cluster_repo: ClusterRepo, tmp_path: Path, kind: str) -> None:
    repo, slurm, log = cluster_repo, cluster_repo.slurm, tmp_path / "log"
    engine = repo.snakemake(log, "sleeper", "many/0")
    repo.repo.pid("sleeper")
    slurm.wait_for((repo.root / "runs/tiny/many/0/result").exists)
    if kind == "SIGINT to the terminal":
        os.killpg(engine.pid, signal.SIGINT)
    else:
        engine.terminate()
    assert engine.wait(60) != 0
    job = repo.ticket("sleeper")["job_id"]
    assert f"sleeper: cancelling the job (SLURM job {job}" in log.read_text()
    assert "sleeper: cancelled" in log.read_text()
    slurm.wait_for(lambda: repo.state("sleeper") == "CANCELLED")
    # The same command starts it anew, when the cancelled one has ended.
    again = repo.snakemake(log, "sleeper")
    slurm.wait_for(lambda: len(repo.submissions("sleeper")) == 2)
    repo.repo.pid("sleeper")
    assert repo.state("sleeper") == "RUNNING"
    engine = again
    os.killpg(engine.pid, signal.SIGINT)
    engine.wait(60)


@pytest.mark.slow
@pytest.mark.usefixtures("timing_out")
def test_a_scheduler_that_is_away_for_a_minute_ends_nothing(cluster_repo: ClusterRepo) -> None:
    repo, slurm = cluster_repo, cluster_repo.slurm
    assert repo.waiter("first").wait(60) == 0
    running = repo.waiter("steps", STEP_SECONDS="1.5")  # 45 s: it ends while nobody can be asked
    slurm.wait_for(reached(repo, 1))
    slurm.tool("stop-controller")
    late = repo.waiter("second")
    time.sleep(60)
    assert late.poll() is None
    slurm.tool("start-controller")
    said = running.communicate(timeout=60), late.communicate(timeout=120)
    assert (running.returncode, late.returncode) == (0, 0), said
    assert "second: Batch job submission failed: Unable to contact slurm controller" in said[1][0]
    assert "trying again until it works" in said[1][0]
    assert [len(repo.submissions(name)) for name in ("steps", "second")] == [1, 1]
    assert starts(repo) == [0]


@pytest.mark.slow
def test_a_time_limit_that_nothing_is_saved_in(timing_out: Any) -> None:
    repo, waiters = timing_out
    deaths(repo, SLOW_CAUSES, waiters, 180)


def test_logs_of_a_job(cluster_repo: ClusterRepo) -> None:
    repo = cluster_repo
    for more in ((), ("-f",)):
        none = repo.pipeline("logs", "sleeper", *more)
        assert (none.returncode, none.stderr.count("\n")) == (2, 1)
        assert "no log yet in runs/tiny/.logs/sleeper.log: it has not run" in none.stderr
    assert repo.waiter("exits").wait(60) == 1
    shown = repo.pipeline("logs", "exits", "-n", "1")
    assert (shown.stdout, shown.stderr) == ("last words\n", "exits: runs/tiny/.logs/exits.log\n")
    assert repo.pipeline("logs", repo.ticket("exits")["job_id"], "-n", "1").stdout == "last words\n"
    unknown = repo.pipeline("logs", "exit")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    waiter = repo.waiter("first")
    # Before that there is nothing to follow.
    known = (repo.work / "first/ticket.json", repo.root / "runs/tiny/first")
    repo.slurm.wait_for(lambda: any(path.exists() for path in known))
    follower = repo.start("python", "-m", "pipeline", "logs", "first", "-f")
    assert waiter.wait(60) == 0
    assert follower.wait(60) == 0
    assert "--- first, attempt" in follower.communicate()[0]


def test_a_job_that_dies_before_it_has_a_log(cluster_repo: ClusterRepo) -> None:
    repo = cluster_repo
    (repo.root / "cluster/slurm/site.yaml").write_text("setup: ['echo no such module', 'exit 7']\n")
    waiter = repo.waiter("early")
    _, err = waiter.communicate(timeout=90)
    assert waiter.returncode == 1
    job = repo.ticket("early")["job_id"]
    assert f"SLURM job {job} on n1: it ended as FAILED (NonZeroExitCode)" in err
    assert f"(log: runs/tiny/.work/early.submitit/{job}_0_log.out)\n  | no such module\n" in err
    assert repo.pipeline("logs", "early").stdout == "no such module\n"
