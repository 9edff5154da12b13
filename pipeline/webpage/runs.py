# SPDX-License-Identifier: Apache-2.0
"""The lineage: every run that the page's inputs were made from, by their manifests; and what was recorded of each execution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline import manifest, paths, registry
from pipeline.files import read_json
from pipeline.job import Job
from pipeline.params import Params
from pipeline.provenance import comparable
from pipeline.trace import commits
from pipeline.webpage.markup import anchor

UNSET = "not set"


@dataclass(frozen=True)
class Parent:
    """An input of a run."""

    name: str
    run: str
    """Its run id, or the path of a plain file."""
    digest: str
    anchor: str | None
    """None where that run is not in runs/ any more: it was made again since."""


@dataclass(frozen=True)
class Difference:
    """A parameter in which a run differs from most of its stage."""

    name: str
    value: str
    usual: str


@dataclass(frozen=True)
class Run:
    """One published run."""

    job: Job
    made: Mapping[str, Any]
    """Its manifest."""
    digest: str
    """SHA-256 of the manifest, which has those of all files."""
    record: Mapping[str, Any]
    """Of its execution: commit, times, machine. Empty where there is none."""
    parents: Sequence[Parent] = ()
    differences: Sequence[Difference] = ()
    params: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`<job>-<8 digits of the fingerprint>`."""
        return str(self.made["run"])

    @property
    def anchor(self) -> str:
        """Where it is on the page."""
        return anchor("run", self.id)

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(entry["bytes"] for entry in self.made["files"].values())

    @property
    def commit(self) -> str:
        """Those that it was made with."""
        return commits(self.record)


@dataclass(frozen=True)
class Stage:
    """The runs of a stage."""

    name: str
    title: str
    runs: Sequence[Run]
    missing: Sequence[str]
    """Jobs without a run."""


def ancestors(job: Job, params: Params) -> list[Job]:
    """All jobs of the scale that `job` reads from, at any distance, in topological order."""
    everything = registry.jobs(params, job.scale)
    wanted = {job.name}
    for other in reversed(everything):
        if other.name in wanted:
            wanted.update(parent.name for parent in registry.parents(other, everything))
    return [other for other in everything if other.name in wanted - {job.name}]


def stages(jobs: Sequence[Job]) -> list[Stage]:
    """The runs of these jobs, by stage."""
    found = {job.name: (job, made) for job in jobs if (made := manifest.read(manifest.path_of(job))) is not None}
    known = {made["run"]: anchor("run", made["run"]) for _, made in found.values()}
    result = []
    for name in dict.fromkeys(job.stage for job in jobs):
        members = [job for job in jobs if job.stage == name]
        named = {job.name: comparable(found[job.name][1]["params"]) for job in members if job.name in found}
        usual = _usual(named.values())
        runs = [_run(*found[job], own, usual, known) for job, own in named.items()]
        absent = [job.name for job in members if job.name not in found]
        result.append(Stage(name, registry.STAGES[name].title, runs, absent))
    return result


def _run(
    job: Job, made: Mapping[str, Any], own: Mapping[str, str], usual: Mapping[str, str], known: Mapping[str, str]
) -> Run:
    record = read_json(paths.record_file(job)) or {}
    parents = [
        Parent(name, source["run"] or source["path"], source["digest"], known.get(source["run"]))
        for name, source in made["inputs"].items()
    ]
    differences = [Difference(key, value, usual[key]) for key, value in own.items() if value != usual[key]]
    absent = [Difference(key, UNSET, value) for key, value in usual.items() if key not in own and value != UNSET]
    return Run(
        job,
        made,
        manifest.digest(manifest.path_of(job)),
        record if record.get("run") == made["run"] else {},
        parents,
        sorted(differences + absent, key=lambda item: item.name),
        own,
    )


def _usual(runs: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Of each parameter the value that most runs have, or that they have it not; of several the first."""
    known = list(runs)
    names = dict.fromkeys(key for run in known for key in run)
    return {key: Counter(run.get(key, UNSET) for run in known).most_common(1)[0][0] for key in names}
