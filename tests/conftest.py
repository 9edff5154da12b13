# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, fixed seeds, and clean copies of the repository to run the pipeline in."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

for _variable, _value in (("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")):
    os.environ.setdefault(_variable, _value)  # read when torch is imported

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole pipeline first: with several workers the longest file must not be the last one to start."""
    items.sort(key=lambda item: "workflow" not in item.path.parts)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """One thread, a fixed global seed and deterministic algorithms for every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def user_env(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, str]]:
    """The environment of a user who has just activated .venv in a copy of the repository, with a home of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / ".gitconfig").write_text(
        "[user]\nname = Test\nemail = test@example.invalid\n[init]\ndefaultBranch = main\n"
    )

    def environment(repository: Path) -> dict[str, str]:
        return {
            "HOME": str(home),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
            "PYTHONPATH": str(repository),  # the copy's code, wherever the package is installed from
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "GIT_CONFIG_NOSYSTEM": "1",
            "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        }

    return environment


@pytest.fixture(scope="session")
def copy_repository(user_env: Callable[[Path], dict[str, str]]) -> Callable[[Path], Path]:
    """A function that copies the tracked files, as they now are, into a new git repository at the given folder."""

    def copy(destination: Path) -> Path:
        if not (ROOT / ".git").exists():
            pytest.skip("needs a git checkout")
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, listing.split("\0")):
            if (ROOT / name).is_file():
                (destination / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, destination / name)
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
            subprocess.run(["git", *command], cwd=destination, env=user_env(destination), check=True)
        return destination

    return copy


@pytest.fixture
def repo_copy(tmp_path: Path, copy_repository: Callable[[Path], Path]) -> Path:
    """A clean copy of the repository, as after `git clone`."""
    return copy_repository(tmp_path / "repository")
