# SPDX-License-Identifier: Apache-2.0
"""From images to an evaluation in one process, at a resolution below the source's own."""

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import torch

from pipeline import registry
from pipeline.context import Context
from pipeline.job import Job
from pipeline.params import Params, read_yaml, validate
from pipeline.stages import dataset, evaluate, features, reference
from scm_core.nn.build import build_network, save_model

ROOT = Path(__file__).resolve().parents[2]
SLOT = {"slot": "pixel_cond"}


class Tracker:
    """Keeps nothing."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def set_tag(self, key: str, value: str) -> None:
        pass


@pytest.fixture(scope="module")
def params() -> Params:
    """MNIST at 16×16 in pixels, with as little training and sampling as there can be."""
    data = read_yaml(ROOT / "params.yaml")
    data["scale"] = "smoke"
    slots = data["scales"]["smoke"]["slots"]
    slot = {key: value for key, value in slots["latent_guided"].items() if key not in ("vae", "figure2")}
    slot["dataset"] = {"source": "mnist5k", "resolution": 16, "channels": 1, "labels": 10}
    slot["features"]["training"]["iterations"] = 2
    slot["evaluation"] |= {"samples": 20, "select_samples": 10, "batch": 10, "teacher": {"solver": "ddim", "steps": 2}}
    slots["pixel_cond"] = slot
    return validate(data)


def context(job: Job, params: Params, root: Path, code: str) -> Context:
    """What the executor would give the stage."""
    out, work = root / job.outputs[0], root / "work" / job.name
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    inputs = {name: root / path for name, path in job.inputs.items()}
    file = work / "progress.json"
    return Context(job, params, inputs, out, work, Tracker(), f"{job.name}-0", {}, file, False, code)


@pytest.fixture(scope="module")
def made(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, features, reference and a teacher that was never trained."""
    root = tmp_path_factory.mktemp("evaluation")
    for stage in (dataset, features, reference):
        job = registry.find(params, stage.__name__.rpartition(".")[2], SLOT)
        stage.run(context(job, params, root, "a"))
    slot = params.active.slots["pixel_cond"]
    config = {**slot.sizes["S"].network.config(slot.sigma_data), "channels": 1, "resolution": 16, "labels": 10}
    torch.manual_seed(0)
    net = build_network({**config, "guidance_input": False})
    folder = root / registry.find(params, "teacher", {**SLOT, "size": "S"}).outputs[0]
    folder.mkdir(parents=True)
    save_model(
        folder / "model.safetensors", net.state_dict(), {**config, "guidance_input": False}, {"run": "teacher-0"}
    )
    return root


def test_a_resolution_below_the_sources_own_is_measured(params: Params, made: Path) -> None:
    """The reference is of the data set that was scaled down, and is recognised as such."""
    job = registry.find(params, "evaluate", {**SLOT, "size": "S", "method": "teacher"})
    evaluate.run(context(job, params, made, "a"))
    facts = json.loads((made / job.outputs[0] / "evaluation.json").read_text())
    assert facts["dataset"] == "mnist5k-16"
    rows = pd.read_csv(made / job.outputs[0] / "sweep.csv")
    assert list(rows.phase) == ["select", "select", *["report"] * (len(rows) - 2)]
    assert (rows.fid > 0).all()


def test_points_that_other_code_measured_are_left_aside(
    params: Params, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again by other code, found again by the same code."""
    job = registry.find(params, "evaluate", {**SLOT, "size": "S", "method": "teacher"})
    evaluate.run(context(job, params, made, "a"))

    def refuse(*args: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("pipeline.evaluation.samples", refuse)
    evaluate.run(context(job, params, made, "a"))
    progress = json.loads((made / "work" / job.name / "progress.json").read_text())
    assert (progress["done"] > 0, progress["rate"]) == (True, None)  # what was found is no measure of speed
    with pytest.raises(AssertionError, match="sampled"):
        evaluate.run(context(job, params, made, "b"))
