# SPDX-License-Identifier: Apache-2.0
"""The import rules and size limits of ARCHITECTURE.md, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"snakemake", "dvc", "mlflow", "submitit"}
HEAVY = {
    "torch",
    "torchvision",
    "torch_fidelity",
    "timm",
    "diffusers",
    "mlflow",
    "pandas",
    "matplotlib",
    "scipy",
    "sklearn",
    "mlxtend",
}

CORE = sorted((ROOT / "scm_core").rglob("*.py"))
STAGES = sorted((ROOT / "pipeline/stages").glob("[!_]*.py"))
LIGHT = [ROOT / "pipeline" / f"{name}.py" for name in ("params", "registry", "launch", "status", "__main__")]
MODULES = sorted([*CORE, *(ROOT / "pipeline").rglob("*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, module_level_only: bool = False) -> set[str]:
    """The full names of the modules that a file imports; those under `if TYPE_CHECKING` do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: line {node.lineno}: imports are absolute in this project"
            found.update({node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(), name_of(path)))
    return found


def packages(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_there_is_something_to_check() -> None:
    assert len(CORE) >= 10
    assert len(STAGES) >= 10
    assert all(path.is_file() for path in LIGHT), [name_of(path) for path in LIGHT if not path.is_file()]


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_library_knows_neither_engines_nor_pipeline(path: Path) -> None:
    assert packages(imports(path)) & (ENGINES | {"pipeline"}) == set()


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_stages_know_no_engine(path: Path) -> None:
    assert packages(imports(path)) & ENGINES == set()


@pytest.mark.parametrize("path", LIGHT, ids=name_of)
def test_light_modules_import_nothing_heavy_at_module_level(path: Path) -> None:
    assert packages(imports(path, module_level_only=True)) & (HEAVY | ENGINES) == set()


def test_what_a_waiting_process_loads_is_light() -> None:
    """The rule above follows a module's own imports only; this one counts what they bring along."""
    modules = ", ".join(f"pipeline.{path.stem}" for path in LIGHT if path.stem != "__main__")
    code = (
        f"import sys, pipeline.__main__, {modules}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & (HEAVY | ENGINES | {"numpy", "PIL"}) == set()


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_stages_are_short(path: Path) -> None:
    assert lines(path) <= 80, "a stage reads, calls scm_core and writes: move the rest to scm_core or pipeline"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_of_a_size_to_read(path: Path) -> None:
    assert lines(path) <= 320


def test_the_paper_can_be_read_in_five_hundred_lines() -> None:
    """The four files that a newcomer reads first."""
    files = ("trigflow.py", "tangent.py", "objectives/consistency.py", "train/step.py")
    assert sum(lines(ROOT / "scm_core" / name) for name in files) < 500
