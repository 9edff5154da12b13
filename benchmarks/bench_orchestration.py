# SPDX-License-Identifier: Apache-2.0
"""What it costs to send the pipeline through SLURM: `python benchmarks/bench_orchestration.py [--rounds N] [WAY …]`.

The jobs behind reports/table2.csv at scale smoke, from nothing, each time in a new copy of the repository:

- inline: Snakemake runs each job in the process that it starts, two at a time;
- slurm: `--profile cluster/slurm`, on a test cluster (`cluster/testcluster`) of two nodes with one processor each: two at a time as well;
- native: `--profile cluster/slurm-native`, Snakemake's own executor for SLURM, on the same kind of cluster. It is told to look at a new job
  after 2 seconds instead of its 40, which would be most of the time here.

The ways take turns in each round, so that a busy machine is as busy for all. Jobs of this scale take some seconds, most of which is Python
starting: no pipeline would be sent to a cluster for them, and what a launcher adds to each weighs as much as it ever will.

Writes benchmarks/results/orchestration.json and .md.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from report import RESULTS, arguments_of, processor, write

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.5  # slurm over inline
TABLE = "reports/table2.csv"
WAYS = {
    "inline": ["--profile", "cluster/local", "--cores", "2", "--config", "scale=smoke", "launcher=inline"],
    "slurm": ["--profile", "cluster/slurm", "--config", "scale=smoke"],
    "native": [
        *("--profile", "cluster/slurm-native", "--slurm-init-seconds-before-status-checks", "2"),
        *("--default-resources", "slurm_partition=main", "nodes=1", "--config", "scale=smoke"),
    ],
}
NAMES = {
    "inline": "inline",
    "slurm": "this pipeline, `cluster/slurm`",
    "native": "Snakemake's executor, `cluster/slurm-native`",
}


def copy_of_repository(folder: Path) -> None:
    """The tracked files as they are now, as a git repository with one commit."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    identity = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@example.invalid"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


@contextmanager
def cluster(way: str) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands speak to a new test cluster; nothing for the way that needs none."""
    if way == "inline":
        yield {}
        return
    tool = [sys.executable, str(ROOT / "cluster/testcluster"), "--folder"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        home, conf = Path(folder) / "c", Path(folder) / "c" / "slurm.conf"
        # The plugin's jobs do not keep SLURM_CONF, which a cluster without /etc/slurm needs.
        srun = Path(folder) / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n')
        srun.chmod(0o755)
        subprocess.run([*tool, str(home), "start", "--cpus", "1"], check=True, stdout=subprocess.DEVNULL)
        try:
            yield {"SLURM_CONF": str(conf), "PATH": os.pathsep.join([str(srun.parent), os.environ.get("PATH", "")])}
        finally:
            subprocess.run([*tool, str(home), "stop"], check=True)


def run(way: str) -> dict[str, Any]:
    """One run from nothing: its seconds, its jobs, the digest of its table."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, cluster(way) as env:
        root = Path(folder)
        copy_of_repository(root)
        path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH") or os.environ.get("PATH", "")])
        # The copy's code first; what else is on the path may have the plugin of `native`.
        modules = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, **env, "PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"}
        env.pop("SCM_LAUNCHER", None)
        started = time.monotonic()
        command = ["snakemake", *WAYS[way], "--", TABLE]
        done = subprocess.run(
            command, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - started
        if done.returncode != 0:
            raise SystemExit(f"{way}: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
        jobs = sum(".manifest" not in file.name for file in root.glob("runs/smoke/.records/*.json"))
        print(f"{way}: {jobs} jobs in {seconds:.0f} s", flush=True)
        return {"seconds": seconds, "jobs": jobs, "table": hashlib.sha256((root / TABLE).read_bytes()).hexdigest()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a way; its ratios are taken round by round, later."""
    return {
        "seconds": [round(run["seconds"], 1) for run in runs],
        "jobs": runs[0]["jobs"],
        "tables": sorted({r["table"] for r in runs}),
    }


def ratios(report: dict[str, Any], way: str) -> list[float]:
    """Of a way's time over inline's, in the same round."""
    pairs = zip(report["ways"][way]["seconds"], report["ways"]["inline"]["seconds"], strict=True)
    return [seconds / inline for seconds, inline in pairs]


def markdown(report: dict[str, Any]) -> str:
    """The page."""
    ways = report["ways"]
    rows = []
    for way, found in ways.items():
        over = statistics.median(ratios(report, way))
        added = (
            statistics.median(a - b for a, b in zip(found["seconds"], ways["inline"]["seconds"], strict=True))
            / found["jobs"]
        )
        word = ("met" if over <= TARGET else "missed") if way == "slurm" else ""
        rows.append(
            f"| {NAMES[way]} | {found['jobs']} | {statistics.median(found['seconds']):.0f} | {over:.2f} | {added:+.1f} | "
            f"{f'≤ {TARGET} ({word})' if word else ''} |"
        )
    same = (
        "the same bytes in every run"
        if len({t for found in ways.values() for t in found["tables"]}) == 1
        else "**not the same in all**"
    )
    missing = "".join(f"\n{NAMES[way]} was not measured: {why}.\n" for way, why in report["missing"].items())
    measured = f"{report['cpu']}, {report['cores']} cores, load {report['load']:.1f} at the start; Snakemake {report['snakemake']}"
    return f"""# Orchestration: SLURM against inline

{measured}, submitit {report["submitit"]}, {report["slurm"]}.
The jobs behind {TABLE} at scale smoke from nothing, two at a time; {report["rounds"]} rounds in which the ways take turns.
Ratios are medians of those within a round. Table 2: {same}.

| way | jobs | seconds | over inline | seconds more per job | target |
|---|---:|---:|---:|---:|---|
{chr(10).join(rows)}
{missing}
Each of these jobs computes for a few seconds; what a launcher adds to a job does not grow with it. A real cluster's queue adds its own.
Made by `python benchmarks/bench_orchestration.py`.
"""


def main() -> None:
    """Runs every way in every round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = arguments_of(parser, "way", WAYS)
    missing = {}
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        missing["native"] = "snakemake-executor-plugin-slurm is not installed"
    chosen = [way for way in (options.ways or WAYS) if way not in missing]
    if "inline" not in chosen:
        parser.error("inline: must be among the ways, as the others are compared with it")
    daemon = shutil.which("slurmctld", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])) or "slurmctld"
    slurm = subprocess.run([daemon, "-V"], capture_output=True, text=True, check=True).stdout.strip()
    report = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "snakemake": version("snakemake"),
        "submitit": version("submitit"),
        "slurm": slurm,
        "rounds": options.rounds,
        "missing": missing,
    }
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in chosen}
    for _ in range(options.rounds):
        for way in chosen:
            runs[way].append(run(way))
    report["ways"] = {way: summary(found) for way, found in runs.items()}
    write(report, RESULTS / "orchestration.json", markdown)
    print(markdown(report))


if __name__ == "__main__":
    main()
