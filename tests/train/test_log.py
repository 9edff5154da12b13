# SPDX-License-Identifier: Apache-2.0
"""A log of JSON lines: what it holds after interruptions, torn lines and full disks."""

import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scm_core.train.log import JsonlLog


def strict(text: str) -> Any:
    """JSON as the standard has it, without Python's NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines without their times."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [{key: value for key, value in strict(line).items() if key != "time"} for line in text.splitlines()]


def scalars(iteration: int) -> dict[str, float]:
    return {"loss": 1 / (iteration + 1), "phi/loss": -math.pi * iteration}


def logged(path: Path, first: int, last: int, messages: list[str] | None = None) -> JsonlLog:
    """A run from iteration `first` to `last` that logs every 5."""
    log = JsonlLog(path, (messages if messages is not None else []).append, now=count(1000.0 + first).__next__)
    log.start(first)
    for iteration in range(first + 1, last + 1):
        if iteration % 5 == 0:
            log.write(iteration, 64 * iteration, scalars(iteration))
    return log


def expected(last: int) -> list[dict[str, Any]]:
    return [{"iteration": i, "nimg": 64 * i, **scalars(i)} for i in range(5, last + 1, 5)]


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "not/yet/there/log.jsonl"
    logged(path, 0, 23)
    assert rows(path) == expected(20)
    assert [strict(line)["time"] for line in path.read_text().splitlines()] == [1000, 1001, 1002, 1003]


def test_a_line_can_be_read_once_it_is_written(tmp_path: Path) -> None:
    log = logged(tmp_path / "log", 0, 5)
    for i in range(10, 30, 5):
        log.write(i, 64 * i, scalars(i))
        assert rows(tmp_path / "log") == expected(i)


def test_numbers_come_back(tmp_path: Path) -> None:
    """To the last bit; what is not finite as a string that float() takes."""
    log = logged(tmp_path / "log", 0, 0)
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": math.nan, "d": math.inf, "e": -math.inf, "f": 3}
    log.write(7, 8, values)
    log.write(8, 9, dict.fromkeys(values, 1.5))
    first, second = rows(tmp_path / "log")
    assert (first["c"], first["d"], first["e"]) == ("NaN", "Infinity", "-Infinity")
    for key, value in values.items():
        assert float(first[key]) == value or (key == "c" and math.isnan(float(first[key])))
    table = pd.read_json(tmp_path / "log", lines=True)
    assert list(table["iteration"]) == [7, 8]
    assert math.isnan(float(table["c"][0]))
    assert [float(value) for value in table["d"]] == [math.inf, 1.5]
    assert second["e"] == 1.5


@pytest.mark.parametrize("resumed", [0, 3, 5, 17, 20, 29, 30])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, resumed: int) -> None:
    """Whatever the interrupted attempt logged beyond the checkpoint is logged again by the next, and stands there once."""
    messages: list[str] = []
    logged(tmp_path / "log", 0, 30, messages)
    logged(tmp_path / "log", resumed, 47, messages)
    assert rows(tmp_path / "log") == expected(45)
    assert messages == []


def test_a_torn_last_line(tmp_path: Path) -> None:
    """Cut after any of its bytes: as if it had not been begun, or as if it had been ended, if only its newline is missing."""
    path = tmp_path / "log"
    logged(path, 0, 20)
    content = path.read_bytes()
    begin = content.rindex(b"\n", 0, -1) + 1
    for end in range(begin, len(content) + 1):
        path.write_bytes(content[:end])
        messages: list[str] = []
        JsonlLog(path, messages.append).start(22)
        assert path.read_bytes() == (content if end >= len(content) - 1 else content[:begin])
        assert messages == []


def test_a_torn_last_line_of_the_present_run_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logged(path, 0, 20)
    path.write_bytes(path.read_bytes()[:-10])
    logged(path, 10, 20)
    assert rows(path) == expected(20)


@pytest.mark.parametrize(
    "damage", [b'{"iteration": 12, "lo\n', b"\xff\xfe\n", b"[1]\n", b"\n", b'{"iteration": "3"}\n']
)
def test_a_damaged_line_between_others_is_dropped_loudly(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "log"
    logged(path, 0, 20)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage, *lines[2:]]))
    messages: list[str] = []
    logged(path, 20, 30, messages)
    assert rows(path) == expected(30)
    assert len(messages) == 1
    assert f"{path}: line 3 is not a line of this log and is dropped" in messages[0]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the kernel takes a part of a write and refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    """It is said once; the lines are there when there is room again, without the torn one that the disk took a part of."""
    path, messages = tmp_path / "log", []
    log = logged(path, 0, 10, messages)
    size = path.stat().st_size
    with full_disk(size + 20):
        for i in (15, 20):
            log.write(i, 64 * i, scalars(i))
    assert path.stat().st_size == size + 20
    assert messages == [f"{path}: log lines are kept in memory until they can be written: File too large"]
    log.write(25, 64 * 25, scalars(25))
    assert rows(path) == expected(25)
    with full_disk(path.stat().st_size):
        log.write(30, 64 * 30, scalars(30))
    assert len(messages) == 1
    log.write(35, 64 * 35, scalars(35))
    assert rows(path) == expected(35)


def test_a_run_that_is_resumed_on_a_full_disk(tmp_path: Path) -> None:
    """Cutting off needs no room; what has to be written again waits."""
    path, messages = tmp_path / "log", []
    logged(path, 0, 30)
    content = path.read_bytes()
    path.write_bytes(b"damage\n" + content)
    with full_disk(10):
        log = logged(path, 20, 25, messages)
    assert [text.partition(": ")[2][:10] for text in messages] == ["line 1 is ", "log lines "]
    log.write(30, 64 * 30, scalars(30))
    assert rows(path) == expected(30)


def test_a_log_that_was_moved_away_begins_anew(tmp_path: Path) -> None:
    """With the lines that waited, and without a hole for those that are gone."""
    path = tmp_path / "log"
    log = logged(path, 0, 10)
    with full_disk(path.stat().st_size):
        log.write(15, 64 * 15, scalars(15))
    path.rename(tmp_path / "elsewhere")
    log.write(20, 64 * 20, scalars(20))
    assert rows(path) == expected(20)[2:]


def test_what_cannot_be_a_log_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        JsonlLog(tmp_path).start(0)
    with pytest.raises(ValueError, match=r"log: expected start\(iteration\) before the first line"):
        JsonlLog(tmp_path / "log").write(1, 1, {})
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("name", ["iteration", "nimg", "time"])
def test_a_scalar_must_not_hide_a_column(tmp_path: Path, name: str) -> None:
    log = logged(tmp_path / "log", 0, 5)
    with pytest.raises(ValueError, match=f"scalars: expected other names than iteration, nimg, time, got '{name}'"):
        log.write(10, 640, {name: 1.0})
    assert rows(tmp_path / "log") == expected(5)


def test_warnings_go_to_the_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonlLog(tmp_path / "log")
    log.start(0)
    with full_disk(3):
        log.write(5, 320, scalars(5))
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/log: log lines are kept in memory")
