# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline doctor`: checks the installation and says what is missing and what to do about it."""

import importlib
import importlib.metadata
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline import paths
from pipeline.cli import Parser
from pipeline.errors import PipelineError

PYTHON = (3, 11)
NEEDED_GB = 2.0  # what the demo writes, with room for checkpoints
IMPORT_NAMES = {
    "pillow": "PIL",
    "PyYAML": "yaml",
    "ruamel-yaml-clib": "_ruamel_yaml",
    "scikit-learn": "sklearn",
    "torch-fidelity": "torch_fidelity",
}
HEAVY = ("timm", "torch_fidelity", "torchvision")  # imported only after the remedy of scm_core.compat


@dataclass(frozen=True)
class Check:
    """One line of the report: a failed check with a remedy is an error, unless it is optional."""

    what: str
    ok: bool
    detail: str = ""
    remedy: str = ""
    optional: bool = False


def main(argv: Sequence[str]) -> int:
    """Prints one line for each check; exit status 1 when something that is needed is missing."""
    parser = Parser(prog="python -m pipeline doctor", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="compare versions and sizes only: try no package, read no large file"
    )
    parser.add_argument("--scale", help="of params.yaml, whose weights files are looked for (default: the active one)")
    parser.add_argument(
        "--cluster", action="store_true", help="try this SLURM site with a tiny job of each kind (a minute)"
    )
    parser.add_argument(
        "--wait", type=float, default=60.0, metavar="S", help="seconds that such a job may queue (default 60)"
    )
    options = parser.parse_args(list(argv))
    found = checks(options.quick, options.scale)
    if options.cluster:
        from pipeline import clusterdoctor

        found = clusterdoctor.checks(options.scale, options.wait)
    failed = 0
    for check in found:
        word = "ok" if check.ok else "optional" if check.optional else "missing"
        failed += not check.ok and not check.optional
        print(f"{word:8}  {check.what}{f': {check.detail}' if check.detail else ''}", flush=True)
        if not check.ok:
            print(f"{'':10}→ {check.remedy}", flush=True)
    print(f"\n{failed} missing" if failed else "\neverything that is needed is there")
    return 1 if failed else 0


def checks(quick: bool, scale: str | None) -> Iterator[Check]:
    """All checks, the quick ones first."""
    yield python()
    yield from requirements(quick)
    yield from tools()
    yield from folders()
    yield from guarded("parameters", lambda: [parameters()])
    yield from guarded("inputs", lambda: inputs(quick, scale))
    yield from guarded("tracking store", lambda: [tracking()])


def guarded(what: str, some: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Checks whose own error message is the remedy."""
    try:
        yield from some()
    except PipelineError as error:
        yield Check(what, False, remedy=str(error))


def python() -> Check:
    """The Python version that everything is pinned to."""
    here = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] == PYTHON
    return Check("Python", ok, here, f"use Python {PYTHON[0]}.{PYTHON[1]}: make setup PYTHON=/path/to/python3.11")


def pins() -> dict[str, str]:
    """The packages that pyproject.toml pins: name -> version."""
    import tomllib

    project = tomllib.loads((paths.root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(re.split("==", re.split("[ ;#]", line)[0], maxsplit=1) for line in project["dependencies"])


def requirements(quick: bool) -> Iterator[Check]:
    """Each pinned package: there, of that version (a local suffix such as +cpu is fine), and importable."""
    try:
        wanted = pins()
    except (FileNotFoundError, KeyError, ValueError) as error:
        yield Check("pyproject.toml", False, str(error), "restore it: git checkout pyproject.toml")
        return
    for name, version in wanted.items():
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", f"make setup (or: pip install {name}=={version})")
            continue
        if here.partition("+")[0] != version:
            yield Check(name, False, f"{here}, pinned is {version}", f"make setup (or: pip install {name}=={version})")
            continue
        problem = None if quick else _import(IMPORT_NAMES.get(name, name))
        yield Check(name, problem is None, f"{here}{f'; {problem}' if problem else ''}", "make setup; see the message")


def _import(module: str) -> str | None:
    """What goes wrong when a module is imported; None when nothing does."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        if module in HEAVY:
            importlib.import_module("scm_core.compat").prepare_torchvision()
        importlib.import_module(module)
    except Exception as error:
        # A broken binary can raise anything on import; the doctor's work is to name it.
        return f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def tools() -> Iterator[Check]:
    """Programs beside Python."""
    git = shutil.which("git")
    yield Check("git", git is not None, git or "", "install git: without it no commit can be recorded")
    if git:
        yield _commit(git)
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    yield Check(
        "C compiler",
        compiler is not None,
        compiler or "",
        "only for torch.compile (Debian: build-essential)",
        optional=True,
    )
    shell = shutil.which("sh")
    yield Check("launcher local", shell is not None, "submitit", "it needs a POSIX shell (sh) on the PATH")
    slurm = [name for name in ("sbatch", "srun", "squeue", "scancel") if shutil.which(name) is None]
    yield Check(
        "launcher slurm",
        not slurm,
        f"{', '.join(slurm)} not found" if slurm else "sbatch, srun, squeue, scancel",
        "only on a cluster: run this on a login node",
        optional=True,
    )
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("processors", True, f"{threads}")
    yield _gpu()


def _commit(git: str) -> Check:
    """The commit can be read: git refuses it in a folder that belongs to somebody else."""
    root = paths.root()
    done = subprocess.run([git, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("git commit", True, done.stdout.strip()[:10])
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return Check("git commit", False, "not a git checkout", "runs will name no commit; clone it", optional=True)
    words = " ".join(done.stderr.split()).removeprefix("fatal: ")
    remedy = f"git config --global --add safe.directory {root}" if "dubious" in words else "see the message of git"
    return Check("git commit", False, f"git rev-parse HEAD: {words[:200]}", f"{remedy}; until then runs name no commit")


def _gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("GPU", False, "none", "the demo needs none", optional=True)
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    names = [line.partition(" (")[0] for line in done.stdout.splitlines()]
    return Check("GPU", done.returncode == 0, "; ".join(names), "nvidia-smi fails: check the driver", optional=True)


def folders() -> Iterator[Check]:
    """Room and permission where the pipeline writes."""
    root = paths.root()
    for name in ("runs", "reports", "mlartifacts"):
        folder = root / name
        existing = folder if folder.exists() else root
        try:
            with tempfile.TemporaryFile(dir=existing):
                ok, detail = True, ""
        except OSError as error:
            ok, detail = False, error.strerror or ""
        yield Check(
            f"{name}/ is writable", ok, detail, f"give this user write permission on {paths.relative(existing)}"
        )
    runs = root / "runs"
    free = shutil.disk_usage(runs if runs.exists() else root).free / 1e9
    remedy = (
        f"free some, the demo writes up to {NEEDED_GB:.0f} GB: remove runs/<scale> of a scale you are done with, "
        "runs/<scale>/.work/*.stale-* (checkpoints that were set aside), what DVC keeps besides (dvc gc --workspace), "
        "or link runs/ to another disk"
    )
    yield Check("disk space", free >= NEEDED_GB, f"{free:.1f} GB free", remedy)


def parameters() -> Check:
    """params.yaml is valid."""
    from pipeline.params import PARAMS_FILE, load

    params = load(paths.root() / PARAMS_FILE)
    return Check("parameters", True, f"{PARAMS_FILE}, scales {', '.join(params.scales)}, active {params.scale}")


def inputs(quick: bool, scale: str | None) -> Iterator[Check]:
    """The files of others that a scale starts from."""
    from pipeline import doctorfiles

    yield from doctorfiles.checks(quick, scale)


def tracking() -> Check:
    """The tracking store can be opened (a database file) or is named (a server, which is not asked here)."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named and not named.startswith("sqlite:///"):
        return Check("tracking store", True, f"{named} (MLFLOW_TRACKING_URI; records wait while it is away)")
    file = Path(named.removeprefix("sqlite:///")) if named else paths.root() / "mlflow.db"
    if not file.exists():
        return Check("tracking store", True, f"{file.name}, made by the first job")
    remedy = f"{file.name} cannot be read; move it away, the next job makes a new one"
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as database:
            (count,) = database.execute("SELECT COUNT(*) FROM runs").fetchone()
    except sqlite3.Error as error:
        return Check("tracking store", False, str(error), remedy)
    return Check(
        "tracking store",
        True,
        f"{file.name}, {count} runs; see them: mlflow ui --backend-store-uri sqlite:///{file.name}",
    )
