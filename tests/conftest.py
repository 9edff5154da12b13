# SPDX-License-Identifier: Apache-2.0
"""What all tests share: one thread, fixed seeds, clean copies of the repository to run the pipeline in, several processes."""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for _variable, _value in (("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1"), ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")):
    os.environ.setdefault(_variable, _value)  # read when torch is imported

import torch  # noqa: E402

# The background jobs of a shell ignore Ctrl-C, and so would every program that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


class Processes:
    """`start(function, count)` runs function(rank) in forks of this process, which cost no import of torch, and which
    `scm_core.train.distributed.connected` can connect."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Any] = []

    def start(self, function: Callable[[int], Any], count: int) -> list[Any]:
        """The processes, one for each rank."""
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")

        def body(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with (self.folder / f"rank-{rank}.err").open("w") as errors:
                os.dup2(errors.fileno(), 2)
                sys.stderr = errors
                try:
                    (self.folder / f"rank-{rank}.pkl").write_bytes(pickle.dumps(function(rank)))
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            os._exit(0)

        processes = [context.Process(target=body, args=(rank,)) for rank in range(count)]
        for process in processes:
            process.start()
        self.started += processes
        return processes

    def errors(self, rank: int) -> str:
        """What a process has said on stderr."""
        return (self.folder / f"rank-{rank}.err").read_text()

    def __call__(self, function: Callable[[int], Any], count: int, timeout: float = 120) -> list[Any]:
        """The results of all ranks; AssertionError with a process's words if it failed."""
        for file in self.folder.glob("rank-*"):
            file.unlink()
        for rank, process in enumerate(self.start(function, count)):
            process.join(timeout)
            assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}: {self.errors(rank)}"
        return [pickle.loads((self.folder / f"rank-{rank}.pkl").read_bytes()) for rank in range(count)]  # noqa: S301

    def close(self) -> None:
        """End what a test left running."""
        for process in self.started:
            if process.is_alive():
                process.kill()
            process.join(10)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """See `Processes`."""
    folder = tmp_path / "processes"
    folder.mkdir()
    made = Processes(folder)
    yield made
    made.close()


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, or of the size that the test's module has in DISK, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount, size = shutil.which("mount"), getattr(request.module, "DISK", "1m")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if mount is None or os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
