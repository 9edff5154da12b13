# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline plan [TARGET]`: the jobs that are left to do, with estimated time and disk."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline import manifest, paths, registry
from pipeline.cli import Parser
from pipeline.done import DONE, fingerprint_now, states
from pipeline.errors import RegistryError, suggestion
from pipeline.files import read_json
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, Params, load

MEASURED, BY_RATE, ESTIMATED = "measured", "by rate", "estimated"


@dataclass(frozen=True)
class Estimate:
    """What a job will probably take."""

    seconds: float
    bytes: int
    source: str
    """measured: a run of this very job here; by rate: what the registry expects, at the rate of finished jobs of the stage; estimated."""


def estimate(job: Job, params: Params) -> Estimate:
    """Time and size of the job's last published run with the present parameters and inputs, else what the registry expects."""
    record = read_json(paths.record_file(job)) or {}
    mark = record.get("fingerprint")
    if not isinstance(record.get("seconds"), (int, float)) or mark is None or mark != fingerprint_now(job, params):
        return Estimate(job.resources.seconds, job.resources.bytes, ESTIMATED)
    made = manifest.read(manifest.path_of(job)) or {}
    files = made["files"] if made.get("fingerprint") == mark else {}
    size = sum(entry["bytes"] for entry in files.values()) or job.resources.bytes
    return Estimate(float(record["seconds"]), size, MEASURED)


def estimates(jobs: Sequence[Job], params: Params) -> dict[str, Estimate]:
    """The estimate of each job, by name. A stage's measured jobs took some multiple of what was expected of them: so will its others."""
    found = {job.name: estimate(job, params) for job in jobs}
    for stage in dict.fromkeys(job.stage for job in jobs):
        members = [job for job in jobs if job.stage == stage]
        measured = [job for job in members if found[job.name].source == MEASURED]
        if not measured:
            continue
        rate = sum(found[job.name].seconds for job in measured) / sum(job.resources.seconds for job in measured)
        for job in members:
            if found[job.name].source == ESTIMATED:
                found[job.name] = Estimate(rate * job.resources.seconds, job.resources.bytes, BY_RATE)
    return found


class Free(NamedTuple):
    """Cores and GPUs that nobody uses, or that a job does."""

    cores: int
    gpus: int


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


def makespan(jobs: Sequence[Job], seconds: Mapping[str, float], cores: int, gpus: int = 0) -> float:
    """Time on `cores` cores and `gpus` GPUs when each job starts as soon as its inputs are there and what it asks for is free."""
    waiting, done, now = list(jobs), set[str](), 0.0
    free = Free(cores, gpus)
    running: list[tuple[float, str, Free]] = []  # a heap by the time of the end
    while waiting or running:
        for job in list(waiting):
            needs = Free(min(job.resources.threads, cores), min(job.resources.gpus, gpus))
            fits = needs.cores <= free.cores and needs.gpus <= free.gpus
            if fits and all(parent.name in done for parent in registry.parents(job, jobs)):
                waiting.remove(job)
                free = Free(free.cores - needs.cores, free.gpus - needs.gpus)
                heapq.heappush(running, (now + seconds[job.name], job.name, needs))
        now, name, back = heapq.heappop(running)
        done.add(name)
        free = Free(free.cores + back.cores, free.gpus + back.gpus)
    return now


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 42 s, 4 min 40 s, 3 h 20 min, 5.3 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 100 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole / 86400:.1f} days"


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
    parser.add_argument(
        "--gpus", type=int, help="of a scale with GPUs: how many there are (default: enough for all jobs)"
    )
    parser.add_argument(
        "--json", action="store_true", help="for programs: everything that is printed, in seconds and bytes"
    )
    options = parser.parse_args(argv)
    for name in ("cores", "gpus"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise RegistryError(f"--{name} {given}: must be at least 1")
    params = load(paths.root() / PARAMS_FILE, options.scale)
    if options.gpus and not params.active.hardware:
        raise RegistryError(
            f"--gpus {options.gpus}: scale {params.scale} has no section hardware, so its jobs use no GPUs"
        )
    everything = target_jobs(params, options.target)
    state = states(everything, params)
    found = estimates(everything, params)
    plan = Plan(params, options.target, [job for job in everything if state[job.name] != DONE], state, found)
    if options.json:
        print(json.dumps(plan.facts(options.cores, options.gpus), indent=1, ensure_ascii=False))
        return 0
    print(f"scale {params.scale}: {len(plan.left)} of {len(everything)} jobs to do")
    if plan.left:
        plan.print(options.cores, options.gpus)
    return 0


@dataclass(frozen=True)
class Plan:
    """The jobs that are left to do for a target, and what each will take."""

    params: Params
    target: str | None
    left: list[Job]
    states: Mapping[str, str]
    found: Mapping[str, Estimate]

    @property
    def seconds(self) -> dict[str, float]:
        """Of the jobs left, by name."""
        return {job.name: self.found[job.name].seconds for job in self.left}

    def gpu_hours(self, jobs: Iterable[Job]) -> float:
        """GPUs that jobs hold, times the hours."""
        return sum(job.resources.gpus * self.found[job.name].seconds for job in jobs) / 3600

    def total(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Sums over jobs."""
        return {
            "jobs": len(jobs),
            "seconds": round(sum(self.found[job.name].seconds for job in jobs), 1),
            "gpu_hours": round(self.gpu_hours(jobs), 2),
            "bytes": sum(self.found[job.name].bytes for job in jobs),
            "scratch_bytes": sum(job.resources.scratch_bytes for job in jobs),
        }

    def stages(self) -> dict[str, list[Job]]:
        """The jobs left of each stage."""
        names = dict.fromkeys(job.stage for job in self.left)
        return {name: [job for job in self.left if job.stage == name] for name in names}

    def elapsed(self, cores: int, gpus: int | None) -> float:
        """Time until all is done; with enough GPUs for all that is given as None, cores are no limit either."""
        if self.params.active.hardware is None:
            return makespan(self.left, self.seconds, cores)
        if gpus is None:
            return longest_path(self.left, self.seconds)[0]
        return makespan(self.left, self.seconds, sum(job.resources.threads for job in self.left), gpus)

    def assumptions(self) -> list[str]:
        """What the numbers rest on, in words."""
        sources = {self.found[job.name].source for job in self.left}
        words = []
        if MEASURED in sources:
            words.append("measured: the same job's last run here")
        if BY_RATE in sources:
            words.append(
                "by rate: from the registry, at the rate at which finished jobs of the stage were slower or faster"
            )
        hardware = self.params.active.hardware
        if hardware is None:
            if ESTIMATED in sources:
                words.append("estimated: from the registry, for one core of a 2020s laptop")
            return words
        rate = f"{hardware.peak_tflops:g} TFLOP/s × {hardware.utilisation:g} = {hardware.flops / 1e12:.3g} TFLOP/s of model FLOPs"
        if ESTIMATED in sources:
            words.append(
                f"estimated: from the registry, with {rate} on each {hardware.gpu} (section hardware of params.yaml)"
            )
            words.append("the utilisation is assumed; the metrics after the features are not counted")
        words.append(
            "waiting in a queue is not counted; disk: what stays, and what checkpoints and features take while jobs run"
        )
        return words

    def facts(self, cores: int, gpus: int | None) -> dict[str, Any]:
        """Everything, as JSON values."""
        longest, path = longest_path(self.left, self.seconds)
        jobs = [
            {
                "name": job.name,
                "stage": job.stage,
                "state": self.states[job.name],
                "gpus": job.resources.gpus,
                **{key: value for key, value in self.total([job]).items() if key != "jobs"},
                "source": self.found[job.name].source,
            }
            for job in self.left
        ]
        return {
            "scale": self.params.scale,
            "target": self.target,
            "jobs": jobs,
            "stages": {stage: self.total(members) for stage, members in self.stages().items()},
            "total": self.total(self.left),
            "elapsed_s": round(self.elapsed(cores, gpus), 1),
            "longest_path": {"seconds": round(longest, 1), "jobs": path},
            "assumptions": self.assumptions(),
        }

    def print(self, cores: int, gpus: int | None) -> None:
        """For people."""
        width, hardware = max(len(job.name) for job in self.left), self.params.active.hardware
        print()
        for job in self.left:
            item = self.found[job.name]
            held = f"{job.resources.gpus or '–':>2} GPU {self.gpu_hours([job]):8,.0f} GPU-h  " if hardware else ""
            words = f"{duration(item.seconds):>12} {held}{size(item.bytes):>9}  {item.source}"
            print(f"{job.name:{width}}  {self.states[job.name]:8} {words}")
        print()
        for name, members in {**self.stages(), "total": self.left}.items():
            total = self.total(members)
            held = f"{'':6} {total['gpu_hours']:8,.0f} GPU-h  " if hardware else ""
            words = f"{duration(total['seconds']):>12} {held}{size(total['bytes']):>9}"
            print(f"{name:{width}}  {len(members):<8} {words}")
        longest, path = longest_path(self.left, self.seconds)
        where = f"{cores} core{'s' * (cores > 1)}"
        if hardware:
            where = "as many GPUs as are wanted at once" if gpus is None else f"{gpus} GPU{'s' * (gpus > 1)}"
        print(f"\nabout {duration(self.elapsed(cores, gpus))} on {where}")
        print(f"longest path {duration(longest)}: {' → '.join(path)}")
        if hardware:
            print(f"beside the outputs up to {size(self.total(self.left)['scratch_bytes'])} while all jobs run")
        for line in self.assumptions():
            print(line)
