# SPDX-License-Identifier: Apache-2.0
"""How the tasks of a SLURM job find each other and say who failed, from the variables and words that a real SLURM left."""

import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from pipeline import registry, rendezvous
from pipeline.errors import PipelineError
from pipeline.params import load
from scm_core.train.distributed import connected, is_lost

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n2",
    "SUBMITIT_FOLDER": "/shared/job",
    "SUBMITIT_EXECUTOR": "slurm",
}
JOB = SimpleNamespace(scale="tiny", name="teacher-S")


def place(**changes: str) -> rendezvous.Place:
    found = rendezvous.place({**ENV, **changes})
    assert found is not None
    return found


def test_a_place_is_what_srun_says() -> None:
    here = place()
    assert (here.rank, here.count, here.local_rank, here.node, here.restart) == (3, 4, 1, "n2", 0)
    assert here.ranks == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": str(here.port)}
    assert str(here) == "process 3 on n2"


def test_a_job_of_one_task_has_no_others() -> None:
    assert rendezvous.place({}) is None
    assert rendezvous.place({**ENV, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert rendezvous.place({**ENV, "SUBMITIT_EXECUTOR": "local"}) is None


def test_all_tasks_know_the_same_port_and_every_start_has_another() -> None:
    ports = {place(SLURM_PROCID=str(r), SLURM_LOCALID=str(r % 2), SLURMD_NODENAME=f"n{r // 2}").port for r in range(4)}
    assert len(ports) == 1
    assert place(SLURM_RESTART_COUNT="1").restart == 1
    others = {place(SLURM_RESTART_COUNT=str(n)).port for n in range(20)} | {
        place(SLURM_JOB_ID=str(n)).port for n in range(20)
    }
    assert len(others | ports) > 35  # of 40: a coincidence is no matter
    assert all(10_000 <= port < 30_000 for port in others)


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURMD_NODENAME"])
def test_a_variable_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(PipelineError, match=f"^{name}: SLURM_NTASKS is 4, but {name} is not set"):
        rendezvous.place({key: value for key, value in ENV.items() if key != name})


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The resolver of a machine that knows these names only, and a scontrol that knows no node."""
    known = {"127.0.0.1": "127.0.0.1"}

    def resolve(name: str, *arguments: Any, **options: Any) -> Any:
        if name not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (known[name], 9))]

    def run(command: list[str], **options: Any) -> Any:
        assert command[:4] == ["scontrol", "--oneliner", "show", "node"]
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(subprocess, "run", run)
    for name in (*ENV, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, ENV.get(name, ""))
        if name not in ENV:
            monkeypatch.delenv(name)
    return known


def test_the_first_node_is_the_master(names: dict[str, str]) -> None:
    names |= {"n1": "127.0.0.1", "n2": "127.0.0.1"}
    rendezvous.join(place())
    assert os.environ["MASTER_ADDR"] == "n1"
    assert os.environ["RANK"] == "3"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"  # the way to 127.0.0.1


def test_a_node_whose_name_is_no_host_name_is_asked_of_slurm(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "NodeName=n1 Arch=x86_64 CoresPerSocket=1 NodeAddr=127.0.0.1 NodeHostName=host Port=17001 Version=22.05.8\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **options: SimpleNamespace(stdout=said))
    assert rendezvous.address("n1") == "127.0.0.1"


def test_a_node_that_nobody_knows_is_named(names: dict[str, str]) -> None:
    with pytest.raises(PipelineError, match=r"^n1: neither this machine's resolver nor `scontrol show node n1`"):
        rendezvous.join(place())


def test_an_interface_that_the_user_names_is_left(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    names |= {"n1": "127.0.0.1", "n2": "127.0.0.1"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    rendezvous.join(place())
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_port_that_is_taken_is_said_by_the_first_task(names: dict[str, str]) -> None:
    names |= {"n1": "127.0.0.1", "n2": "127.0.0.1"}
    first = place(SLURM_PROCID="0", SLURM_LOCALID="0", SLURMD_NODENAME="n1")
    with socket.socket() as taken:
        taken.bind(("", first.port))
        taken.listen()
        with pytest.raises(PipelineError, match=rf"^port {first.port} of n1, .* Address already in use; run it again"):
            rendezvous.join(first)
        rendezvous.join(place())  # the others only connect to it


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (1, {"nodes": 1, "ntasks_per_node": 1, "mem": "102400MB", "cpus_per_task": 8, "gpus_per_node": 1}),
        (4, {"nodes": 1, "ntasks_per_node": 4, "mem": "409600MB", "cpus_per_task": 8, "gpus_per_node": 4}),
        (16, {"nodes": 2, "ntasks_per_node": 8, "mem": "819200MB", "cpus_per_task": 8, "gpus_per_node": 8}),
    ],
)
def test_what_a_training_asks_for(tmp_path: Path, processes: int, expected: dict[str, Any]) -> None:
    """By node and task, from `engine.processes` and the section hardware: 8 GPUs, 8 cores and 100 GB each. Evaluations have one task."""
    data = yaml.safe_load((ROOT / "params.yaml").read_text())
    data["scales"]["paper"]["slots"]["latent_guided"]["sizes"]["S"]["engine"] = {"processes": processes}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data))
    params = load(tmp_path / "params.yaml", "paper")
    axes = {"slot": "latent_guided", "size": "S"}
    asked = rendezvous.request(registry.find(params, "teacher", axes).resources)
    ending = ["--kill-on-bad-exit=1", "--wait=0"] if processes > 1 else []
    assert asked == {"srun_args": [f"--ntasks={processes}", "--cpus-per-task=8", *ending], **expected}
    evaluation = rendezvous.request(registry.find(params, "evaluate", {**axes, "method": "teacher"}).resources)
    assert (evaluation["nodes"], evaluation["ntasks_per_node"]) == (1, 1)
    assert evaluation["cpus_per_task"] == 8 * evaluation["gpus_per_node"]


START = "submitit INFO - Starting\n--- start {}: process 0 on n1\n"
DEATH = "srun: error: n2: task 3: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=3.0\nsrun: error: n1: task 1: Terminated\n"
FIRST_DIES = "srun: error: n1: task 0: Killed\nsrun: error: n1: task 1: Terminated\n"
NODE_FAILURE = (
    "srun: error: Node failure on n2\n"
    "slurmstepd-n1: error: *** JOB 2 ON n1 CANCELLED AT 2026-11-29T16:23:54 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***\n"
    "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\n"
    "srun: error: n1: task 1: Terminated\n"
)
REQUEUE = "slurmstepd-n1: error: *** STEP 5.0 ON n1 CANCELLED AT 16:27:07 DUE TO JOB REQUEUE ***\nsrun: error: n1: task 1: Terminated\n"


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository, and submitit's folder of JOB in it."""
    (tmp_path / "params.yaml").touch()
    monkeypatch.setenv("SCM_ROOT", str(tmp_path))
    folder = tmp_path / "runs/tiny/.work/teacher-S.submitit"
    folder.mkdir(parents=True)
    monkeypatch.setitem(ENV, "SUBMITIT_FOLDER", str(folder))
    return folder


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (START.format(0), None),
        (START.format(0) + DEATH, "process 3 on n2 died: Killed (log: runs/tiny/.logs/teacher-S.rank-3.log)"),
        (START.format(0) + "srun: error: n1: task 0: Exited with exit code 137\n", "process 0 on n1 died: Killed"),
        (START.format(0) + "srun: error: n1: task 0: Exited with exit code 9\n", "process 0 on n1 died: Exited with exit code 9"),
        (START.format(0) + "srun: error: n[1-2]: tasks 0-3: Out Of Memory\n", "process 0-3 on n[1-2] died: Out Of Memory"),
        (START.format(0) + NODE_FAILURE, None),  # SLURM will start it again
        (START.format(0) + REQUEUE, None),
        (START.format(0) + DEATH + START.format(1), None),  # of an earlier start
        (START.format(0) + NODE_FAILURE + START.format(1) + FIRST_DIES, "process 0 on n1 died: Killed"),
    ],
    ids=["nothing", "killed", "killed in a shell", "ended", "memory", "node failure", "requeue", "an earlier death", "after a failure"],
)  # fmt: skip
def test_srun_says_who_died(submitted: Path, said: str, found: str | None) -> None:
    (submitted / "17_0_log.out").write_text(said)
    assert rendezvous.first_failure(JOB, submitted / "17_0_log.out") == found


def test_a_process_own_words_come_first(submitted: Path) -> None:
    """The earliest of those that do not only say that others were gone; and of the last start."""
    (submitted / "17_0_log.out").write_text(START.format(1) + "srun: error: n2: task 3: Exited with exit code 1\n")
    rendezvous.leave_word(place(), "of an earlier start", lost=False)
    rendezvous.leave_word(place(SLURM_RESTART_COUNT="1", SLURM_PROCID="1"), "Connection closed by peer", lost=True)
    rendezvous.leave_word(place(SLURM_RESTART_COUNT="1"), "no such file: /scratch/data", lost=False)
    rendezvous.leave_word(place(SLURM_RESTART_COUNT="1", SLURM_PROCID="2"), "later", lost=False)
    assert rendezvous.first_failure(JOB, submitted / "17_0_log.out") == "process 3 on n2: no such file: /scratch/data"


def test_jobs_of_an_array_do_not_speak_for_each_other(submitted: Path) -> None:
    """All that submitit keeps of them is in one folder."""
    first, second, third = (
        place(SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID=n, SLURM_JOB_ID=str(17 + int(n))) for n in ("0", "1", "2")
    )
    assert [here.log.name for here in (first, second)] == ["17_0_0_log.out", "17_1_0_log.out"]
    for here, said in ((first, START.format(0)), (second, START.format(2)), (third, START.format(0) + DEATH)):
        here.log.write_text(said)
    rendezvous.leave_word(second, "of an earlier start", lost=False)
    assert rendezvous.first_failure(JOB, first.log) is None
    assert rendezvous.first_failure(JOB, second.log) is None
    assert str(rendezvous.first_failure(JOB, third.log)).startswith("process 3 on n2 died: Killed")
    rendezvous.leave_word(first, "no such file: /scratch/data", lost=False)
    assert rendezvous.first_failure(JOB, first.log) == "process 3 on n2: no such file: /scratch/data"


def test_the_first_task_gives_the_cause_of_a_broken_connection(submitted: Path) -> None:
    first = place(SLURM_PROCID="0", SLURM_LOCALID="0", SLURMD_NODENAME="n1")
    (submitted / "17_0_log.out").write_text(START.format(0) + DEATH)
    error = RuntimeError(
        "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [1.2.3.4]:5. This is typically …"
    )
    assert "teacher-S: process 3 on n2 died: Killed" in str(rendezvous.why_lost(JOB, first, error))  # type: ignore[arg-type]


def test_where_all_processes_are_left_nobody_died(submitted: Path) -> None:
    (submitted / "17_0_log.out").write_text(START.format(0))
    for rank in (1, 2, 3):
        rendezvous.leave_word(place(SLURM_PROCID=str(rank)), "Connection closed by peer", lost=True)
    first = place(SLURM_PROCID="0")
    error = RuntimeError(
        "[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [1.2.3.4]:5. This is typically …"
    )
    words = str(rendezvous.why_lost(JOB, first, error))  # type: ignore[arg-type]
    assert words.startswith(
        "teacher-S: the processes lost each other: Connection closed by peer [1.2.3.4]:5; run it again"
    )


def test_a_lost_connection_is_told_from_other_errors(processes: Any, tmp_path: Path) -> None:
    """What gloo and the store of torch raise when another process is gone, and when it never came."""

    def gone(rank: int) -> str:
        with connected() as ranks:
            if rank == 1:
                os._exit(9)
            try:
                for _ in range(100):
                    ranks.largest(torch.ones(1))
            except Exception as error:
                return f"{type(error).__name__}: {is_lost(error)}"
        return "nothing"

    started = processes.start(gone, 2)
    started[0].join(60)
    assert "True" in (processes.folder / "rank-0.pkl").read_bytes().decode(errors="replace")

    def absent(rank: int) -> bool:
        os.environ["WORLD_SIZE"] = "2"
        try:
            with connected(timeout_s=1):
                return False
        except Exception as error:
            return is_lost(error)

    assert processes(absent, 1) == [True]
    assert not is_lost(ValueError("gloo/transport"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
