# SPDX-License-Identifier: Apache-2.0
"""What a job is made of: fingerprint, run id, and the manifest that lies in every output.

A manifest is deterministic (no times, no host), so that the same computation gives the same bytes everywhere and a
run id quoted in a table means the same thing on every machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.files import canonical, read_json, sha256_file, sha256_text

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job

FORMAT = 1
# Input files up to this size are hashed before each use; larger ones (latents of a whole data set) only have their
# size compared, as reading them twice would cost more than the stage itself.
HASH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Input:
    """One verified input of a job."""

    path: Path  # absolute
    run: str | None  # run id that made it; None for a file that no run here has made
    digest: str  # SHA-256 of its manifest, or of the file
    job: str | None = None  # name of the job that made it


def digest(manifest: Path) -> str:
    """The digest of an output: SHA-256 of its manifest, which holds the SHA-256 of every file."""
    return sha256_file(manifest)


def resolved_params(job: "Job", params: "Params") -> dict[str, Any]:
    """Every parameter the job depends on: dotted key below the scale -> value."""
    from pipeline.registry import settings

    return settings(job, params)


def fingerprint(job: "Job", params: "Params", inputs: Mapping[str, Input]) -> str:
    """SHA-256 of everything that decides a job's result besides the code: scale, stage, axes, parameters, inputs."""
    return sha256_text(
        canonical(
            {
                "scale": job.scale,
                "stage": job.stage,
                "axes": dict(job.axes),
                "params": resolved_params(job, params),
                "inputs": {name: item.digest for name, item in inputs.items()},
            }
        )
    )


def run_id(job: "Job", mark: str) -> str:
    """`<job name>-<first 8 hex digits of its fingerprint>`."""
    return f"{job.name}-{mark[:8]}"


def build(job: "Job", params: "Params", inputs: Mapping[str, Input], mark: str, folder: Path) -> dict[str, Any]:
    """The manifest of what lies in `folder`."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / paths.MANIFEST
    }
    return {
        "format": FORMAT,
        "run": run_id(job, mark),
        "name": job.name,
        "scale": job.scale,
        "stage": job.stage,
        "axes": dict(job.axes),
        "fingerprint": mark,
        "params": resolved_params(job, params),
        "inputs": {
            name: {"path": paths.relative(item.path), "run": item.run, "digest": item.digest}
            for name, item in inputs.items()
        },
        "files": files,
    }


def path_of(job: "Job") -> Path:
    """Where the manifest of the job's published output lies."""
    output = paths.root() / job.outputs[0]
    return paths.report_manifest(job) if job.is_report else output / paths.MANIFEST


def read(file: Path) -> dict[str, Any] | None:
    """A manifest, or None where there is none that this version understands."""
    value = read_json(file)
    if value is None or value.get("format") != FORMAT or not isinstance(value.get("files"), dict):
        return None
    return value


def read_inputs(job: "Job") -> dict[str, Input]:
    """The job's inputs by their manifests alone: quick, no data file is looked at. Raises when one is missing."""
    found = {}
    reports = _reports(job.scale) if any((paths.root() / where).is_file() for where in job.inputs.values()) else []
    for name, where in job.inputs.items():
        path = paths.root() / where
        if path.is_file():
            found[name] = _report_file(job, where, reports)
            continue
        manifest = read(path / paths.MANIFEST)
        if manifest is None:
            command = remedy(job, path, None)
            if path.exists():
                words = f"has no valid manifest.json; make it again with: {command}, then `make sync`"
            else:
                words = f"is missing; make it with: {command}"
            raise PipelineError(f"{job.name}: input {where} {words}")
        found[name] = Input(path, manifest["run"], digest(path / paths.MANIFEST), manifest["name"])
    return found


def _reports(scale: str) -> list[dict[str, Any]]:
    """The manifests of a scale's reports."""
    files = sorted(paths.records(scale).glob("*.manifest.json"))
    return [made for file in files if (made := read(file)) is not None]


def _report_file(job: "Job", where: Path, reports: Sequence[Mapping[str, Any]]) -> Input:
    """A file in reports/, as the scale of `job` has made it; all scales write there, so it may be another one's."""
    path = paths.root() / where
    digest = sha256_file(path)
    makers = [made for made in reports if where.name in made["files"]]
    for made in makers:
        if made["files"][where.name]["sha256"] == digest:
            return Input(path, made["run"], digest, made["name"])
    if makers:
        raise PipelineError(
            f"{job.name}: input {where} is not what scale {job.scale} made (another scale has drawn it since, or it was edited); "
            f"make it again with: {remedy(job, path, makers[-1])}"
        )
    return Input(path, None, digest)


def verify_inputs(job: "Job") -> dict[str, Input]:
    """The job's inputs, after comparing every file with its manifest; raises a sentence naming the first bad file."""
    found = read_inputs(job)
    for item in found.values():
        if item.path.is_file():
            continue
        manifest = read(item.path / paths.MANIFEST)
        assert manifest is not None
        for name, entry in manifest["files"].items():
            wrong = _fault(item.path / name, entry)
            if wrong:
                file = paths.relative(item.path / name)
                command = remedy(job, item.path, manifest)
                raise PipelineError(f"{file} {wrong}; make it again with: {command}, then `make sync`")
    return found


def fault(job: "Job", made: Mapping[str, Any], hash_bytes: float = HASH_BYTES) -> str | None:
    """What is wrong with the first published file of `job` that is not as its manifest says, or None.

    Files of up to `hash_bytes` bytes are hashed; of larger ones only the size is compared. Of a report, whose manifest
    lies elsewhere, the declared outputs are looked at.
    """
    for name, entry in made["files"].items():
        path = paths.root() / job.outputs[0] / name
        if job.is_report:
            declared = [output for output in job.outputs if output.name == name]
            if not declared:
                continue
            path = paths.root() / declared[0]
        if wrong := _fault(path, entry, hash_bytes):
            return f"{paths.relative(path)} {wrong}"
    return None


def _fault(path: Path, entry: Mapping[str, Any], hash_bytes: float = HASH_BYTES) -> str | None:
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return "is missing, though its manifest lists it"
    if size != entry["bytes"]:
        return f"has {size} bytes where its manifest says {entry['bytes']}"
    if size <= hash_bytes and sha256_file(path) != entry["sha256"]:
        return "has changed since it was made (its SHA-256 is not the manifest's)"
    return None


def remedy(job: "Job", path: Path, manifest: Mapping[str, Any] | None) -> str:
    """The command that makes the output at `path`."""
    if manifest is not None:
        axes = "".join(f" {key}={value}" for key, value in manifest["axes"].items())
        return f"python -m pipeline run {manifest['stage']} scale={manifest['scale']}{axes}"
    producer = _producer(job, path)
    return producer.command if producer is not None else "the stage that writes it (python -m pipeline plan)"


def _producer(job: "Job", path: Path) -> "Job | None":
    from pipeline import params, registry

    for other in registry.jobs(params.load(paths.root() / params.PARAMS_FILE, job.scale)):
        if any(paths.root() / output == path for output in other.outputs):
            return other
    return None
