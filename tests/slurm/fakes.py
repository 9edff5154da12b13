# SPDX-License-Identifier: Apache-2.0
"""The repository of fake stages of tests/pipeline, with stages that die in every way, a Snakefile and a profile for a real SLURM."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.pipeline.conftest import FAKE_REGISTRY, HERE, STAGES, Repo, build

MANY = 200
_MORE = """
import types

MANY = 200

def stage_named(stage):
    if stage not in STAGES:
        raise RegistryError(f"{stage}: unknown stage; known stages are {', '.join(STAGES)}")

def _declared(stage):
    def outputs(scale, wild):
        if stage == "report":
            return [Path("reports/table.csv"), Path("reports/table.md")]
        return [Path("runs", scale, stage, *wild.values())]
    axes = ("n",) if stage == "many" else ()
    return types.SimpleNamespace(axes=axes, outputs=outputs, reports=stage == "report")

STAGES = {job.stage: _declared(job.stage) for job in jobs(types.SimpleNamespace(scale="tiny"))}

def ends(found):
    used = {path for job in found for path in job.inputs.values()}
    return [job for job in found if not used & set(job.outputs)]

def critical_path(found):
    return {job.name: job.resources.seconds for job in found}
"""
# A time limit of 30 minutes, far from SIGUSR2, which comes 90 s before its end; `stuck` and `idle` have one minute, the least SLURM has.
REGISTRY = (
    FAKE_REGISTRY.replace("minutes: int = 1", "minutes: int = 30")
    .replace(
        '(f"scales.{s}.seed", f"scales.{s}.value"))',
        '(f"scales.{s}.seed", f"scales.{s}.value"), Resources(minutes=1 if stage in ("stuck", "idle") else 30))',
    )
    .replace(
        '        job("dying"),\n',
        '        job("dying"),\n        *(job(stage) for stage in ("exits", "hungry", "stuck", "idle", "early")),\n'
        '        *(job("many", n=str(i)) for i in range(MANY)),\n',
    )
    + _MORE
)
DEADLY = {
    "exits": """
        import os
        def run(ctx):
            print("last words", flush=True)
            os._exit(3)
    """,
    "hungry": """
        import time
        def run(ctx):
            print("last words", flush=True)
            block = b"x" * (500 * 2**20)
            time.sleep(60)
    """,
    # Deaf to SIGUSR2.
    "stuck": """
        import signal, time
        def run(ctx):
            print("last words", flush=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            time.sleep(600)
    """,
    # Hears it, and has nothing to go on from.
    "idle": """
        import time
        def run(ctx):
            print("last words", flush=True)
            for _ in range(6000):
                time.sleep(0.1)
    """,
    # Dies before it has a log of its own.
    "early": """
        def run(ctx):
            pass
    """,
    "many": """
        import time
        def run(ctx):
            (ctx.out / "result").write_text(ctx.job.axes["n"])
    """,
}


class ClusterRepo:
    """A repository of fake stages whose jobs run on a test cluster."""

    def __init__(self, root: Path, slurm: Any) -> None:
        self.slurm = slurm
        self.repo: Repo = build(root, {**STAGES, **DEADLY}, REGISTRY)
        self.root, self.work = self.repo.root, self.repo.work
        for name in ("Snakefile", "cluster/slurm/config.yaml"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / name, root / name)
        (root / "cluster/slurm/settings.yaml").write_text("scale: tiny\nlauncher: slurm\n")
        path = os.pathsep.join([str(root / "bin"), str(Path(sys.executable).parent), self.repo.env["PATH"]])
        # Tests look at the queue more often than the 15 s that are polite.
        self.env = {**self.repo.env, "SLURM_CONF": str(slurm.conf), "SCM_SLURM_POLL": "2", "PATH": path}
        self.repo.env.clear()
        self.repo.env |= self.env

    def start(self, *command: str, log: Path | None = None, **env: str) -> "subprocess.Popen[str]":
        """Starts a command in a session of its own, as a terminal does; what it says is in `log` if that is given."""
        out: Any = subprocess.PIPE if log is None else log.open("a")
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.repo.started.append(process)
        if log is not None:
            out.close()
        return process

    def waiter(self, stage: str, **env: str) -> "subprocess.Popen[str]":
        """Waits for one job, as an engine would have it."""
        return self.start(sys.executable, "driver.py", stage, "slurm", **env)

    def snakemake(self, log: Path, *targets: str, **env: str) -> "subprocess.Popen[str]":
        """Snakemake with the profile for clusters."""
        outputs = [f"runs/tiny/{name}" for name in targets]
        command = ("snakemake", "--profile", "cluster/slurm", "--latency-wait", "1", "--cores", "300", *outputs)
        return self.start(*command, log=log, **env)

    def pipeline(self, *words: str) -> Any:
        """A command of `python -m pipeline`: .returncode, .stdout, .stderr."""
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *words],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def ticket(self, name: str) -> dict[str, Any]:
        """The ticket of a job that is submitted; waits for it."""
        file = self.work / name / "ticket.json"

        def settled() -> Any:
            with contextlib.suppress(FileNotFoundError, ValueError):
                return (found := json.loads(file.read_text()))["job_id"] and found

        found: dict[str, Any] = self.slurm.wait_for(settled)
        return found

    def jobs(self) -> dict[str, tuple[str, str]]:
        """All jobs of this repository that SLURM remembers, the oldest first: id to name and state."""
        rows = (
            line.split("|") for line in self.slurm("squeue", "-hrtall", "-S", "i", "-o", "%i|%j|%T|%Z").splitlines()
        )
        return {row[0]: (row[1], row[2]) for row in rows if row[3] == str(self.root)}

    def submissions(self, name: str) -> list[str]:
        """The ids of those of that name."""
        return [job for job, (known, _) in self.jobs().items() if known.startswith(f"{name}@")]

    def state(self, name: str) -> str:
        """Of the last job of that name."""
        return [state for known, state in self.jobs().values() if known.startswith(f"{name}@")][-1]

    def count_queries(self) -> Path:
        """From now on every squeue of a waiter leaves a line with its time in the file that is returned."""
        (self.root / "bin").mkdir()
        counts, program = self.root / "queries.txt", self.root / "bin/squeue"
        program.write_text(f'#!/bin/sh\ndate +%s.%N >> {counts}\nexec {shutil.which("squeue")} "$@"\n')
        program.chmod(0o755)
        return counts

    def waiters(self) -> list[int]:
        """The processes that wait for jobs of this repository."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                mine = os.readlink(entry / "cwd") == str(self.root) and re.search(
                    rb"driver\.py|\brun\b", b" ".join(words[1:4])
                )
                if mine and words[0].endswith(b"python"):
                    found.append(int(entry.name))
        return found

    def kill_all(self, engine: "subprocess.Popen[str] | None" = None) -> None:
        """SIGKILL to the engine, the shells below it and all waiters."""
        for pid in [*([engine.pid] if engine else []), *self.waiters()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if engine:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
            engine.wait(10)

    def close(self) -> None:
        """Ends what is left; its jobs are cancelled by the cluster's fixture."""
        for process in self.repo.started:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)
