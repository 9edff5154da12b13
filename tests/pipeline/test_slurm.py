# SPDX-License-Identifier: Apache-2.0
"""The SLURM launcher against stand-ins for its programs: what is asked for, and that no death is waited on for ever.

The stand-ins run the batch script on this machine and keep the states that squeue shows; a real SLURM is tested
elsewhere.
"""

import json
import re
import shutil
import time
from typing import Any

import pytest

SBATCH = """#!/bin/sh
[ "$1" = --test-only ] && exit 0
# A copy, as SLURM makes one: submitit renames the script as soon as sbatch is back.
cp "$1" "$STATE/script"
echo x >> "$STATE/count"
id=$((100 + $(wc -l < "$STATE/count")))
name=$(sed -n 's/^#SBATCH --job-name=//p' "$1" | tr -d "'")
echo "$id|RUNNING|n1|None|$name" > "$STATE/jobs.$id"
(
    SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_PROCID=0 sh "$STATE/script" > /dev/null 2>&1
    code=$?
    state=COMPLETED
    [ $code -ne 0 ] && state=FAILED
    [ $code -eq 137 ] && state=OUT_OF_MEMORY
    grep -q CANCELLED "$STATE/jobs.$id" || echo "$id|$state|n1|None|$name" > "$STATE/jobs.$id"
) > /dev/null 2>&1 &
echo "Submitted batch job $id"
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SQUEUE = """#!/bin/sh
echo x >> "$STATE/queries"
[ -e "$STATE/down" ] && exit 1
cat "$STATE"/jobs.* 2> /dev/null || true
"""
SINFO = """#!/bin/sh
echo 'main*|infinite'
"""
SCANCEL = """#!/bin/sh
sed -i 's/RUNNING/CANCELLED/' "$STATE/jobs.$1"
kill $(sed -n 's/.*"pid": \\([0-9]*\\).*/\\1/p' "$ROOT"/runs/tiny/.work/*/process.json)
"""


@pytest.fixture
def cluster(repo: Any) -> Any:
    """The repository with the four programs on its PATH."""
    state, programs = repo.root / "state", repo.root / "bin"
    state.mkdir()
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE, "sinfo": SINFO, "scancel": SCANCEL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    repo.env |= {"PATH": f"{programs}:{repo.env['PATH']}", "STATE": str(state), "ROOT": str(repo.root)}
    # Tests do not wait a quarter of a minute for each look at the queue.
    repo.env["SCM_SLURM_POLL"] = "1"
    return repo


def test_a_job_on_the_cluster(cluster: Any) -> None:
    done = cluster.run("first", "slurm", SCM_SLURM_PARTITION="gpu", SCM_SLURM_ACCOUNT="me")
    assert done.code == 0, done.err
    assert "SLURM job 101" in done.out
    assert (cluster.root / "runs/tiny/first/data.bin").exists()
    script = (cluster.root / "state/script").read_text()
    for line in ("partition=gpu", "account=me", "mem=200MB", "time=1", "cpus-per-task=1", "requeue", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in script


def test_a_hard_death_is_noticed_without_accounting(cluster: Any) -> None:
    started = time.monotonic()
    done = cluster.run("dying", "slurm")
    assert done.code == 1
    assert "SLURM job 101 on n1: it was killed for using more memory" in done.err
    assert "| last words" in done.err
    assert time.monotonic() - started < 30


def test_a_dead_waiter_is_replaced_without_a_second_submission(cluster: Any) -> None:
    cluster.run("first")
    waiter = cluster.start("steps", "slurm")
    cluster.pid("steps")
    waiter.kill()
    done = cluster.run("steps", "slurm")
    assert done.code == 0, done.err
    assert "attached" in done.out
    assert (cluster.root / "state/count").read_text() == "x\n"


def test_a_lost_ticket_is_found_by_the_jobs_name(cluster: Any) -> None:
    cluster.run("first")
    waiter = cluster.start("steps", "slurm")
    cluster.pid("steps")
    waiter.kill()
    ticket = cluster.work / "steps/ticket.json"
    ticket.write_text(json.dumps({**json.loads(ticket.read_text()), "job_id": None}))
    (cluster.work / "steps/process.json").rename(cluster.work / "steps/hidden")
    done = cluster.run("steps", "slurm")
    assert done.code == 0, done.err
    assert (cluster.root / "state/count").read_text() == "x\n"


def test_a_scheduler_that_is_away_ends_nothing(cluster: Any) -> None:
    cluster.run("first")
    waiter = cluster.start("steps", "slurm")
    cluster.pid("steps")
    (cluster.root / "state/down").touch()
    assert waiter.wait(timeout=40) == 0


def test_cancelling_cancels_the_job(cluster: Any) -> None:
    waiter = cluster.start("sleeper", "slurm")
    cluster.pid("sleeper")
    waiter.terminate()
    _, err = waiter.communicate(timeout=20)
    assert waiter.returncode == 130
    assert "cancelling the job (SLURM job 101 on n1)" in err
    assert "CANCELLED" in (cluster.root / "state/jobs.101").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: gpu\n", r"site\.yaml: partitoin: unknown key; did you mean 'partition'"),
        ("[1, 2]\n", r"site\.yaml: must hold keys with values"),
        ("setup: module load x\n", r"site\.yaml: setup: must be a list such as"),
        ("a: [\n", r"site\.yaml: not valid YAML"),
    ],
)
def test_bad_site_settings(cluster: Any, text: str, words: str) -> None:
    folder = cluster.root / "cluster/slurm"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text(text)
    done = cluster.run("first", "slurm")
    assert done.code == 1
    assert re.search(words, done.err)
    assert not (cluster.root / "state/count").exists()


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="SLURM is installed here")
def test_no_slurm_here(repo: Any) -> None:
    done = repo.run("first", "slurm")
    assert done.code == 1
    assert "sbatch is not on the PATH" in done.err


def test_a_refused_submission(cluster: Any) -> None:
    # By what --test-only does not look at, such as a limit on the number of jobs.
    script = "#!/bin/sh\n[ $1 = --test-only ] && exit 0\necho 'error: Job violates accounting/QOS policy' >&2\nexit 1\n"
    (cluster.root / "bin/sbatch").write_text(script)
    done = cluster.run("first", "slurm")
    assert done.code == 1
    assert "SLURM refused the job" in done.err
    assert "violates accounting/QOS policy" in done.err
    assert done.err.count("\n") == 1
