# SPDX-License-Identifier: Apache-2.0
"""A tiny job on a SLURM site, and what is seen of it from here: the part of `doctor --cluster` beside `pipeline.probe`, the job."""

import contextlib
import io
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import paths, preflight, probe, registry, site
from pipeline.doctor import Check
from pipeline.errors import PipelineError
from pipeline.files import is_locked, read_json
from pipeline.probe import FACTS, HELLO, HERE, LOCK, NODE, SIGNALS, THERE, Probe
from pipeline.scheduler import FINAL, unfiltered
from pipeline.submission import leave_job

TINY = {"time": 10, "mem": "4000MB", "cpus_per_task": 1, "ntasks_per_node": 1}
PATIENCE_S = 20.0  # for what a running job should do at once, on a slow file system
FACTS_S = 90.0  # to import torch from one
CLOCK_S = 5.0
GONE = ("", *FINAL)  # squeue may have forgotten it


@dataclass
class Trial:
    """A tiny job of one kind, and what became of it."""

    kind: str
    request: dict[str, Any]
    folder: Path
    job: str = ""
    submitted: float = 0.0

    @classmethod
    def of(cls, settings: site.Site, kind: str, jobs: list[registry.Job]) -> "Trial":
        """The request of the kind's first job, made tiny, but for the nodes: as many as the kind's largest job has."""
        mine = [job for job in jobs if site.kind(job) == kind]
        nodes = max(job.resources.nodes for job in mine)
        arguments = [f"--ntasks={nodes}", "--cpus-per-task=1"]
        request = {**settings.request(mine[0]), **TINY, "nodes": nodes, "srun_args": arguments}
        if "gpus_per_node" in request:
            name, colon, _ = str(request["gpus_per_node"]).rpartition(":")
            request["gpus_per_node"] = f"{name}{colon}1"
        return cls(kind, request, paths.root() / "runs" / ".doctor" / f"{uuid.uuid4().hex[:8]}-{kind}")

    def submit(self, packages: tuple[str, ...]) -> None:
        """Queues the job."""
        import submitit

        leave_job()
        self.folder.mkdir(parents=True)
        tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
        wanted = dict(self.request)
        executor = submitit.SlurmExecutor(folder=self.folder / "submitit", python=wanted.pop("python"))
        executor.update_parameters(job_name=f"doctor-{self.kind}", **wanted)
        work = Probe(str(self.folder), packages, tracking if tracking.startswith("http") else None)
        self.submitted = time.time()
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            self.job = str(executor.submit(work).job_id)

    def state(self) -> tuple[str, str]:
        """State and reason, by squeue; empty where it knows nothing of the job."""
        try:
            said = preflight.ask(["squeue", "-h", "-t", "all", "-j", self.job, "-o", "%T|%r"])
        except PipelineError:  # it has forgotten the job, or is away: the files say more
            return "", ""
        state, _, reason = said.strip().partition("|")
        return state, reason

    def check(self, wait_s: float) -> list[Check]:
        """Follows the job to its end."""
        try:
            return [replace(check, what=f"{self.kind}: {check.what}") for check in self._checks(wait_s)]
        finally:
            self._cancel()

    def close(self) -> None:
        """Leaves nothing of it, whatever has become of it."""
        self._cancel()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _cancel(self, *options: str) -> None:
        if self.job:
            subprocess.run(["scancel", *options, self.job], capture_output=True, check=False, env=unfiltered())

    def _checks(self, wait_s: float) -> Iterator[Check]:
        hello = self._started(wait_s)
        if hello is None:
            yield self._never_started(wait_s)
            return
        seen = time.time()
        yield Check("a job", True, f"started after {max(0.0, seen - self.submitted):.1f} s on {hello['node']}")
        yield Check(
            "clocks",
            abs(seen - hello["time"]) < CLOCK_S,
            f"{abs(seen - hello['time']):.1f} s apart at most",
            "have the machines' clocks set by NTP: Snakemake compares the times of files",
            optional=True,
        )
        yield Check(
            "environment",
            hello["mark"] is not None,
            "variables travel with the job" if hello["mark"] is not None else "variables do not travel with the job",
            "unset SBATCH_EXPORT, or export SCM_DATA, SCM_WEIGHTS and MLFLOW_TRACKING_URI in `setup` of " + site.SITE,
        )
        facts = _until(lambda: read_json(self.folder / FACTS), FACTS_S)
        if facts is None:
            yield Check(
                "python", False, f"said nothing for {FACTS_S:.0f} s", f"the node reads packages slowly: {self._tail()}"
            )
            return
        yield Check(
            "locks",
            is_locked(self.folder / LOCK),
            "one that the job holds is seen here",
            "POSIX locks do not work between machines on this file system (NFS: mount it without nolock; Lustre: with flock)",
        )
        yield self._there_and_back()
        if self.request["nodes"] > 1:
            yield self._nodes(hello["node"])
        yield from self._environment(facts)
        yield from self._signals()

    def _started(self, wait_s: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + wait_s
        over = 0
        while time.monotonic() < deadline and over < 3:
            hello = read_json(self.folder / HELLO)
            if hello is not None:
                return hello
            # Ended, and nothing seen of it: a network file system may show it a little later.
            over += self.state()[0] in GONE
            time.sleep(0.5)
        return read_json(self.folder / HELLO)

    def _never_started(self, wait_s: float) -> Check:
        state, reason = self.state()
        if state in ("PENDING", "CONFIGURING"):
            return Check(
                "a job",
                False,
                f"waits in the queue after {wait_s:.0f} s ({reason})",
                "wait longer (--wait 600), or see when it would start: squeue --start; nothing else could be tried",
                optional=True,
            )
        said = self._tail()
        remedy = (
            f"it said: {said}" if said else "it left no word: is this folder there on the nodes, and is its python?"
        )
        return Check("a job", False, f"ended as {state or 'unknown'} before it could say anything", remedy)

    def _tail(self) -> str:
        """The last words of the job's own output."""
        logs = sorted((self.folder / "submitit").glob("*_log.out"))
        lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
        return " / ".join(line.strip() for line in lines[-3:])

    def _there_and_back(self) -> Check:
        start = time.monotonic()
        (self.folder / HERE).write_text(self.folder.name)
        answer = _until(lambda: read_json(self.folder / THERE), PATIENCE_S)
        took = time.monotonic() - start
        ok = answer == {"said": self.folder.name}
        return Check(
            "shared folder",
            ok,
            f"a file goes there and back in {took:.1f} s"
            if ok
            else f"a file from here was not seen there within {PATIENCE_S:.0f} s",
            "use a folder that all machines share (or one whose caching of folders is shorter: NFS's actimeo)",
        )

    def _nodes(self, first: str) -> Check:
        """Whether the job's other nodes have come, and reach the first one as the processes of a training do."""
        others = self.request["nodes"] - 1

        def found() -> list[dict[str, Any]]:
            read = (read_json(file) for file in sorted(self.folder.glob(f"{NODE}*")))
            return [one for one in read if one is not None]

        came = _until(lambda: len(said := found()) == others and said, PATIENCE_S) or found()
        lost = [f"{one['node']} does not reach {first}: {one['trouble']}" for one in came if one["trouble"]]
        if len(came) < others:
            lost.append(f"{others - len(came)} of {others} said nothing for {PATIENCE_S:.0f} s")
        return Check(
            "nodes",
            not lost,
            "; ".join(lost) or f"{others + 1}; all reach a port of {first}",
            "trainings of several nodes connect to a port of the first one: a firewall between nodes, or a name that they do not "
            "resolve; the administrators know (docs/training.md has what a cluster may want in `setup`)",
        )

    def _environment(self, facts: dict[str, Any]) -> Iterator[Check]:
        here = probe.versions(tuple(facts["versions"]))
        other = [f"{k} {v or 'missing'} there, {here[k]} here" for k, v in facts["versions"].items() if v != here[k]]
        broken = facts["torch"].get("error")
        yield Check(
            "python",
            not broken and not other,
            f"{facts['python']} ({facts['executable']}); "
            + (
                f"torch: {broken}"
                if broken
                else "; ".join(other)
                if other
                else f"torch imported in {facts['torch']['seconds']:.1f} s, versions as here"
            ),
            f"install the same environment where {facts['executable']} is, or name another in `python` or `container` of {site.SITE}",
        )
        if "gpus_per_node" in self.request:
            listed = facts["gpus"].get("said", "").splitlines()
            count = facts["torch"].get("devices", 0)
            yield Check(
                "GPU",
                count == 1,
                f"torch sees {count} of 1; {'; '.join(line.partition(' (')[0] for line in listed) or facts['gpus'].get('error', 'none')}",
                "torch for CPUs, a driver that is too old, or a container without --nv: see nvidia-smi on the node",
            )
        yield Check(
            "requeue",
            "Requeue=1" in facts["scontrol"].get("said", ""),
            facts["scontrol"].get("error", "allowed, and scontrol answers on the node"),
            "a job that saves before its time limit is queued again by `scontrol requeue` from the node: "
            "it must be there (in a container too) and the partition must allow it; "
            "else each time limit ends a training, which the same command then goes on with",
        )
        address = os.environ.get("MLFLOW_TRACKING_URI", "")
        if address.startswith("http"):
            yield Check(
                "tracking server",
                facts["tracking"] is None,
                f"{address} {'answers the node' if facts['tracking'] is None else 'does not: ' + facts['tracking']}",
                "start it with --host 0.0.0.0 and --allowed-hosts, and call it by a name that nodes know "
                "(docs/cluster.md); until then records wait",
                optional=True,
            )

    def _signals(self) -> Iterator[Check]:
        def came(name: str) -> bool:
            file = self.folder / SIGNALS
            return file.exists() and name in file.read_text().split()

        self._cancel("--signal=USR2")
        yield Check(
            "USR2",
            bool(_until(lambda: came("SIGUSR2"), PATIENCE_S)),
            "reaches the job's python",
            "trainings are told by it to save before their time limit: does a wrapper in `container` or `python` keep it back?",
        )
        start = time.monotonic()
        self._cancel()
        told = bool(_until(lambda: came("SIGTERM"), PATIENCE_S))
        ended = bool(_until(lambda: self.state()[0] in GONE, PATIENCE_S))
        took = time.monotonic() - start
        yield Check(
            "scancel",
            told and ended,
            f"SIGTERM reaches it, and squeue shows its end, within {took:.1f} s"
            if told and ended
            else "the job went on"
            if not ended
            else "it got no SIGTERM",
            "cancelled jobs will hold their nodes until KillWait is over",
        )


def _until(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    return None
