# SPDX-License-Identifier: Apache-2.0
"""Resolve pyproject.toml (with the extra `dev`) into requirements.lock: `make lock`, or `make lock UPGRADE=1`.

Without UPGRADE the versions already locked are kept where they still fit. pip itself resolves, for the Python and
platform this runs on (Python 3.11, Linux x86-64). Two things are taken out of the answer, so that one lock serves
every build of torch:

- the local part of a version (`2.13.0+cpu` becomes `2.13.0`, which the CPU and the CUDA build both satisfy);
- what only the CUDA build of torch asks for (nvidia-*, cuda-*): it comes through torch's own metadata.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
CUDA_ONLY = re.compile(r"(nvidia|cuda)-.*")
HEADER = """\
# Every package of the environment, for Python 3.11 on Linux. Made from pyproject.toml by `make lock`: do not edit.
# Without hashes: torch comes as a CPU or as a CUDA build of the same version, and each has its own.
"""


def resolve(requirements: list[str], constraints: Path | None) -> list[dict]:
    """What pip would install into an empty environment: the metadata of each package."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-qq",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        keep = ["--constraint", str(constraints)] if constraints else []
        subprocess.run([*pip, *keep, *requirements], check=True)
        return [item["metadata"] for item in json.loads(report.read_text())["install"]]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    keep = LOCK if LOCK.exists() and not os.environ.get("UPGRADE") else None
    packages = {canonicalize_name(m["name"]): m for m in resolve(direct, keep)}

    wanted_by: dict[str, set[str]] = {name: set() for name in packages}
    for requirement in direct:
        wanted_by[canonicalize_name(Requirement(requirement).name)].add("scm-repro")
    for name, metadata in packages.items():
        for requirement in map(Requirement, metadata.get("requires_dist", [])):
            needed = canonicalize_name(requirement.name)
            if needed in packages and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                wanted_by[needed].add(name)

    lines = []
    for name, metadata in sorted(packages.items()):
        if not CUDA_ONLY.fullmatch(name):
            version = metadata["version"].split("+")[0]
            lines.append(f"{name}=={version}".ljust(48) + "# for " + ", ".join(sorted(wanted_by[name])))
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
