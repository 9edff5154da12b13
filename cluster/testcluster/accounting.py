# SPDX-License-Identifier: Apache-2.0
"""slurmdbd and its database for a test cluster: a MariaDB of its own, on a socket in the cluster's folder."""

import getpass
import os
import socket
import subprocess

from configuration import Cluster
from daemons import environment, program, running, spawn, wait_for

ACCOUNT = "research"  # the only one


def start(cluster: Cluster) -> None:
    """The database, slurmdbd, and one account with this user in it; the first time takes some seconds more."""
    data, socket_file = cluster.folder / "database", cluster.folder / "run" / "mysql.sock"
    log = cluster.folder / "log" / "mariadbd.out"
    me = (
        getpass.getuser()
    )  # the database's administrator, known by the user of the process at the other end of the socket
    if not data.exists():
        command = [
            program("mariadb-install-db"),
            "--no-defaults",
            f"--datadir={data}",
            f"--user={me}",
            "--auth-root-authentication-method=socket",
        ]
        subprocess.run([*command, f"--auth-root-socket-user={me}"], check=True, capture_output=True)
    if running(cluster, "mariadbd") is None:
        options = [
            f"--datadir={data}",
            f"--socket={socket_file}",
            f"--pid-file={cluster.folder}/run/mariadbd.pid",
            "--skip-networking",
        ]
        quick = [
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        spawn(cluster, "mariadbd", [program("mariadbd"), "--no-defaults", f"--user={me}", *options, *quick])
    client = [program("mariadb"), "--no-defaults", f"--socket={socket_file}", "-u", me]
    wait_for(
        "mariadbd does not answer",
        lambda: subprocess.run([*client, "-e", "SELECT 1"], capture_output=True, check=False).returncode == 0,
        60,
        log,
    )
    if running(cluster, "slurmdbd") is None:
        spawn(cluster, "slurmdbd", [program("slurmdbd"), "-D"], MYSQL_UNIX_PORT=str(socket_file))
    wait_for(
        "slurmdbd does not answer", lambda: _listens(cluster.ports[1]), 60, cluster.folder / "log" / "slurmdbd.log"
    )


def enrol(cluster: Cluster) -> None:
    """The cluster, the account and this user, where they are not known yet; the controller must be up."""
    me = getpass.getuser()
    for words in (
        ["cluster", "testcluster"],
        ["account", ACCOUNT, "Cluster=testcluster"],
        ["user", me, f"Account={ACCOUNT}"],
    ):
        # Status 1 also says `already there`; what matters is seen by the first job.
        subprocess.run(
            [program("sacctmgr"), "-i", "add", *words], env=environment(cluster), capture_output=True, check=False
        )
    if me == "root":  # root is enrolled by SLURM itself, in the account root
        command = [program("sacctmgr"), "-i", "modify", "user", me, "set", f"DefaultAccount={ACCOUNT}"]
        subprocess.run(command, env=environment(cluster), capture_output=True, check=False)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def forget_host_settings() -> None:
    """MariaDB's client library reads these; another server's would mislead it."""
    for name in ("MYSQL_HOST", "MYSQL_TCP_PORT", "MYSQL_UNIX_PORT"):
        os.environ.pop(name, None)
