# SPDX-License-Identifier: Apache-2.0
"""The documents say what is so: the README's code runs, the commands it names exist, and links lead somewhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import scm_core

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(language: str) -> list[str]:
    """The code blocks of the README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The command lines of the README, without comments."""
    lines = (line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines())
    inline = re.findall(r"`((?:make|snakemake|dvc|mlflow|python -m pipeline) [^`]+)`", README)
    return [line for line in [*lines, *inline] if line]


@pytest.mark.parametrize("code", blocks("python"))
def test_the_example_runs_and_does_what_its_comments_say(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    spread, tangent = (float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", done.stdout))
    assert spread == pytest.approx(0.2, abs=0.01)
    assert tangent < 1e-5


def test_the_example_is_there() -> None:
    assert len(blocks("python")) == 1


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


def test_named_subcommands_exist() -> None:
    named = {line.split()[3] for line in commands() if line.startswith("python -m pipeline ")}
    assert len(named) >= 5
    help_text = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert named <= set(re.findall(r"\w+", help_text))


def test_named_files_of_snakemake_commands_exist_or_are_outputs() -> None:
    for line in commands():
        if "--profile" in line:
            profile = line.split("--profile ")[1].split()[0]
            assert (ROOT / profile / "config.yaml").is_file(), line


def test_named_scales_exist() -> None:
    scales = yaml.safe_load((ROOT / "params.yaml").read_text())["scales"]
    named = set(re.findall(r"(?:scale|SCALE)=(\w+)", README))
    assert named
    assert named <= scales.keys()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []


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
