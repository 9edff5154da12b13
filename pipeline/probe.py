# SPDX-License-Identifier: Apache-2.0
"""What `python -m pipeline doctor --cluster` runs on a node, as the jobs of the pipeline run: through submitit, by pickling.

It says what it finds in files of the shared folder, and waits there for what the other side does. Everything that needs an import is
imported when it is needed: a broken environment is to be found, not to keep this from starting.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

MARK = "SCM_DOCTOR"  # a variable that should travel with the job
HELLO, FACTS, THERE, SIGNALS = "hello.json", "facts.json", "there", "signals"  # written by the job
HERE, LOCK = "here", "lock"
NODE = "node-"  # and a number: by each of the job's other tasks, which are on other nodes
LIMIT_S = 120.0
HANDLED = (signal.SIGUSR2, signal.SIGTERM)


@dataclass(frozen=True)
class Probe:
    """The job: `folder` is its place in the shared folder, `tracking` the address of a tracking server to look for."""

    folder: str
    packages: tuple[str, ...]
    tracking: str | None

    def __call__(self) -> None:
        """Says hello, holds a lock, collects facts, answers, and waits for signals until it is cancelled."""
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        if rank:
            self._reach_first(rank)
            return
        door = socket.create_server(("", 0))
        for signum in HANDLED:
            signal.signal(signum, self._note)
        hello = {"time": time.time(), "node": os.environ.get("SLURMD_NODENAME", ""), "mark": os.environ.get(MARK)}
        self._write(HELLO, {**hello, "port": door.getsockname()[1]})
        from pipeline.files import Lock

        with Lock(Path(self.folder, LOCK)).held():
            self._write(FACTS, self._facts())
            deadline = time.monotonic() + LIMIT_S
            while time.monotonic() < deadline:
                if Path(self.folder, HERE).exists() and not Path(self.folder, THERE).exists():
                    self._write(THERE, {"said": Path(self.folder, HERE).read_text()})
                time.sleep(0.05)

    def _reach_first(self, rank: int) -> None:
        """What a task on another node does: it connects to the first one's, as in a training, and waits until it is cancelled."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # for the first one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit's handler would go on
        from pipeline.errors import PipelineError
        from pipeline.files import read_json
        from pipeline.rendezvous import address

        deadline = time.monotonic() + LIMIT_S
        while (hello := read_json(Path(self.folder, HELLO))) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        trouble = None if hello else f"{HELLO} of the first node is not seen here"
        try:
            if hello:
                socket.create_connection((address(hello["node"]), hello["port"]), timeout=10).close()
        except (OSError, PipelineError) as error:
            trouble = str(error)
        self._write(f"{NODE}{rank}.json", {"node": os.environ.get("SLURMD_NODENAME", ""), "trouble": trouble})
        time.sleep(LIMIT_S)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        with Path(self.folder, SIGNALS).open("a") as file:
            file.write(f"{signal.Signals(signum).name}\n")
        if signum == signal.SIGTERM:
            os._exit(0)

    def _write(self, name: str, value: Any) -> None:
        draft = Path(self.folder, f".{name}")
        draft.write_text(json.dumps(value))
        draft.replace(Path(self.folder, name))

    def _facts(self) -> dict[str, Any]:
        return {
            "python": sys.version.split()[0],
            "executable": sys.executable,
            "versions": versions(self.packages),
            "torch": _torch(),
            "gpus": _said("nvidia-smi", "-L"),
            "scontrol": _said("scontrol", "show", "job", os.environ.get("SLURM_JOB_ID", "")),
            "tracking": None if self.tracking is None else reach(self.tracking),
        }


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """The installed versions; None for what is not installed."""
    import importlib.metadata

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def reach(address: str) -> str | None:
    """What goes wrong when a tracking server is asked for an experiment; None when it answers."""
    import urllib.error
    import urllib.request

    # Not for its health: that it tells everybody, those too whom it refuses to answer.
    asked = f"{address.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        with urllib.request.urlopen(asked, timeout=10):
            return None
    except urllib.error.HTTPError as error:
        if error.code == 403:
            return "403 Forbidden: it does not know the name that it is called by (--allowed-hosts)"
        return None if error.code == 401 else f"{error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def _torch() -> dict[str, Any]:
    start = time.monotonic()
    try:
        import torch

        return {"seconds": time.monotonic() - start, "devices": torch.cuda.device_count()}
    except Exception as error:  # a broken binary raises anything, and to say what is this one's work
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _said(*command: str) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"{command[0]}: {error.strerror if isinstance(error, OSError) else 'does not answer'}"}
    words = " ".join(done.stderr.split())[:200]
    return {"said": done.stdout} if done.returncode == 0 else {"error": f"{command[0]}: {words}"}
