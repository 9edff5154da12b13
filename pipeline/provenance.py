# SPDX-License-Identifier: Apache-2.0
"""What a run's record says of its origin: the commit, this copy of the repository, the parameters by comparable names."""

import ast
import functools
import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import manifest, paths
from pipeline.files import canonical, host, sha256_file, sha256_text

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job


def git_state() -> dict[str, Any]:
    """The commit that is checked out and whether tracked files differ from it; None for both outside of git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=paths.root(), capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def sources_digest() -> str:
    """SHA-256 over the Python sources of scm_core and pipeline, the ones that run: names and contents."""
    home = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for package in ("scm_core", "pipeline") for file in (home / package).rglob("*.py")):
        digest.update(f"{file.relative_to(home).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


@functools.cache
def meaning_of(*patterns: str) -> str:
    """SHA-256 over what the Python sources of these patterns say, below the folder of `pipeline`: comments and docstrings do not count."""
    home = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in home.glob(pattern)}):
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
                del node.body[0]
        digest.update(f"{file.relative_to(home).as_posix()}\0{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def code_state() -> dict[str, Any]:
    """What the present code is: commit, dirty flag (`git_state`) and digest of the sources (`code`)."""
    return {**git_state(), "code": sources_digest()}


PACKAGES = ("torch", "numpy", "scipy", "torch-fidelity", "diffusers")  # that results depend on


def environment() -> dict[str, str]:
    """Versions and hardware of this process, in words for readers; '' for what is not there. No names of machines or people."""
    torch = sys.modules.get("torch")
    devices = torch.cuda.device_count() if torch and torch.cuda.is_available() else 0
    named = [torch.cuda.get_device_name(i) for i in range(devices)] if torch else []
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "gpus": ", ".join(f"{named.count(name)} × {name}" for name in dict.fromkeys(named)),
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES if _version(name)),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def place() -> str:
    """A short name for this copy of the repository on this machine: whose runs may be called dead."""
    return sha256_text(f"{host()}:{paths.root()}")[:16]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as dotted keys and strings."""
    result: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            result |= flat(value, name)
        else:
            result[name] = value if isinstance(value, str) else canonical(value)
    return result


def shown_params(job: "Job", params: "Params") -> dict[str, str]:
    """A job's parameters under names that line up when two runs are compared: `student.lr` of any method and size."""
    return comparable(manifest.resolved_params(job, params))


def trained_as(job: "Job", params: "Params", inputs: Mapping[str, manifest.Input]) -> dict[str, str]:
    """Objective and seed of a training as tags; those of an evaluation are its model's."""
    if job.stage == "evaluate" and inputs:
        made = manifest.read(next(iter(inputs.values())).path / paths.MANIFEST)
        return {} if made is None else training_of(made["stage"], made["params"])
    return training_of(job.stage, manifest.resolved_params(job, params))


def training_of(stage: str, resolved: Mapping[str, Any]) -> dict[str, str]:
    """`scm.objective`, what a network of this stage is trained to do, and `scm.seed`, of resolved parameters; without what is not known."""
    shown = comparable(resolved)
    fixed = {"teacher": "diffusion", "vae": "autoencoder", "features": "classifier"}
    found = {"scm.objective": shown.get("student.method") or fixed.get(stage), "scm.seed": shown.get("seed")}
    return {key: value for key, value in found.items() if value is not None}


def comparable(resolved: Mapping[str, Any]) -> dict[str, str]:
    """Resolved parameters as dotted keys and strings, without slot, size and name of a student."""
    result = {}
    for key, value in flat(resolved).items():
        parts = key.split(".")
        if parts[0] == "slots":
            parts = parts[2:]
        if parts[0] == "sizes":
            parts = parts[2:]
        if parts[0] == "students":
            parts = ["student", *parts[2:]]
        result[".".join(parts)] = value
    return result
