# SPDX-License-Identifier: Apache-2.0
"""What is checked before anything is submitted to SLURM, so that a mistake is one sentence now and not a failed job tonight.

SLURM's programs, the site's settings, the shared folder, and, once for each distinct request, whether SLURM would take it
(`sbatch --test-only`, which queues nothing). Snakemake checks all jobs that it is about to run, `python -m pipeline run` its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import paths
from pipeline.errors import PipelineError, suggestion
from pipeline.files import Lock, read_json, sha256_text, user, write_json
from pipeline.scheduler import passes, query_s, unfiltered
from pipeline.site import SITE, Site

if TYPE_CHECKING:
    from pipeline.registry import Job

PROGRAMS = ("sbatch", "srun", "squeue", "scancel")
KNOWN_S = 600.0  # an accepted request is not tried again for so long, whoever asks
TIMEOUT_S = 60.0
# What submitit makes of a request besides options of sbatch.
NO_OPTIONS = {"setup", "srun_args", "stderr_to_stdout", "signal_delay_s", "additional_parameters", "python"}


class NoAnswerError(PipelineError):
    """The scheduler is away, or takes no job now; submitting may still succeed, later."""


def check(site: Site, jobs: Iterable[Job]) -> None:
    """`PipelineError` in one sentence for the first thing that would keep the jobs from running."""
    programs()
    environment()
    shared_folder()
    for job, request in distinct(site, jobs):
        if not _known(request):
            accepts(job, request)
            _remember(request)


def before_submission(site: Site, job: Job) -> None:
    """`check` for a job that is submitted next. A scheduler that is away is not its affair: sbatch will say so, or is back."""
    try:
        check(site, [job])
    except NoAnswerError:
        return


def accepts(job: Job, request: dict[str, Any]) -> None:
    """SLURM takes a job with this request, and would start it; `PipelineError` says what keeps it from that."""
    limits = partitions()
    _fits(job, request, limits)
    _accepted(job, request, limits)


def programs() -> None:
    """SLURM's programs are on the PATH."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        be = "is" if len(missing) == 1 else "are"
        raise PipelineError(f"launcher slurm: {', '.join(missing)} {be} not on the PATH; run this on a login node")


def environment() -> None:
    """Jobs get the variables of this process: SCM_DATA and the like, and those that submitit sets. SCM_SLURM_POLL is a number."""
    query_s()
    export = os.environ.get("SBATCH_EXPORT", "ALL")
    if not export.startswith("ALL"):
        raise PipelineError(f"SBATCH_EXPORT={export} keeps variables from jobs that they need; unset SBATCH_EXPORT")


def shared_folder() -> None:
    """Jobs' folders can be made in runs/."""
    folder = paths.root() / "runs"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PipelineError(
            f"{paths.relative(folder)}: cannot be written ({error.strerror}); jobs and this command share this folder: "
            "make it writable for this user, or link it to a folder of a shared file system that is"
        ) from None


def distinct(site: Site, jobs: Iterable[Job]) -> list[tuple[Job, dict[str, Any]]]:
    """The requests that differ in more than their time, each with the longest time and the job that asks for it."""
    longest: dict[str, tuple[Job, dict[str, Any]]] = {}
    for job in jobs:
        request = site.request(job)
        key = _key(request)
        if key not in longest or request["time"] > longest[key][1]["time"]:
            longest[key] = job, request
    return list(longest.values())


def options(request: dict[str, Any]) -> list[str]:
    """A request as options of sbatch."""
    values = {key: value for key, value in request.items() if key not in NO_OPTIONS}
    values |= request.get("additional_parameters", {})
    return [f"--{key.replace('_', '-')}{'' if value is True else f'={value}'}" for key, value in values.items()]


def partitions() -> dict[str, float]:
    """The partitions that this user sees, with their time limits in minutes; the default one is also called "" here."""
    lines = ask(["sinfo", "-h", "-a", "-o", "%P|%l"]).splitlines()
    found = {}
    for name, _, limit in (line.partition("|") for line in lines):
        found[name.rstrip("*")] = minutes(limit)
        if name.endswith("*"):
            found[""] = minutes(limit)
    return found


def minutes(limit: str) -> float:
    """A time limit as sinfo writes it, [days-][[hours:]minutes:]seconds or infinite, in minutes."""
    days, dash, rest = limit.strip().rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        seconds = sum(part * 60**place for place, part in enumerate(reversed(parts)))
        return (int(days) * 1440 if dash else 0) + seconds / 60
    except ValueError:  # infinite, n/a
        return float("inf")


def _fits(job: Job, request: dict[str, Any], limits: dict[str, float]) -> None:
    """A partition's time limit is compared here: SLURM by default takes a job that is too long, and never starts it."""
    named = str(request.get("partition", ""))
    # A name that is not listed is left to sbatch, which says what is wrong with it.
    most = max((limits.get(one, float("inf")) for one in named.split(",")), default=float("inf"))
    if request["time"] > most:
        where = f"partition {named}" if named else "the default partition"
        remedy = (
            f"lower scales.{job.scale}.hardware.time_limit_hours in params.yaml (a longer training goes on from its checkpoint)"
            if job.resources.gpus
            else f"name another in {SITE}"
        )
        raise PipelineError(
            f"{job.name}: asks for {request['time'] / 60:.3g} hours, but {where} ends jobs after {most / 60:.3g}; {remedy}"
        )


def _accepted(job: Job, request: dict[str, Any], limits: dict[str, float]) -> None:
    try:
        # As lines of a script, as submitit writes them: SBATCH_PARTITION and the like win over these, but not over a command line.
        lines = [f"#SBATCH {shlex.quote(option)}" for option in options(request)]
        ask(["sbatch", "--test-only"], "\n".join(["#!/bin/sh", *lines, "true\n"]))
    except NoAnswerError:
        raise
    except PipelineError as error:
        words = str(error)
        if "partition not available" in words.lower():  # it was switched off for a while; jobs wait
            return
        if "node configuration" in words.lower() or "(gres)" in words.lower():
            have = nodes(request.get("partition"))
            would_do = sum(count for node, count in have.items() if node.holds(asked(request)))
            if would_do >= request["nodes"]:  # they are down
                return
            raise PipelineError(f"{job.name}: {_too_large(request, have, would_do)}") from None
        raise PipelineError(f"{job.name}: SLURM refuses it: {words}; {_remedy(words, request, limits)}") from None


def _remedy(words: str, request: dict[str, Any], limits: dict[str, float]) -> str:
    """Which key of the site's settings a refusal is about, and what would do."""
    lower = words.lower()
    if "invalid partition" in lower:
        # The environment wins over what submitit writes into a job's script.
        named = os.environ.get("SBATCH_PARTITION") or str(request.get("partition"))
        where = "SBATCH_PARTITION" if "SBATCH_PARTITION" in os.environ else f"{SITE}: partition"
        wrong = next((one for one in named.split(",") if one not in limits), "")
        return f"{where}: {suggestion(wrong, [name for name in limits if name], 'partitions')}"
    for key, column in {"account": "account", "qos": "qos"}.items():
        if key in lower:
            known = _associations(column)
            end = suggestion(request.get(key), known, f"{key}s of yours") if known else f"see {SITE}"
            return f"{SITE}: {key}: {request.get(key, 'none is named')}; {end}"
    if "feature" in lower:
        return f'{SITE}: constraint: {request.get("constraint")}; sinfo -o "%P %f" lists the features'
    return f"see {SITE}"


class Node(NamedTuple):
    """What nodes of a kind have, down or not; or what a job asks of a node."""

    cores: int
    memory_mb: int
    gpus: int
    gpu_type: str = ""

    def holds(self, wanted: Node) -> bool:
        """Whether the numbers and the kind of GPU do."""
        fits = all(mine >= other for mine, other in zip(self[:3], wanted[:3], strict=True))
        return fits and (not wanted.gpus or wanted.gpu_type in ("", self.gpu_type))

    def __str__(self) -> str:
        gpus = f"{self.gpus} {self.gpu_type} GPU".replace("  ", " ")
        return f"{self.cores} cores, {self.memory_mb / 1024:.0f} GB and {gpus}{'' if self.gpus == 1 else 's'}"


def asked(request: dict[str, Any]) -> Node:
    """What a request asks of a node."""
    kind, _, gpus = str(request.get("gpus_per_node", 0)).rpartition(":")
    cores = request["cpus_per_task"] * request.get("ntasks_per_node", 1)
    return Node(cores, int(request["mem"].removesuffix("MB")), int(gpus), kind)


def nodes(partition: str | None) -> dict[Node, int]:
    """The kinds of nodes of a partition, or of all, and how many there are; those with two kinds of GPU are counted with either."""
    # -a: of hidden partitions too; sinfo takes it for a contradiction of -p.
    command = ["sinfo", "-h", "-e", "-o", "%D|%c|%m|%G", *(["-p", partition] if partition else ["-a"])]
    found: dict[Node, int] = {}
    for line in ask(command).splitlines():
        count, cores, memory, gres = line.split("|")
        # gpu:8, gpu:h100:8(S:0-1), or a list of such
        for kind, gpus in re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)", gres) or [("", "0")]:
            node = Node(int(cores.rstrip("+")), int(memory.rstrip("+")), int(gpus), kind)
            found[node] = found.get(node, 0) + int(count)
    return dict(sorted(found.items()))


def _too_large(request: dict[str, Any], have: dict[Node, int], would_do: int) -> str:
    wanted = "a node" if request["nodes"] == 1 else f"{request['nodes']} nodes"
    where = f"partition {request['partition']}" if "partition" in request else "the cluster"
    features = f" and the features {request['constraint']}" if "constraint" in request else ""
    kinds = "; ".join(map(str, have)) or "none"
    other = "lower its `processes`" if would_do else "say in the section `hardware` what a node of yours has"
    return (
        f"asks for {wanted} of {asked(request)}{features}, and {where} has {would_do or 'none'} (its nodes: {kinds}): "
        f"name another partition in {SITE}, or {other} in params.yaml"
    )


def _associations(column: str) -> list[str]:
    """The accounts or qualities of service of this user, where the cluster has accounting."""
    try:
        lines = ask(["sacctmgr", "-n", "-P", "show", "assoc", f"user={user()}", f"format={column}"]).splitlines()
    except PipelineError:
        return []
    return sorted({one for line in lines for one in line.split(",") if one})


def ask(command: list[str], script: str = "") -> str:
    """What one of SLURM's programs prints, given a script; `PipelineError` with its words when it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
            cwd=paths.root(),
            env=unfiltered(),
            input=script,
        )
    except FileNotFoundError:
        raise PipelineError(f"{command[0]} is not on the PATH; run this on a login node") from None
    except subprocess.TimeoutExpired:
        raise NoAnswerError(f"{command[0]} does not answer; try again when the scheduler is back") from None
    if done.returncode == 0:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Try ")] or [
        f"{command[0]} ended with {done.returncode}"
    ]
    if passes(done.stderr):
        raise NoAnswerError(f"{command[0]}: {_words(lines[-1])}; try again when the scheduler is back")
    raise PipelineError(_words(lines[-1]))


def _words(line: str) -> str:
    """A message of SLURM's without the program and the kind of message in front of it."""
    for start in (
        "sbatch: ",
        "sinfo: ",
        "sacctmgr: ",
        "error: ",
        "fatal: ",
        "allocation failure: ",
        "Batch job submission failed: ",
    ):
        line = line.removeprefix(start)
    return " ".join(line.split())[:300]


def _key(request: dict[str, Any]) -> str:
    same = {key: value for key, value in request.items() if key != "time"}
    outside = {name: value for name, value in os.environ.items() if name.startswith("SBATCH_") or name == "SLURM_CONF"}
    return sha256_text(json.dumps([same, outside, user()], sort_keys=True))


def _known(request: dict[str, Any]) -> bool:
    """Whether this request, or a longer one, was accepted a short while ago."""
    entry = (read_json(_cache()) or {}).get(_key(request))
    return entry is not None and time.time() - entry["time"] < KNOWN_S and request["time"] <= entry["minutes"]


def _remember(request: dict[str, Any]) -> None:
    now = time.time()
    with Lock(_cache().with_suffix(".lock")).held():
        kept = {k: v for k, v in (read_json(_cache()) or {}).items() if now - v["time"] < KNOWN_S}
        write_json(_cache(), {**kept, _key(request): {"time": now, "minutes": request["time"]}})


def _cache() -> Path:
    return paths.root() / "runs" / ".preflight.json"
