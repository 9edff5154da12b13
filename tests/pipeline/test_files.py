# SPDX-License-Identifier: Apache-2.0
"""Locks between processes, and who the user is."""

import getpass
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.files import Lock, is_locked, user

PROBER = """
import sys
from pathlib import Path
from pipeline.files import is_locked
print("probing", flush=True)
while True:
    is_locked(Path(sys.argv[1]))
"""
HOLDER = """
import sys
from pathlib import Path
from pipeline.files import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire(shared=sys.argv[2] == "shared")
print("held", flush=True)
sys.stdin.read()
"""
ROOT = Path(__file__).resolve().parents[2]


def start(code: str, *words: str) -> "subprocess.Popen[str]":
    """A process that runs `code`, once it has said its first word."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_probing_a_lock_does_not_take_it(tmp_path: Path) -> None:
    """Whoever wants the lock gets it at the first try, however often others ask whether it is held."""
    path = tmp_path / "job.run.lock"
    path.touch()
    probers = [start(PROBER, str(path)) for _ in range(2)]
    try:
        refused = 0
        for _ in range(3000):
            lock = Lock(path)
            refused += not lock.acquire(wait=False)
            lock.release()
    finally:
        for process in probers:
            process.kill()
            process.communicate()
    assert refused == 0


@pytest.mark.parametrize("kind", ["shared", "exclusive"])
def test_a_lock_of_another_process_is_seen_until_it_ends(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "job.run.lock"
    assert not is_locked(path)
    holder = start(HOLDER, str(path), kind)
    assert is_locked(path)
    assert not Lock(path).acquire(wait=False)
    holder.communicate("")
    assert not is_locked(path)


def test_asking_about_ones_own_lock_keeps_it(tmp_path: Path) -> None:
    """Closing any descriptor of the file would drop it."""
    path = tmp_path / "job.run.lock"
    lock = Lock(path)
    lock.acquire()
    assert is_locked(path)
    code = "import sys; from pathlib import Path; from pipeline.files import is_locked; print(is_locked(Path(sys.argv[1])))"
    seen = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert seen == "True\n"
    lock.release()
    assert not is_locked(path)


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(KeyError):
        getpass.getuser()
    assert user() == str(os.getuid())
