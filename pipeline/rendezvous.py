# SPDX-License-Identifier: Apache-2.0
"""The tasks of a SLURM job that train together: what they ask for, how they find each other, and which of them failed first.

SLURM starts one task a process, on as many nodes as are needed. Each learns its place from the variables that srun sets and translates
them to those that `torchrun` would set (`scm_core.train.distributed` reads these). Light: the process that waits asks it, too.
"""

import os
import re
import signal
import socket
import struct
import subprocess
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json

if TYPE_CHECKING:
    from pipeline.registry import Job

# Below what Linux gives to connections (32768), so that only a server can have taken one.
PORTS = range(10_000, 30_000)
# SLURM takes five minutes to notice that a node is gone (SlurmdTimeout, unless a site says else), and then ends the job's other tasks.
PATIENCE_S = 600.0
STARTED = "--- start"  # what the first task says in submitit's log, where srun's own words stand too
ENDED = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$", re.MULTILINE)
# From here on tasks end because they are ended.
CLEARED = re.compile(r"Node failure on|Terminating StepId|Terminating job step|Job step aborted|\*\*\* (STEP|JOB) ")


@dataclass(frozen=True)
class Place:
    """A task's place in its job."""

    rank: int
    count: int
    local_rank: int
    """Among the tasks of its node."""
    node: str
    """By SLURM's name, which need not be a host name."""
    port: int
    """Where the first task listens: told by the job, as nobody can ask it before."""
    restart: int
    """How often SLURM has started the job again."""
    log: Path
    """What submitit, srun and SLURM say of the job; its tasks leave word beside it."""

    def __str__(self) -> str:
        return f"process {self.rank} on {self.node}"

    @property
    def ranks(self) -> dict[str, str]:
        """As torchrun says it, but for the address."""
        known = {"RANK": self.rank, "WORLD_SIZE": self.count, "LOCAL_RANK": self.local_rank, "MASTER_PORT": self.port}
        return {name: str(value) for name, value in known.items()}


def request(resources: Any) -> dict[str, Any]:
    """What submitit asks SLURM for on behalf of a job's `costs.Resources`. Memory and GPUs are counted by node, cores by task.

    All GPUs of a node are visible to each of its tasks, which takes the one of its number (LOCAL_RANK): NCCL copies directly between GPUs
    that both processes see.
    """
    nodes, tasks = resources.nodes, resources.nodes * resources.tasks_per_node
    cores = resources.threads // tasks
    # srun asks for a job's memory and GPUs by itself, but since SLURM 22.05 not for its cores.
    # Its tasks are named as well: a shell within another job has its SLURM_NTASKS, which srun would take for this one's.
    arguments = [f"--ntasks={tasks}", f"--cpus-per-task={cores}"]
    if tasks > 1:
        # One that fails ends all; those that are done early wait for the first, whatever the site's WaitTime is.
        arguments += ["--kill-on-bad-exit=1", "--wait=0"]
    return {
        "mem": f"{resources.memory_mb // nodes}MB",
        "cpus_per_task": cores,
        "srun_args": arguments,
        "nodes": nodes,
        "ntasks_per_node": resources.tasks_per_node,
        **({"gpus_per_node": resources.gpus // nodes} if resources.gpus else {}),
    }


def place(env: Mapping[str, str]) -> Place | None:
    """The place that srun's variables describe; None for a job's only task, and for what submitit has not started there.

    PipelineError names a variable that is missing.
    """
    count = int(env.get("SLURM_NTASKS", "1"))
    if count == 1 or env.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURMD_NODENAME"):
        if name not in env:
            raise PipelineError(f"{name}: SLURM_NTASKS is {count}, but {name} is not set; start the tasks with srun")
    folder, restart = env.get("SUBMITIT_FOLDER", ""), int(env.get("SLURM_RESTART_COUNT", "0"))
    # With submitit's folder, as two clusters may count alike; with the restart, as the former start's port may not be free yet.
    known = f"{folder} {env['SLURM_JOB_ID']} {restart}"
    port = PORTS[zlib.crc32(known.encode()) % len(PORTS)]
    log = Path(folder, f"{job_id(env)}_0_log.out")
    return Place(int(env["SLURM_PROCID"]), count, int(env["SLURM_LOCALID"]), env["SLURMD_NODENAME"], port, restart, log)


def job_id(env: Mapping[str, str]) -> str:
    """A job's number as squeue shows it, `12` or `12_3` in an array; empty outside of SLURM's jobs."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID", "")


def join(here: Place) -> None:
    """Set the variables that the processes connect by; PipelineError where the first one cannot be found or cannot listen."""
    import submitit

    nodes = submitit.JobEnvironment().hostnames
    os.environ |= {**here.ranks, "MASTER_ADDR": address(nodes[0])}
    if here.rank == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", here.port))
            except OSError as error:
                what = f"port {here.port} of {here.node}, where the processes of this job were to meet"
                raise PipelineError(f"{what}: {error.strerror}; run it again: another job takes another one") from None
    if len(nodes) > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Gloo takes the interface of this machine's name, which on some systems is the loopback. The way to another node is none.
        way = interface(address(nodes[-1] if here.node == nodes[0] else nodes[0]))
        if way is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = way


def address(node: str) -> str:
    """Where a node is reached: its name, or what SLURM knows of it where that is no host name."""
    for known in (lambda: node, lambda: _node_address(node)):
        name = known()
        if name is not None and _resolves(name):
            return name
    raise PipelineError(
        f"{node}: neither this machine's resolver nor `scontrol show node {node}` tells the address of this node of the job; "
        "have the cluster's administrators look at it"
    )


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _node_address(node: str) -> str | None:
    """NodeAddr of slurm.conf."""
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (subprocess.SubprocessError, OSError):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    return found[1] if found else None


def interface(target: str) -> str | None:
    """The network interface of this machine that packets to an address leave by; None where the system does not say (not on Linux)."""
    import fcntl

    try:
        family, kind, protocol, _, there = socket.getaddrinfo(target, 9, socket.AF_INET, socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(there)  # sends nothing
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                asked = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), 0x8915, asked)  # SIOCGIFADDR: the address of an interface
                except OSError:  # it has none
                    continue
                if answer[20:24] == own:
                    return name
    except OSError:
        return None
    return None


def announce(here: Place) -> None:
    """To be called by the first task while it still writes to submitit's log: marks there what belongs to this start."""
    print(f"{STARTED} {here.restart}: {here}", flush=True)


def leave_word(here: Place, message: str, lost: bool) -> None:
    """Why a task ends, for the first one and for whoever waits. `lost`: because others were gone, which is nobody's cause."""
    file = here.log.with_name(f"{_own(here.log)}_failed-{here.restart}-{here.rank}.json")
    write_json(file, {"rank": here.rank, "message": f"{here}: {message}", "lost": lost, "time": time.time()})


def first_failure(job: paths.JobName, log: Path) -> str | None:
    """Which process of the job's last start failed first, where, and with which words, by submitit's log of it; None if nobody says.

    Its own words count first; a task that died without any is named by srun.
    """
    restart, said = _since_start(log)
    own = [word for word in _words(log, restart) if not word["lost"]]
    if own:
        return str(min(own, key=lambda word: word["time"])["message"])
    ended, cleared = ENDED.search(said), CLEARED.search(said)
    if ended is None or (cleared is not None and cleared.start() < ended.start()):
        return None
    node, tasks, how = ended.groups()
    status = re.fullmatch(r"Exited with exit code (\d+)", how)
    if status is not None and int(status[1]) > 128:  # a shell around it has seen the signal
        how = signal.strsignal(int(status[1]) - 128) or how
    where = f" (log: {paths.relative(paths.log_file(job, int(tasks)))})" if tasks.isdigit() and int(tasks) else ""
    return f"process {tasks} on {node} died: {how}{where}"


def brief(error: Exception) -> str:
    """An error of the connection without where in the source it was found, and without general advice."""
    return re.sub(r"^\[\S+\] | This is typically.*$", "", " ".join(str(error).split())).rstrip(".")


def why_lost(job: "Job", here: Place, error: Exception) -> PipelineError:
    """What the first task has to say after its connection to the others broke. Waits until somebody has said why.

    Where nobody does, a node is gone: SLURM notices in its own time, ends this process, and starts the job again. This one must be there
    until then: a job that ends before its node is known to be dead has failed, and is not started again.
    """
    deadline = time.monotonic() + PATIENCE_S
    print(
        f"warning: {job.name}: the connection to other processes broke ({brief(error)}); looking for the cause",
        flush=True,
    )
    while time.monotonic() < deadline:
        words = first_failure(job, here.log)
        if words is not None:
            return PipelineError(f"{job.name}: {words}; the same command goes on from its last checkpoint")
        if len(_words(here.log, here.restart)) == here.count - 1:  # all are there: it is the network
            break
        time.sleep(0.5)
    return PipelineError(
        f"{job.name}: the processes lost each other: {brief(error)}; run it again to resume from its last checkpoint"
    )


def _own(log: Path) -> str:
    """The number of the job whose log this is: the jobs of an array lie together."""
    return log.name.removesuffix("_0_log.out")


def _words(log: Path, restart: int) -> list[dict[str, Any]]:
    found = (read_json(file) for file in log.parent.glob(f"{_own(log)}_failed-{restart}-*.json"))
    return [word for word in found if word is not None]


def _since_start(log: Path) -> tuple[int, str]:
    """The number of the job's last start, and what srun and others have said since."""
    try:
        _, found, said = log.read_text(errors="replace").rpartition(f"{STARTED} ")
    except FileNotFoundError:
        found = said = ""
    return (int(re.match(r"\d+", said)[0]), said) if found else (0, "")  # type: ignore[index]
