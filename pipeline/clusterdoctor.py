# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline doctor --cluster`: tries a SLURM site, with one tiny job for each kind of request, and says what to change.

Everything that launching relies on is tried, not looked up: files and locks across machines, signals, requeue, the environment. What can
only be looked up (preemption, limits) is asked of `scontrol`. A job takes as many nodes as the largest of its kind, and of each a core and,
where the kind has GPUs, one of these.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import doctor, paths, preflight, registry, site
from pipeline.doctor import Check
from pipeline.errors import PipelineError
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.probe import MARK
from pipeline.reading import read_yaml
from pipeline.trial import Trial

SETTINGS = "cluster/slurm/settings.yaml"
SHORT_AGE_S = 60  # below that a job may be forgotten before all waiters have seen how it ended
NETWORKED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "smb", "fuse", "panfs", "wekafs", "orangefs", "afs")


def checks(scale: str | None, wait_s: float) -> Iterator[Check]:
    """All checks; jobs are submitted only if SLURM's programs and the site's settings are in order."""
    for what, detail, attempt in (
        ("SLURM's programs", ", ".join(preflight.PROGRAMS), preflight.programs),
        ("site settings", _settings(), site.load),
        ("environment", "no SBATCH_EXPORT that keeps it from jobs", preflight.environment),
    ):
        try:
            attempt()
            yield Check(what, True, detail)
        except PipelineError as error:
            yield Check(what, False, remedy=str(error))
            return
    yield from doctor.guarded("runs/", lambda: [shared_folder()])
    yield from doctor.guarded("scheduler", configuration)
    yield accounting()
    yield tracking_store()
    settings = site.load()
    try:
        params = load(paths.root() / PARAMS_FILE, scale or _profile_scale())
        jobs = registry.jobs(params)
        trials = [Trial.of(settings, kind, jobs) for kind in dict.fromkeys(map(site.kind, jobs))]
    except PipelineError as error:
        yield Check("requests", False, remedy=str(error))
        return
    yield from doctor.guarded("requests", lambda: requests(settings, params))
    yield from run(list({str(trial.request): trial for trial in trials}.values()), wait_s)


def _settings() -> str:
    return site.SITE if (paths.root() / site.SITE).exists() else f"no {site.SITE}: SLURM's defaults"


def _profile_scale() -> str | None:
    """The scale that the profile cluster/slurm sets."""
    file = paths.root() / SETTINGS
    scale = read_yaml(file, SETTINGS).get("scale") if file.exists() else None
    return None if scale is None else str(scale)


def shared_folder() -> Check:
    """Writable, and on what kind of file system."""
    preflight.shared_folder()
    kind = file_system(paths.root() / "runs")
    return Check("runs/", True, f"writable, on {kind}" if kind else "writable")


def file_system(path: Path) -> str:
    """The kind of file system, such as nfs; empty where the system does not say."""
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def configuration() -> Iterator[Check]:
    """What the cluster does to jobs, by `scontrol show config`."""
    lines = (line.partition("=") for line in preflight.ask(["scontrol", "show", "config"]).splitlines())
    known = {key.strip(): value.strip() for key, _, value in lines}
    yield Check("SLURM", True, known.get("SLURM_VERSION", "?"))
    age = _seconds(known.get("MinJobAge", ""))
    yield Check(
        "ended jobs are shown",
        age >= SHORT_AGE_S,
        f"for {age} s (MinJobAge)",
        f"ask the administrators for MinJobAge of {SHORT_AGE_S} s or more, or set SCM_SLURM_POLL to half of it: "
        "how a job died might be missed",
        optional=True,
    )
    yield preemption(known)
    wait = _seconds(known.get("KillWait", ""))
    yield Check(
        "after SIGTERM", True, f"a job has {wait} s (KillWait) before SIGKILL: at scancel, and at its time limit"
    )
    hold = re.search(r"cred_expire=(\d+)", known.get("AuthInfo", ""))
    yield Check("a requeued job", True, f"starts again after {hold[1] if hold else 120} s at the earliest")


def preemption(known: dict[str, str]) -> Check:
    """Whether jobs are preempted, and with what warning."""
    kind, mode = known.get("PreemptType", ""), known.get("PreemptMode", "OFF")
    if kind.endswith("none") or mode == "OFF":
        return Check("preemption", True, "off")
    told = "preempt_send_user_signal" in known.get("SlurmctldParameters", "")
    detail = f"{mode.lower()}, {'with' if told else 'without'} the signal that lets a training save first"
    if "CANCEL" in mode:
        return Check(
            "preemption",
            False,
            detail,
            "a preempted job is not requeued by SLURM but submitted again while somebody waits for it: keep Snakemake running",
            optional=True,
        )
    if not told:
        detail += "; what came after the last checkpoint is computed again (checkpoint_every in params.yaml)"
    return Check("preemption", True, detail)


def _seconds(text: str) -> int:
    number = re.match(r"\d+", text)
    return int(number[0]) if number else 0


def accounting() -> Check:
    """sacct, which the launcher does not need."""
    here = shutil.which("sacct") is not None
    done = subprocess.run(["sacct", "-n", "-X"], capture_output=True, text=True, check=False) if here else None
    there = done is not None and done.returncode == 0
    return Check("sacct", True, "there" if there else "not there; not needed")


def tracking_store() -> Check:
    """A database file is for one machine."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    if named and not named.startswith("sqlite:"):
        return Check("tracking store", True, named)
    kind = file_system(paths.root())
    what = named or "SQLite in a file (MLFLOW_TRACKING_URI is not set)"
    return Check(
        "tracking store",
        False,
        f"{what}, on {kind}" if kind else what,
        "jobs of several machines corrupt a database file on a network file system: "
        "start `mlflow server` and set MLFLOW_TRACKING_URI (docs/cluster.md)",
        optional=not any(name in kind for name in NETWORKED),
    )


def requests(settings: site.Site, params: Params) -> Iterator[Check]:
    """Whether SLURM would take what the jobs of the scale ask for."""
    for job, request in preflight.distinct(settings, registry.jobs(params)):
        what = f"{site.kind(job)} at scale {params.scale}"
        nodes = f"{request['nodes']} nodes of " if request["nodes"] > 1 else ""
        detail = f"{nodes}{preflight.asked(request)}, {request['time'] / 60:.3g} hours"
        try:
            preflight.accepts(job, request)
            yield Check(what, True, f"{detail}: accepted")
        except PipelineError as error:
            yield Check(what, False, detail, str(error))


def run(trials: list[Trial], wait_s: float) -> Iterator[Check]:
    """Submits the jobs, and follows all of them at once."""
    home = str(Path(__file__).resolve().parents[1])
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != home]
    os.environ |= {"PYTHONPATH": os.pathsep.join([home, *known]), MARK: "1"}
    packages = tuple(doctor.pins())
    queued = []
    pool = ThreadPoolExecutor(max(1, len(trials)))
    try:
        for trial in trials:
            try:
                trial.submit(packages)
                queued.append(trial)
            except Exception as error:  # submitit's own errors are of several kinds
                yield Check(f"{trial.kind}: a job", False, remedy=" ".join(str(error).split())[:300])
        for found in pool.map(lambda trial: trial.check(wait_s), queued):
            yield from found
    finally:
        for trial in trials:  # first, as a thread follows its job until that has ended: Ctrl-C would wait for the queue
            trial.close()
        pool.shutdown()
