# SPDX-License-Identifier: Apache-2.0
"""A real SLURM on this machine, for developing and testing pipelines: as root or not, up in seconds, gone without a trace.

    python cluster/testcluster start [--accounting]    # or: make testcluster [ACCOUNTING=1]
    eval "$(python cluster/testcluster env)"           # sbatch, squeue … now speak to it
    python cluster/testcluster kill-node n1            # as if its power failed; start-node n1 brings it back
    python cluster/testcluster stop-controller         # slurmctld away; start-controller
    python cluster/testcluster stop

Needs slurmctld, slurmd and slurm-client (Debian's and Ubuntu's packages), with --accounting also slurmdbd and mariadb-server. It listens
on 127.0.0.1 only, and trusts everybody there: it is for tests, on a machine of one's own.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import accounting
import daemons
from configuration import Cluster, default_folder, free_ports
from daemons import ClusterError


def main() -> int:
    """Runs one command."""
    parser = argparse.ArgumentParser(
        prog="python cluster/testcluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where it lives (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start it, or what of it does not run")
    start.add_argument(
        "--accounting", action="store_true", help="with slurmdbd and a database: sacct works, accounts are enforced"
    )
    start.add_argument("--nodes", type=int, default=2)
    start.add_argument("--cpus", type=int, default=4, help="of each node, whatever the machine has")
    start.add_argument("--memory-mb", type=int, default=32_000, help="of each node, for the scheduler's reckoning")
    start.add_argument("--gpus", type=int, default=0, help="of each node, in name only")
    for name in ("kill-node", "start-node"):
        commands.add_parser(name).add_argument("node")
    for name, text in {
        "stop": "end it and everything it runs; remove its folder",
        "status": "",
        "env": "lines for the shell",
        "stop-controller": "",
        "start-controller": "",
    }.items():
        commands.add_parser(name, help=text)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    accounting.forget_host_settings()
    try:
        return run(options)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """The command that was asked for."""
    cluster = Cluster.read(options.folder)
    if options.command == "start":
        return begin(options, cluster)
    if cluster is None:
        raise ClusterError(f"no test cluster in {options.folder}; start one: python cluster/testcluster start")
    if options.command in ("kill-node", "start-node") and options.node not in cluster.names:
        raise ClusterError(f"{options.node}: no such node; there are {', '.join(cluster.names)}")
    if options.command == "env":
        print(f"export SLURM_CONF={cluster.conf}")
    elif options.command == "stop":
        stop(cluster)
    elif options.command == "status":
        return status(cluster)
    elif options.command == "kill-node":
        daemons.kill(daemons.of_node(cluster, options.node))
    elif options.command == "start-node":
        daemons.start_node(cluster, options.node)
    elif options.command == "stop-controller":
        controller = daemons.running(cluster, "slurmctld")
        daemons.end([controller] if controller else [])
    else:
        daemons.start_controller(cluster)
    return 0


def begin(options: argparse.Namespace, known: Cluster | None) -> int:
    """Starts what does not run yet, and waits until every node is ready."""
    for name in ("slurmctld", "slurmd", "sinfo", *(("slurmdbd", "mariadbd", "sacctmgr") if options.accounting else ())):
        daemons.program(name)
    cluster = known or Cluster(
        options.folder,
        options.nodes,
        options.cpus,
        options.memory_mb,
        options.gpus,
        options.accounting,
        free_ports(2 + options.nodes),
    )
    if cluster.accounting != options.accounting:
        raise ClusterError(
            f"the test cluster in {cluster.folder} was started {'with' if cluster.accounting else 'without'} accounting; stop it first"
        )
    if known is None:
        cluster.write()
    try:
        if cluster.accounting:
            accounting.start(cluster)
        daemons.start_controller(cluster)
        if cluster.accounting:
            accounting.enrol(cluster)
        for name in cluster.names:
            daemons.start_node(cluster, name)
        log = cluster.folder / "log" / "n1.log"
        daemons.wait_for("the nodes are not ready", lambda: ready(cluster), 30, log)
    except (ClusterError, subprocess.CalledProcessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        if known is None:
            stop(cluster, keep_logs=True)
        raise ClusterError(words.decode(errors="replace") if isinstance(words, bytes) else words) from None
    print(
        f'test cluster of {cluster.nodes} nodes is up\n  eval "$(python cluster/testcluster env)"\n  python cluster/testcluster stop'
    )
    return 0


def ready(cluster: Cluster) -> bool:
    """Whether jobs can run on every node."""
    states = daemons.states(cluster)
    return len(states) == cluster.nodes and all(
        state.rstrip("*") in ("idle", "mixed", "allocated") for state in states.values()
    )


def status(cluster: Cluster) -> int:
    """Daemons and nodes; status 1 when some are missing."""
    names = [*(("mariadbd", "slurmdbd") if cluster.accounting else ()), "slurmctld", *cluster.names]
    states = daemons.states(cluster)
    missing = 0
    for name in names:
        process = daemons.running(cluster, name)
        missing += process is None
        print(f"{name:10} {f'process {process.pid}' if process else 'does not run':16} {states.get(name, '')}".rstrip())
    return 1 if missing else 0


def stop(cluster: Cluster, keep_logs: bool = False) -> None:
    """Jobs first, then the daemons; the folder goes with them."""
    if daemons.answers(cluster):
        subprocess.run(
            [daemons.program("scancel"), "--full", "-u", str(cluster.folder.owner())],
            env=daemons.environment(cluster),
            capture_output=True,
            check=False,
        )
    for name in cluster.names:
        daemons.kill(daemons.of_node(cluster, name))
    for name in ("slurmctld", "slurmdbd", "mariadbd"):
        process = daemons.running(cluster, name)
        daemons.end([process] if process else [])
    if not keep_logs:
        shutil.rmtree(cluster.folder)
    else:
        (cluster.folder / "cluster.json").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
