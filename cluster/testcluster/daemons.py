# SPDX-License-Identifier: Apache-2.0
"""The processes of a test cluster: started, waited for, killed with everything that they have started.

slurmd and what it starts carry TESTCLUSTER_NODE in their environment; tasks, whose environment is sbatch's, have SLURM's own variables.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
from configuration import Cluster

MARK = "TESTCLUSTER_NODE"
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}


class ClusterError(Exception):
    """What cannot be started, in a sentence with the remedy."""


def program(name: str) -> str:
    """The path of a program, looked for in the system's folders as well. ClusterError says which package has it."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise ClusterError(f"{name} is not installed; on Debian or Ubuntu: apt-get install {PACKAGES.get(name, name)}")
    return found


def environment(cluster: Cluster) -> dict[str, str]:
    """In which SLURM's commands speak to this cluster."""
    return {**os.environ, "SLURM_CONF": str(cluster.conf)}


def spawn(cluster: Cluster, name: str, command: list[str], **env: str) -> "subprocess.Popen[bytes]":
    """Starts a daemon in the foreground of a session of its own; what it says before it has a log goes to log/<name>.out."""
    with (cluster.folder / "log" / f"{name}.out").open("ab") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=cluster.folder,
            env={**environment(cluster), **env},
            start_new_session=True,
        )
    (cluster.folder / "run" / f"{name}.started").write_text(
        f"{process.pid} {psutil.Process(process.pid).create_time()}"
    )
    return process


def running(cluster: Cluster, name: str) -> psutil.Process | None:
    """The daemon of that name, if it lives."""
    try:
        pid, started = (cluster.folder / "run" / f"{name}.started").read_text().split()
        process = psutil.Process(int(pid))
        alive = process.create_time() == float(started) and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def wait_for(what: str, condition: Callable[[], bool], seconds: float, log: Path) -> None:
    """Until the condition is true; ClusterError with the end of a log if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            said = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
            raise ClusterError(f"{what} after {seconds:.0f} s; {log}: {' / '.join(said) or 'empty'}")
        time.sleep(0.05)


def end(processes: Iterable[psutil.Process], seconds: float = 10) -> None:
    """SIGTERM, and SIGKILL to what is left."""
    living = []
    for process in processes:
        try:
            process.terminate()
            living.append(process)
        except psutil.NoSuchProcess:
            continue
    _, left = psutil.wait_procs(living, timeout=seconds)
    kill(left)


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL, at once, and without last words: SLURM's daemons are stopped before their tasks die, so that none tells of it."""
    daemons: list[psutil.Process] = []
    tasks: list[psutil.Process] = []
    for process in processes:
        try:
            (daemons if process.name().startswith(("slurmd", "slurmstepd")) else tasks).append(process)
        except psutil.NoSuchProcess:
            continue
    # Tasks are not stopped: the kernel wakes a stopped one whose parent dies.
    for group, signum in ((daemons, signal.SIGSTOP), (tasks, signal.SIGKILL), (daemons, signal.SIGKILL)):
        for process in group:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)


def of_node(cluster: Cluster, name: str) -> list[psutil.Process]:
    """slurmd of a node, the step daemons it has started, and all their children: what would be gone if the node were."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if env.get(MARK) != f"{cluster.folder}:{name}" and not (
                env.get("SLURMD_NODENAME") == name and env.get("SLURM_CONF") == str(cluster.conf)
            ):
                continue
            # The environment of a step daemon is not for its own user to read; that of its tasks is.
            parents = [one for one in process.parents() if one.name().startswith("slurmstepd")]
            found |= {one.pid: one for one in (process, *parents, *process.children(recursive=True))}
        except psutil.Error:  # it has ended, or belongs to somebody else
            continue
    return list(found.values())


def start_controller(cluster: Cluster) -> None:
    """slurmctld, until it answers. The state of earlier jobs is kept."""
    if running(cluster, "slurmctld") is None:
        spawn(cluster, "slurmctld", [program("slurmctld"), "-D", "-f", str(cluster.conf)])
    wait_for("slurmctld does not answer", lambda: answers(cluster), 30, cluster.folder / "log" / "slurmctld.log")


def answers(cluster: Cluster) -> bool:
    """Whether the controller does."""
    command = [program("sinfo"), "-h"]
    return subprocess.run(command, env=environment(cluster), capture_output=True, check=False).returncode == 0


def start_node(cluster: Cluster, name: str) -> None:
    """slurmd of a node."""
    if running(cluster, name) is None:
        command = [program("slurmd"), "-D", "-N", name, "-f", str(cluster.conf)]
        spawn(cluster, name, command, **{MARK: f"{cluster.folder}:{name}"})


def states(cluster: Cluster) -> dict[str, str]:
    """Node to state, as sinfo says them; empty while the controller does not answer."""
    command = [program("sinfo"), "-h", "-N", "-p", "main", "-o", "%N %T"]
    done = subprocess.run(command, env=environment(cluster), capture_output=True, text=True, check=False)
    return dict(line.split() for line in done.stdout.splitlines()) if done.returncode == 0 else {}
