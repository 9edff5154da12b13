# SPDX-License-Identifier: Apache-2.0
"""What the progress of a job looks like: the line of a log, the bar of a terminal, the file for those who watch."""

import json
import re
import sys
from pathlib import Path

import pytest

from pipeline.progress import Progress, describe, shown

SCALARS = {"loss": -1.23456, "tangent_norm": 0.51789, "images_per_second": 3071.7, "memory_gb": 1.2345}
TEXT = "loss -1.235, tangent 0.518, 3072 img/s, 1.2 GB"


def test_scalars_are_shown_in_few_words() -> None:
    assert ", ".join(shown(SCALARS)) == TEXT
    assert shown({"tangent_norm": 12345.6, "images_per_second": 1.2345}) == ["tangent 1.23e+04", "1.23 img/s"]
    assert shown({"tangent_norm": 1e-7, "memory_gb": 0.04, "fid": 2.0}) == ["fid 2", "tangent 1e-07", "0.0 GB"]
    assert shown({"loss": float("nan"), "memory_gb": 139.9}) == ["loss nan", "139.9 GB"]
    assert shown({}) == []
    assert ", ".join(shown(dict(sorted(SCALARS.items())))) == TEXT


def test_a_line_tells_rate_time_left_loss_tangent_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line that is not long, with a long name of a job and large numbers."""
    now = [100.0]
    job = "student-latent_guided-XXL-scd-vsd"
    with Progress(400_000, "it", tmp_path / "progress.json", label=job, now=lambda: now[0]) as progress:
        progress.start(300_000)
        now[0] += 100
        progress.update(301_000, **SCALARS)
    line = capsys.readouterr().out.splitlines()[0]
    assert line == f"{job}: 301000/400000 it, 10 it/s, ETA 2:45:00, {TEXT}"
    assert len(line) < 125
    state = json.loads((tmp_path / "progress.json").read_text())
    assert state["scalars"] == SCALARS  # as they are: words are for the eye
    assert describe("job", state) == f"job: 301000/400000 it, 10 it/s, ETA 2:45:00, {TEXT}"


def test_scalars_keep_their_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the order in which they come later, and if they do not."""
    now = [100.0]
    with Progress(10, "it", tmp_path / "progress.json", now=lambda: now[0]) as progress:
        for scalars in ({"loss": 1.0, "memory_gb": 2.0}, {"memory_gb": 3.0, "loss": 0.5}, {"loss": 0.25}):
            now[0] += 20
            progress.update(int(now[0] - 100) // 20, **scalars)
    shown_lines = [re.sub(r".*ETA [^,]*, ", "", line) for line in capsys.readouterr().out.splitlines()]
    assert shown_lines[:3] == ["loss 1, 2.0 GB", "loss 0.5, 3.0 GB", "loss 0.25, 3.0 GB"]


def test_a_bar_shows_the_same_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("SCM_PROGRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    with Progress(10, "it", tmp_path / "progress.json", label="job") as progress:
        progress.update(3, **SCALARS)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "3/10" in last
    assert TEXT in last
