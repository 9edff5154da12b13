# SPDX-License-Identifier: Apache-2.0
"""Where things lie: the repository root, and each job's working folder, locks, log and record.

Everything a scale makes or needs lies below `runs/<scale>/`, except the finished tables and figures: `reports/` holds
those of the scale that was run last.
"""

import functools
import os
from pathlib import Path
from typing import Protocol

from pipeline.errors import PipelineError

MANIFEST = "manifest.json"
SWEEP, FACTS, SUMMARY, METRICS = (
    "sweep.csv",
    "evaluation.json",
    "summary.csv",
    "metrics.json",
)  # in the output of evaluate
CURVE = "training.csv"  # in that of every training
FLOOR, FLOOR_ROWS = "reconstruction.json", "reconstruction.csv"  # in that of reconstruction


class JobName(Protocol):
    """What the paths of a job depend on."""

    @property
    def scale(self) -> str: ...

    @property
    def name(self) -> str: ...


def root() -> Path:
    """The repository root: `SCM_ROOT`, else the nearest folder upwards from here that holds params.yaml."""
    named, here = os.environ.get("SCM_ROOT"), os.getcwd()
    folder = _root(named, here)
    if not os.path.isfile(f"{folder}/params.yaml"):  # it was there when it was looked for
        _root.cache_clear()
        folder = _root(named, here)
    return folder


@functools.lru_cache
def _root(named: str | None, cwd: str) -> Path:
    """The root from there; every path that a command looks at begins with it, thousands in one look at all jobs."""
    if named:
        folder = Path(named).resolve()
        if not (folder / "params.yaml").is_file():
            raise PipelineError(f"SCM_ROOT={named}: there is no params.yaml in it; point it at the repository")
        return folder
    here = Path(cwd).resolve()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file():
            return folder
    raise PipelineError(f"{here}: no params.yaml here or above; run this inside the repository or set SCM_ROOT")


def runs(scale: str) -> Path:
    """`runs/<scale>`, absolute."""
    return root() / "runs" / scale


def evaluation_cache(scale: str) -> Path:
    """Where numbers of image sets are kept, and their features until the numbers are there."""
    return runs(scale) / ".cache" / "evaluation"


def job_folder(job: JobName) -> Path:
    """The job's working folder: ticket, process, checkpoints (`work/`), staging (`out/`), progress, exit note."""
    return runs(job.scale) / ".work" / job.name


def lock_file(job: JobName, kind: str) -> Path:
    """A lock of the job: `run` (held while it computes), `ticket` (submitting, publishing), `waiters` (shared).

    Locks lie beside the working folder, not in it: the folder is moved aside or removed while a lock is held.
    """
    return runs(job.scale) / ".work" / f"{job.name}.{kind}.lock"


def log_file(job: JobName, rank: int = 0) -> Path:
    """The job's log, or that of another of its tasks; it stays after success."""
    return runs(job.scale) / ".logs" / (f"{job.name}.rank-{rank}.log" if rank else f"{job.name}.log")


def records(scale: str) -> Path:
    """The folder of the records of a scale's jobs, and of the manifests of its reports."""
    return runs(scale) / ".records"


def record_file(job: JobName) -> Path:
    """What is not deterministic about the last published execution: MLflow run, commit, times, host."""
    return records(job.scale) / f"{job.name}.json"


def report_manifest(job: JobName) -> Path:
    """Where the manifest of a report stage lies, as its outputs are files, not a folder."""
    return records(job.scale) / f"{job.name}.manifest.json"


def relative(path: Path) -> str:
    """`path` as one would type it in the repository root."""
    try:
        return path.resolve().relative_to(root()).as_posix()
    except (ValueError, PipelineError):  # somewhere else, or there is no repository here
        return str(path)
