# SPDX-License-Identifier: Apache-2.0
"""The SLURM launcher against stand-ins for its programs: what is asked for, and that no death is waited on for ever.

The stand-ins run the batch script on this machine and keep the states that squeue shows; a real SLURM is tested
elsewhere.
"""

import json
import os
import re
import shutil
import signal
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import entry, execute, submission
from pipeline.errors import PipelineError
from pipeline.slurm import Slurm

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


@pytest.mark.parametrize(
    "answer",
    ["sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", "thank you"],
    ids=["lost", "without a number"],
)
def test_a_job_whose_number_sbatch_did_not_say_is_found_and_runs(cluster: Any, answer: str) -> None:
    """Its process waits for what submitit puts there after the answer."""
    status = "exit 1" if "error" in answer else ""
    program = cluster.root / "bin/sbatch"
    program.write_text(program.read_text().replace('echo "Submitted batch job $id"', f'echo "{answer}" >&2; {status}'))
    done = cluster.run("first", "slurm")
    assert done.code == 0, done.err
    assert "trying again until it works" in done.out
    assert "first: attached to the running job (SLURM job 101" in done.out
    assert (cluster.root / "state/count").read_text() == "x\n"


def test_a_ticket_that_cannot_be_written_does_not_lose_the_job(cluster: Any) -> None:
    """As where a quota is reached just then: the one without a number stands."""
    (cluster.root / "pipeline/submission.py").write_text(
        (cluster.root / "pipeline/submission.py").read_text()
        + """
def write_json(path, value, durable=False, real=write_json):
    if path.name == "ticket.json" and value.get("job_id") is not None:
        raise OSError(122, "Disk quota exceeded", str(path))
    real(path, value, durable)
"""
    )
    done = cluster.run("first", "slurm")
    assert done.code == 0, done.err
    assert re.search(
        r"first: is submitted, but .*ticket\.json: no space left .*; trying again until it works", done.out
    )
    assert (cluster.root / "state/count").read_text() == "x\n"


def test_a_child_that_has_submitted_ends_where_its_waiter_has_died(cluster: Any) -> None:
    code = """
    import os, time
    from pathlib import Path
    from pipeline.children import in_child
    def submit():
        waiter = os.getppid()
        Path("begun").touch()
        while os.getppid() == waiter:
            time.sleep(0.05)
        return {"job_id": "1"}
    waiter = os.fork()
    if waiter == 0:
        try:
            in_child(submit)
        finally:
            Path("came back").touch()
    while not Path("begun").exists():
        time.sleep(0.05)
    os.kill(waiter, 9)
    os.waitpid(waiter, 0)
    """
    done = cluster.python(code)
    assert done.code == 0, done.err
    assert not (cluster.root / "came back").exists()


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


def test_an_interval_that_is_none_is_said_before_anything_is_submitted(cluster: Any) -> None:
    done = cluster.run("first", "slurm", SCM_SLURM_POLL="soon")
    assert done.code == 1
    assert done.err == "error: SCM_SLURM_POLL=soon: expected seconds above 0 and below an hour, such as 15\n"
    assert not (cluster.root / "state/count").exists()
    assert not (cluster.work / "first/ticket.json").exists()


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


@pytest.mark.parametrize("state", ["NODE_FAIL", "PREEMPTED"])
def test_what_the_cluster_stops_for_good_is_submitted_again(cluster: Any, state: str) -> None:
    cluster.run("first")
    (cluster.root / "pipeline/scheduler.py").write_text(
        (cluster.root / "pipeline/scheduler.py").read_text().replace("LASTING_S = 60.0", "LASTING_S = 2.0")
    )
    waiter = cluster.start("steps", "slurm", STEP_SECONDS="0.2")
    step = cluster.work / "steps/work/step"
    cluster.wait_for(lambda: step.exists() and int(step.read_text()) >= 3)
    script = cluster.root / "state/jobs.101"
    script.write_text(
        re.sub("RUNNING", f"{state} CANCELLED", script.read_text())
    )  # the second for the stand-in of sbatch
    os.kill(cluster.pid("steps"), signal.SIGKILL)
    time.sleep(0.5)
    script.write_text(f"101|{state}|n1|None|{script.read_text().split('|')[-1]}")
    out, err = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, err
    assert "steps: SLURM job 101 on n1 was stopped by the cluster; submitting it again" in out
    assert (cluster.root / "state/count").read_text() == "x\nx\n"
    first, second = (cluster.work.parent / "starts.txt").read_text().split()
    assert (first, int(second) >= 3) == ("0", True)


TOLD = "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-29T16:23:54{} ***\n"


@pytest.mark.parametrize(
    ("told", "note", "again", "cause"),
    [
        (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", None, True, "its node failed, for the 20th time"),
        (" DUE TO PREEMPTION", None, True, "it was preempted, for the 20th time"),
        (" DUE TO TIME LIMIT", None, False, "it ran into its time limit of 30 minutes"),
        (" DUE TO JOB REQUEUE", None, False, "it is no longer known to SLURM"),
        ("", None, False, "it was cancelled"),
        ("", "stopped by SIGTERM, saved", False, "it was cancelled"),
        (
            None,
            "stopped by a spent time budget, saved",
            True,
            "stopped by a spent time budget, saved, for the 20th time",
        ),
    ],
)
def test_a_job_that_the_queue_has_forgotten_is_judged_by_its_output_and_its_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None, note: str | None, again: bool, cause: str
) -> None:
    """What the cluster or a time budget ends is submitted again, at most twenty times; then the cause is said."""
    (tmp_path / "params.yaml").touch()
    monkeypatch.setenv("SCM_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")  # no squeue, and no sacct
    job: Any = SimpleNamespace(scale="tiny", name="steps")
    ticket = {"job_id": "7", "launcher": "slurm", "attempt": "abc", "minutes": 30}
    (tmp_path / "runs/tiny/.work/steps").mkdir(parents=True)
    log = submission.output(job, ticket)
    log.parent.mkdir()
    log.write_text("" if told is None else TOLD.format(told))
    if note is not None:
        execute.note(job, "abc", "stopped", f"steps: {note}")
    assert Slurm().again(job, ticket) is again
    assert not Slurm().again(job, {**ticket, "again": 20})
    assert Slurm().cause(job, {**ticket, "again": 20}) == f"SLURM job 7: {cause}"


def test_a_scheduler_that_lets_nobody_in_is_tried_again(cluster: Any) -> None:
    program = cluster.root / "bin/sbatch"
    full = "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    program.write_text(f'#!/bin/sh\n[ -e $STATE/full ] && {{ echo "{full}" >&2; exit 1; }}\n{program.read_text()}')
    (cluster.root / "state/full").touch()
    waiter = cluster.start("first", "slurm")
    cluster.wait_for(lambda: (cluster.root / "state/queries").exists())  # looked for, should it be there already
    (cluster.root / "state/full").unlink()
    out, err = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, err
    assert "first: QOSMaxSubmitJobPerUserLimit; trying again until it works\n" in out
    assert (cluster.root / "state/count").read_text() == "x\n"


SUBMIT = """
from pipeline import params, paths, registry, slurm, submit, submission
from pipeline.errors import PipelineError
slurm.LOST_S = 0.5
loaded = params.load(paths.root() / "params.yaml")
def all_of(*names):
    return submit.submit([registry.find(loaded, name, {}) for name in names], loaded)
"""


def test_what_a_scheduler_that_was_away_did_not_take_is_submitted_by_the_next_submit(cluster: Any) -> None:
    program = cluster.root / "bin/sbatch"
    away = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    program.write_text(f'#!/bin/sh\n[ -e $STATE/away ] && {{ echo "{away}" >&2; exit 1; }}\n{program.read_text()}')
    (cluster.root / "state/away").touch()
    code = f"{SUBMIT}\nprint(all_of('first'))"
    refused = cluster.python(code)
    assert "Unable to contact slurm controller" in refused.err
    assert (cluster.work / "first/ticket.json").exists()  # it may have been heard all the same
    (cluster.root / "state/away").unlink()
    cluster.wait_for(lambda: "'submitted': 1" in cluster.python(code).out)
    assert "'submitted or running already': 1" in cluster.python(code).out
    done = cluster.run("first", "slurm")
    assert done.code == 0, done.err
    assert "attached" in done.out or "had ended meanwhile" in done.out
    assert (cluster.root / "state/count").read_text() == "x\n"


ENDS_BETWEEN_TWO_LOOKS = {
    "run": """
from pipeline import launch
looks = iter([True])  # the first one sees it running, later ones what is true
launch.Waiter._running = lambda self, real=launch.Waiter._running: next(looks, False) or real(self)
launch.run(registry.find(loaded, "first", {}), loaded, "slurm")
""",
    "submit": """
looks = []
submit.is_locked = lambda path, real=submit.is_locked: looks.append(path) or real(path)
submit.publish.staged = lambda job, mark, real=submit.publish.staged: bool(looks) and real(job, mark)
print(all_of("first"))
""",
}


@pytest.mark.parametrize("command", ENDS_BETWEEN_TWO_LOOKS)
def test_a_job_that_ends_between_two_looks_at_it_is_not_submitted_again(cluster: Any, command: str) -> None:
    assert "'submitted': 1" in cluster.python(f"{SUBMIT}\nprint(all_of('first'))").out
    cluster.wait_for(lambda: "COMPLETED" in (cluster.root / "state/jobs.101").read_text())
    done = cluster.python(SUBMIT + ENDS_BETWEEN_TWO_LOOKS[command])
    assert done.code == 0, done.err
    assert {"run": "publishing what it staged", "submit": "'submitted': 0"}[command] in done.out
    assert (cluster.root / "state/count").read_text() == "x\n"


def test_a_job_that_cannot_be_begun_leaves_no_ticket_of_those_before_it(cluster: Any) -> None:
    code = """
    def begin(job, *more, real=submission.begin):
        if job.name == "dying":
            raise PipelineError("dying: was begun with others")
        return real(job, *more)
    submission.begin = begin
    try:
        all_of("sleeper", "dying")
    except PipelineError as error:
        print(error)
    """
    done = cluster.python(SUBMIT + textwrap.dedent(code))
    assert done.out == "dying: was begun with others\n", done.err
    assert (cluster.work / "sleeper").exists()
    assert not (cluster.work / "sleeper/ticket.json").exists()


def test_a_restarted_job_outlives_the_lock_of_its_dead_node(cluster: Any) -> None:
    code = """
    import atexit, os, threading, time, types
    from pipeline import entry, files, paths
    os.environ["SLURM_RESTART_COUNT"] = RESTARTS
    lock = paths.lock_file(types.SimpleNamespace(scale="tiny", name="first"), "run")
    entry.OUTLIVE_S = 20.0
    def leave():
        time.sleep(3)
        os.kill(holder, 9)
    holder = os.fork()
    if holder == 0:
        held = files.Lock(lock)
        held.acquire()
        time.sleep(60)
        os._exit(0)
    while not files.is_locked(lock):
        time.sleep(0.1)
    if RESTARTS == "1":
        threading.Thread(target=leave).start()
    atexit.register(os.kill, holder, 9)
    from pipeline import manifest, params, registry
    loaded = params.load(paths.root() / "params.yaml")
    mark = manifest.fingerprint(registry.find(loaded, "first", {}), loaded, {})
    entry.JobEntry(str(paths.root()), "tiny", "first", (), mark, "abc", "slurm")()
    """
    for restarts, status in (("1", "ok"), ("0", "error")):
        done = cluster.python(code.replace("RESTARTS", repr(restarts)))
        note = json.loads((cluster.work / "first/exit.json").read_text())
        assert note["status"] == status, (note, done.err)
    assert "is already running" in note["message"]


def test_a_job_at_its_time_limit_is_started_again_if_it_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes and goes in its folder while that is looked at."""
    (tmp_path / "params.yaml").touch()
    monkeypatch.setenv("SCM_ROOT", str(tmp_path))
    work = tmp_path / "runs/tiny/.work/first/work"
    (work / "checkpoints").mkdir(parents=True)
    old = work / "checkpoints/old"
    old.touch()
    for path in (old, old.parent, work):
        os.utime(path, (1000, 1000))
    monkeypatch.setattr(entry, "STARTED", 2000.0)
    one = entry.JobEntry(str(tmp_path), "tiny", "first", (), "", "abc", "slurm", limit_s=600.0)
    (work / "gone").symlink_to(work / "nothing")  # listed, and not there
    os.utime(work, (1000, 1000))
    with pytest.raises(PipelineError, match="first: ran into its time limit of 10 minutes before it had saved"):
        one.checkpoint()
    (work / "checkpoints/new").touch()
    assert one.checkpoint().function is one
