# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements in a file: replaced, added, kept; and lists and ranges of a command line."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.asked import numbers, whole_numbers, words
from pipeline.errors import PipelineError
from pipeline.results import merge, read, shown, without_repetition


def row(key: str, fid: float, first: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "subject": "student-1", "space": "classifier", "steps": 1, "guidance": 1.5, "ema": None, "nimg": None, "nfe": 1,
        "samples": 200, "first_index": first, "fid": fid, "fid_se": 0.1, "key": key, "reference_sha256": "ab", **more,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_a_point_that_was_measured_before_is_replaced_and_another_one_added(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    merge([row("a", 1.0), row("b", 2.0)], file, tmp_path / "locks")
    merge([row("b", 3.0), row("c", 4.0)], file, tmp_path / "locks")
    merge([row("c", 4.0, subject="student-2")], file, tmp_path / "locks")
    table = read(file)
    assert list(zip(table.subject, table.key, table.fid, strict=True)) == [
        ("student-1", "a", 1.0), ("student-1", "b", 3.0), ("student-1", "c", 4.0), ("student-2", "c", 4.0),
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {name, "locks"}


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
@pytest.mark.parametrize("text", ["007", "1234567890123456", "123456789012e345", "NA", "null", 'a,"b'])
def test_names_that_look_like_numbers_stay_names(tmp_path: Path, name: str, text: str) -> None:
    """A folder or a key that pandas would read as a number or as nothing is found again, and not doubled."""
    file = tmp_path / name
    for fid in (1.0, 2.0):
        merge([row(text, fid, subject=text, reference_sha256=text)], file, tmp_path / "locks")
    table = read(file)
    assert list(zip(table.subject, table.key, table.reference_sha256, table.fid, strict=True)) == [
        (text, text, text, 2.0)
    ]


def test_a_measurement_that_is_there_twice_is_one() -> None:
    rows = [row("a", 1.0), row("b", 2.0), row("a", 1.0)]
    assert without_repetition(rows) == rows[:2]


def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    pd.DataFrame({"a": [1]}).to_csv(file, index=False)
    before = file.read_bytes()
    with pytest.raises(PipelineError, match=r"rows.csv: has no column subject, so it holds something else"):
        merge([row("a", 1.0)], file, tmp_path / "locks")
    assert file.read_bytes() == before
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(PipelineError, match=r"rows.parquet: cannot be read as measured rows"):
        merge([row("a", 1.0)], broken, tmp_path / "locks")
    assert broken.read_bytes() == b"no parquet"


def test_what_is_the_same_in_all_rows_stands_above_them_and_sets_have_their_spread_below() -> None:
    text = shown([row("a", 1.0, 0), row("b", 2.0, 200), row("c", 4.5, 400)], ["fid", "fid_se"])
    head, names, *lines = text.splitlines()
    assert "subject student-1" in head
    assert "guidance 1.5" in head
    assert names.split() == ["first_index", "fid", "fid_se"]
    assert lines[0].split() == ["0", "1.0000", "0.1000"]
    # mean 2.5; deviations -1.5, -0.5, 2 give a variance of 6.5/2
    assert "2.5" in lines[-1]
    assert "2.5 ± 1.8" in lines[-1]
    assert "minimum" in lines[-1]


def test_lists_and_ranges() -> None:
    assert numbers("1.0:2.0:0.1", "--guidance") == [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
    assert numbers("1:1.25:0.1", "--guidance") == [1.0, 1.1, 1.2]
    assert numbers("1.5, 1,1.5", "--guidance") == [1.0, 1.5]
    assert whole_numbers("1,2", "--steps") == [1, 2]
    assert words("fid, prdc", "--metrics") == ["fid", "prdc"]


@pytest.mark.parametrize(
    "text", ["", ",", "a", "1:2", "2:1:0.1", "1:2:0", "1:2:-1", "1:2:0.1:4", "nan", "inf", "1:inf:1", "0:1e9:1e-9"]
)
def test_a_list_that_is_none_is_named(text: str) -> None:
    with pytest.raises(PipelineError, match=r"^--guidance: expected "):
        numbers(text, "--guidance")


def test_steps_are_whole() -> None:
    with pytest.raises(PipelineError, match=r"--steps: expected whole numbers such as 1,2, got 1.5"):
        whole_numbers("1.5", "--steps")
