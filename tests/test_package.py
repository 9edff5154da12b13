# SPDX-License-Identifier: Apache-2.0
"""The example of the library does what it says; versions, pins and credits agree."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import scm_core
from tests.documents import blocks

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "docs/library.md"


def test_the_example_runs_and_does_what_its_comments_say() -> None:
    (code,) = [block.text for block in blocks(LIBRARY) if block.language == "python"]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    spread, tangent = (float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", done.stdout))
    assert spread == pytest.approx(0.2, abs=0.01)
    assert tangent < 1e-5


def test_versions_agree() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == scm_core.__version__


def test_every_direct_dependency_is_pinned_locked_and_credited() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = set(re.findall(r"^(\S+==\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    credits = (ROOT / "THIRD_PARTY.md").read_text()
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name, _, version = requirement.partition("==")
        assert version, f"{requirement}: give an exact version"
        assert f"{name.lower().replace('_', '-')}=={version}" in locked, f"{requirement}: run `make lock`"
        assert name in credits, f"{name}: name it in THIRD_PARTY.md"


def test_the_lock_serves_every_build_of_torch() -> None:
    """Nothing that only the CUDA build brings, but for triton, which our tests use: in the version that build asks for."""
    names = re.findall(r"^([^=\s#]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert [name for name, version in names if name.startswith(("nvidia", "cuda")) or "+" in version] == []
