# SPDX-License-Identifier: Apache-2.0
"""slurm.conf and its relatives for a cluster whose nodes are all this machine.

No munge (auth/none), no cgroups, no privileges: whoever starts it is its root. What differs from SLURM's defaults makes a test quick
(requeue holds, time-outs, scheduling) or possible (several slurmd on one host, node names that are no host names).
"""

import getpass
import json
import os
import socket
import tempfile
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cluster:
    """What a test cluster is made of; `ports` are those of slurmctld, of slurmdbd, and of each node's slurmd."""

    folder: Path
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    accounting: bool
    ports: tuple[int, ...]

    @property
    def conf(self) -> Path:
        """What SLURM_CONF names."""
        return self.folder / "slurm.conf"

    @property
    def names(self) -> list[str]:
        """Of the nodes."""
        return [f"n{i + 1}" for i in range(self.nodes)]

    @classmethod
    def read(cls, folder: Path) -> "Cluster | None":
        """The cluster that was started in a folder."""
        try:
            known = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            return None
        return cls(**{**known, "folder": folder, "ports": tuple(known["ports"])})

    def write(self) -> None:
        """Every file that the daemons read."""
        for name in ("state", "log", "run", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(self.nodes * self.gpus):
            (self.folder / "run" / f"gpu{i}").touch()  # SLURM wants a file for a GPU, and does not ask what it is
        self.conf.write_text(self._slurm())
        self.conf.with_name("gres.conf").write_text(
            "".join(self._gres(i) for i in range(self.nodes)) if self.gpus else ""
        )
        self.conf.with_name("cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        if self.accounting:
            database = self.conf.with_name("slurmdbd.conf")
            database.write_text(self._slurmdbd())
            database.chmod(0o600)  # slurmdbd insists
        (self.folder / "cluster.json").write_text(json.dumps(asdict(self), default=str))

    def _slurm(self) -> str:
        me, here = getpass.getuser(), socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={here} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} RealMemory={self.memory_mb}"
            + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
            for name, port in zip(self.names, self.ports[2:], strict=True)
        )
        return f"""ClusterName=testcluster
SlurmctldHost={here}(127.0.0.1)
SlurmUser={me}
SlurmdUser={me}
SlurmctldPort={self.ports[0]}
SlurmctldPidFile={self.folder}/run/slurmctld.pid
SlurmdPidFile={self.folder}/run/%n.pid
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/%n.log
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
AuthType=auth/none
CredType=cred/none
# A requeued job is held for as long as a credential lives: 120 s else.
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Nodes have the processors that they are given here, whatever the machine has.
SlurmdParameters=config_overrides
{"GresTypes=gpu" if self.gpus else ""}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
JobRequeue=1
KillWait=5
OverTimeLimit=0
MinJobAge=300
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
MessageTimeout=10
ReturnToService=2
TreeWidth=50
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1,max_rpc_cnt=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{self._accounting()}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
# Preempts jobs of main.
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=20
"""

    def _accounting(self) -> str:
        if not self.accounting:
            return "AccountingStorageType=accounting_storage/none"
        return f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self.ports[1]}
AccountingStorageEnforce=associations"""

    def _gres(self, node: int) -> str:
        first = node * self.gpus
        files = f"gpu[{first}-{first + self.gpus - 1}]" if self.gpus > 1 else f"gpu{first}"
        return f"NodeName=n{node + 1} Name=gpu File={self.folder}/run/{files}\n"

    def _slurmdbd(self) -> str:
        return f"""DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={self.ports[1]}
SlurmUser={getpass.getuser()}
AuthType=auth/none
LogFile={self.folder}/log/slurmdbd.log
PidFile={self.folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={getpass.getuser()}
StorageLoc=slurm_acct_db
"""


def default_folder() -> Path:
    """The same for every call of one user; short, as socket names may have no more than 107 characters."""
    return Path(tempfile.gettempdir()) / f"testcluster-{os.getuid()}"


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of this machine that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(one.getsockname()[1] for one in sockets)
