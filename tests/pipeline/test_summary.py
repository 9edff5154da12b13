# SPDX-License-Identifier: Apache-2.0
"""What stands for a model: rows by checkpoint, metrics of the finished model, curves of equal names."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import manifest, registry
from pipeline.params import load
from pipeline.provenance import training_of
from pipeline.sight import MACHINE, write_curve
from pipeline.summary import COLUMNS, curves, metrics, summary
from scm_core.train.log import JsonlLog

ROOT = Path(__file__).resolve().parents[2]
DISTANCES = {"classifier": "fid", "dinov2": "fd_dinov2"}


def row(steps: int, fid: float, **other: Any) -> dict[str, Any]:
    """A row of a sweep: reported, at the selected guidance, of the published average, unless said otherwise."""
    own = {"phase": "report", "steps": steps, "guidance": 1.2, "ema": None, "nimg": None, "nfe": steps, "samples": 50}
    own |= {"space": "classifier", "best": True, "fid": fid, "fid_se": 0.3, "precision": 0.5, "precision_se": 0.01}
    return {**own, "recall": None, "recall_se": None, **other}


def test_sets_are_averaged_and_everything_else_left_out() -> None:
    """Two sets with an error of 0.3 each: the mean's is 0.3 / √2."""
    rows = [row(1, 4.0), row(1, 5.0), row(1, 9.0, best=False), row(1, 9.0, phase="select"), row(1, 9.0, ema=0.1)]
    (found,) = summary(rows, 640)
    assert tuple(found) == COLUMNS
    assert (found["nimg"], found["sets"], found["fid"], found["recall"]) == (640, 2, 4.5, None)
    assert found["fid_se"] == pytest.approx(0.3 / 2**0.5)


def test_checkpoints_come_before_the_end_and_the_end_is_what_metrics_say() -> None:
    rows = [row(2, 3.0), row(1, 4.0), row(1, 8.0, ema=0.05, nimg=128), row(1, 6.0, ema=0.05, nimg=256)]
    found = summary(rows, 640)
    assert [(one["steps"], one["nimg"], one["fid"]) for one in found] == [
        (1, 128, 8),
        (1, 256, 6),
        (1, 640, 4),
        (2, 640, 3),
    ]
    named = metrics(found, DISTANCES)
    assert {steps: values["fid"] for steps, values in named.items()} == {"1-step": 4.0, "2-step": 3.0}
    assert named["1-step"]["guidance"] == 1.2
    assert "recall" not in named["1-step"]


def test_curves_have_the_same_names_for_every_model() -> None:
    """Over images seen; and without the steps those of the most steps, which a teacher and a student have in common."""
    student = curves(summary([row(1, 4.0), row(2, 3.0), row(1, 8.0, ema=0.05, nimg=128)], 640), DISTANCES)
    teacher = curves(summary([row(18, 2.0, guidance=None)], 320), DISTANCES)
    assert {nimg: values["eval/1-step/fid"] for nimg, values in student.items()} == {128: 8.0, 640: 4.0}
    assert (student[128]["eval/fid"], student[640]["eval/fid"], teacher[320]["eval/fid"]) == (8.0, 3.0, 2.0)
    assert set(teacher[320]) - set(student[640]) == {key for key in teacher[320] if key.startswith("eval/18-step/")}
    assert "eval/guidance" not in teacher[320]


def test_another_space_has_names_of_its_own() -> None:
    rows = [row(1, 4.0), row(1, 70.0, space="dinov2", precision=0.25, guidance=2.0)]
    (values,) = metrics(summary(rows, 640), DISTANCES).values()
    assert (values["fid"], values["fd_dinov2"]) == (4.0, 70.0)
    assert (values["precision"], values["fd_dinov2_precision"]) == (0.5, 0.25)
    assert (values["guidance"], values["fd_dinov2_guidance"], values["nfe"]) == (1.2, 2.0, 1)


def test_training_curves_hold_no_times(tmp_path: Path) -> None:
    """Two trainings that differ in speed alone, one of them resumed, have the same file."""
    for name, start, speed in (("a", 1.0, 10.0), ("b", 500.0, 3.0)):
        log = JsonlLog(tmp_path / f"{name}.jsonl", now=lambda start=start: start)
        log.start(0)
        log.write(20, 1280, {"loss": 0.1 + 0.2, "images_per_second": speed, "memory_gb": speed})
        if name == "b":
            log.write(40, 2560, {"loss": 7.0, "images_per_second": speed})
            log = JsonlLog(tmp_path / "b.jsonl")
            log.start(20)  # from the checkpoint at 20
        log.write(40, 2560, {"loss": float("nan"), "tangent_norm": 1.5, "images_per_second": speed, "utilisation": 0.5})
        write_curve(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"iteration": "20", "nimg": "1280", "loss": repr(0.1 + 0.2), "tangent_norm": ""},
        {"iteration": "40", "nimg": "2560", "loss": "NaN", "tangent_norm": "1.5"},
    ]
    logged = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[1])
    assert set(logged) & set(MACHINE), "nothing was left out, so this shows nothing"


def test_objective_and_seed_of_every_training() -> None:
    """Of all students of all scales the objective that params.yaml names."""
    for scale in ("smoke", "paper"):
        params = load(ROOT / "params.yaml", scale)
        for job in registry.jobs(params):
            tags = training_of(job.stage, manifest.resolved_params(job, params))
            if job.stage == "student":
                section = params.active.slots[job.axes["slot"]].sizes[job.axes["size"]].students[job.axes["method"]]
                assert tags == {"scm.objective": section.method, "scm.seed": str(params.active.seed)}
            elif job.stage == "teacher":
                assert tags["scm.objective"] == "diffusion"
