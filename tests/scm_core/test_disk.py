# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all; canonical JSON."""

import ast
import os
import sys
import threading
from pathlib import Path

import pytest

from scm_core import disk
from scm_core.disk import canonical, replace_file


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"one", b"two"):
        replace_file(file, content, durable=True)
        assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                replace_file(file, b"new", durable=True)
        assert (file.read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])


def test_many_writers_of_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    """Threads of one process, too: each has a temporary file of its own."""
    file = tmp_path / "file"
    contents = [bytes([i]) * 10_000 for i in range(8)]
    seen: list[bytes] = []

    def write(content: bytes) -> None:
        for _ in range(20):
            replace_file(file, content, durable=False)
            seen.append(file.read_bytes())

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160
    assert set(seen) <= set(contents)
    assert os.listdir(tmp_path) == ["file"]


def test_canonical_json_is_the_same_for_the_same_value_and_knows_no_nan() -> None:
    assert (
        canonical({"b": [1.0, None], "a": "é"}) == canonical({"a": "é", "b": [1.0, None]}) == '{"a":"é","b":[1.0,null]}'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("nan")})


def test_any_process_may_import_it() -> None:
    tree = ast.parse(Path(disk.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
