# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline plan [TARGET]`: the jobs that are left to do, with estimated time and disk."""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import manifest, paths, registry
from pipeline.cli import Parser
from pipeline.done import DONE, fingerprint_now, states
from pipeline.errors import RegistryError, suggestion
from pipeline.files import read_json
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, Params, load


@dataclass(frozen=True)
class Estimate:
    """What a job will probably take."""

    seconds: float
    bytes: int
    measured: bool
    """From a run of this very job here, not from the registry."""


def estimate(job: Job, params: Params) -> Estimate:
    """Time and size of the job's last published run with the present parameters and inputs, else what the registry expects."""
    record = read_json(paths.record_file(job)) or {}
    mark = record.get("fingerprint")
    if not isinstance(record.get("seconds"), (int, float)) or mark is None or mark != fingerprint_now(job, params):
        return Estimate(job.resources.seconds, job.resources.bytes, measured=False)
    made = manifest.read(manifest.path_of(job)) or {}
    files = made["files"] if made.get("fingerprint") == mark else {}
    size = sum(entry["bytes"] for entry in files.values()) or job.resources.bytes
    return Estimate(float(record["seconds"]), size, measured=True)


def target_jobs(params: Params, target: str | None) -> list[Job]:
    """The jobs that a target needs, itself included; a target is a job's name, a stage, or an output."""
    jobs = registry.jobs(params)
    if target is None:
        return jobs
    wanted = [job for job in jobs if target in (job.name, job.stage, *(path.as_posix() for path in job.outputs))]
    if not wanted:
        known = [*registry.STAGES, *(job.name for job in jobs), *(p.as_posix() for job in jobs for p in job.outputs)]
        end = suggestion(target, known, "targets")
        if not end.startswith("did"):
            end = "name a stage, a job or an output such as reports/table2.csv"
        raise RegistryError(f"{target}: unknown target at scale {params.scale}; {end}")
    names = {job.name for job in wanted}
    for job in reversed(jobs):
        if job.name in names:
            names.update(parent.name for parent in registry.parents(job, jobs))
    return [job for job in jobs if job.name in names]


def longest_path(jobs: Sequence[Job], seconds: Mapping[str, float]) -> tuple[float, list[str]]:
    """The chain of dependent jobs that takes longest: what remains with any number of machines."""
    best: dict[str, tuple[float, list[str]]] = {}
    for job in jobs:
        before = max((best[parent.name] for parent in registry.parents(job, jobs)), default=(0.0, []))
        best[job.name] = (before[0] + seconds[job.name], [*before[1], job.name])
    return max(best.values(), default=(0.0, []))


def makespan(jobs: Sequence[Job], seconds: Mapping[str, float], cores: int) -> float:
    """Time on `cores` cores when each job starts as soon as its inputs and its threads are there."""
    waiting, done, free, now = list(jobs), set[str](), cores, 0.0
    running: list[tuple[float, str, int]] = []  # a heap by the time of the end
    while waiting or running:
        for job in list(waiting):
            threads = min(job.resources.threads, cores)
            if threads <= free and all(parent.name in done for parent in registry.parents(job, jobs)):
                waiting.remove(job)
                free -= threads
                heapq.heappush(running, (now + seconds[job.name], job.name, threads))
        now, name, threads = heapq.heappop(running)
        done.add(name)
        free += threads
    return now


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 42 s, 4 min 40 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def main(argv: list[str]) -> int:
    """Prints the plan."""
    parser = Parser(prog="python -m pipeline plan", description=__doc__)
    parser.add_argument("target", metavar="TARGET", nargs="?", help="a job, a stage or an output (default: everything)")
    parser.add_argument("--scale", help="default: that of params.yaml")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="default: those of this machine")
    options = parser.parse_args(argv)
    if options.cores < 1:
        raise RegistryError(f"--cores {options.cores}: must be at least 1")
    params = load(paths.root() / PARAMS_FILE, options.scale)
    everything = target_jobs(params, options.target)
    state = states(everything, params)
    left = [job for job in everything if state[job.name] != DONE]
    print(f"scale {params.scale}: {len(left)} of {len(everything)} jobs to do")
    if left:
        _print(left, {job.name: estimate(job, params) for job in left}, state, options.cores)
    return 0


def _print(left: Sequence[Job], estimates: Mapping[str, Estimate], state: Mapping[str, str], cores: int) -> None:
    seconds = {name: item.seconds for name, item in estimates.items()}
    width = max(len(job.name) for job in left)
    print()
    for job in left:
        item = estimates[job.name]
        source = "measured" if item.measured else "estimated"
        print(f"{job.name:{width}}  {state[job.name]:8} {duration(item.seconds):>12} {size(item.bytes):>9}  {source}")
    print()
    for stage in dict.fromkeys(job.stage for job in left):
        members = [estimates[job.name] for job in left if job.stage == stage]
        total, disk = sum(item.seconds for item in members), sum(item.bytes for item in members)
        print(f"{stage:{width}}  {len(members):<8} {duration(total):>12} {size(disk):>9}")
    total, disk = sum(seconds.values()), sum(item.bytes for item in estimates.values())
    print(f"{'total':{width}}  {len(left):<8} {duration(total):>12} {size(disk):>9}")
    longest, path = longest_path(left, seconds)
    print()
    print(f"about {duration(makespan(left, seconds, cores))} on {cores} core{'s' * (cores > 1)}")
    print(f"longest path {duration(longest)}: {' → '.join(path)}")
    if not all(item.measured for item in estimates.values()):
        print("measured: the same job's last run here; estimated: from the registry, for one core of a 2020s laptop")
