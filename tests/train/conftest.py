# SPDX-License-Identifier: Apache-2.0
"""Several processes for tests: forks of this one, which cost no import of torch."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Processes:
    """`start(function, count)` runs function(rank) in forks that `scm_core.train.distributed.connected` can connect."""

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
