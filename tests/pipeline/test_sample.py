# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline sample`: which model is meant, and options that would change nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import manifest, paths
from pipeline import sample as module
from pipeline.errors import PipelineError
from pipeline.params import load, read_yaml, validate
from pipeline.sample import find_trained, main

ROOT = Path(__file__).resolve().parents[2]
JOBS = ("teacher-latent_guided-S", "student-latent_guided-S-scd")


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A repository with a teacher and a student of run …-0123abcd; what is drawn from them is collected, not drawn."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setenv("SCM_ROOT", str(tmp_path))
    for name in JOBS:
        folder = tmp_path / find_trained(name, load(tmp_path / "params.yaml")).outputs[0]
        folder.mkdir(parents=True)
        made = {"format": manifest.FORMAT, "files": {}, "run": f"{name}-0123abcd"}
        (folder / paths.MANIFEST).write_text(json.dumps(made))
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "draw", lambda job, *rest: calls.append((job.name, *rest)))
    return calls


@pytest.mark.parametrize("name", JOBS)
def test_a_model_goes_by_its_job_its_run_and_its_folder(name: str, drawn: list[tuple[Any, ...]]) -> None:
    folder = find_trained(name, load(paths.root() / "params.yaml")).outputs[0]
    for run in (name, f"{name}-0123abcd", str(folder), str(paths.root() / folder)):
        assert main([run]) == 0
    assert [call[0] for call in drawn] == [name] * 4


@pytest.mark.parametrize("name", JOBS)
def test_another_run_of_the_job_is_refused(name: str, drawn: list[tuple[Any, ...]]) -> None:
    with pytest.raises(PipelineError, match=f"{name}-99999999: .* not here any more; .* holds {name}-0123abcd"):
        main([f"{name}-99999999"])
    assert not drawn


@pytest.mark.parametrize("name", [f"{JOBS[0]}-scd", f"{JOBS[1]}-2", f"{JOBS[1]}-0123abc", f"{JOBS[1]}-0123ABCD"])
def test_what_follows_a_name_is_no_run_unless_it_looks_like_one(name: str, drawn: list[tuple[Any, ...]]) -> None:
    with pytest.raises(PipelineError, match=f"{name}: no teacher or student of scale demo"):
        main([name])
    assert not drawn


def test_steps_of_a_teacher_are_refused() -> None:
    """Its solver and steps stand in params.yaml."""
    params = load(ROOT / "params.yaml")
    with pytest.raises(PipelineError, match=r"--steps: a teacher samples in evaluation\.teacher\.steps"):
        module.draw(find_trained(JOBS[0], params), params, Path(), Path(), None, steps=1, rows=1, seed=0)


def test_steps_that_a_student_does_not_sample_in_are_refused() -> None:
    """One in segments has as many steps as segments."""
    data = read_yaml(ROOT / "params.yaml")
    student = data["scales"]["demo"]["slots"]["latent_guided"]["students"]["scd"]
    student |= {"method": "multistep", "segments": 4}
    params = validate(data)
    with pytest.raises(PipelineError, match=f"--steps: {JOBS[1]} samples in 4 steps; leave it out"):
        module.draw(find_trained(JOBS[1], params), params, Path(), Path(), None, steps=2, rows=1, seed=0)
