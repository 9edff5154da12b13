# SPDX-License-Identifier: Apache-2.0
"""A slot of pixel data, without VAE and latents, through every stage that it has."""

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.modelling import MODEL
from pipeline.reading import read_yaml
from scm_core.nn.build import load_model
from tests.pipeline.plain import ROOT, plain

pytestmark = pytest.mark.slow

STEPS = {"teacher": {"4"}, "scd_m4": {"4"}, "scd_vsd": {"1", "2"}}  # of the evaluated models


def pixel_slot(params: dict[str, Any]) -> None:
    """Give scale smoke the labelled digits of scikit-learn, 8×8 pixels, with the numbers of its latent slot."""
    slots = params["scales"]["smoke"]["slots"]
    slot = {key: value for key, value in slots["latent_guided"].items() if key not in ("vae", "figure2")}
    slot["dataset"] = {"source": "digits", "resolution": 8, "channels": 1, "labels": 10}
    # two more students: one that is sampled in segments, one that starts as another
    scd, whole = slot["students"]["scd"], read_yaml(ROOT / "params.yaml")["scales"]["smoke"]["slots"]["latent_guided"]
    more = {"scd_m4": {**scd, "method": "multistep", "segments": 4}, "scd_vsd": whole["students"]["scd_vsd"]}
    slot["students"] = {**slot["students"], **more}
    slot["sizes"] = {"S": {**slot["sizes"]["S"], "students": {name: {} for name in slot["students"]}}}
    slots["pixel_cond"] = slot


def test_networks_on_pixels_run_from_images_to_their_evaluation(
    repo_copy: Path, user_env: Callable[[Path], dict[str, str]]
) -> None:
    params = plain()
    pixel_slot(params)
    (repo_copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    folder = Path("runs/smoke/pixel_cond")
    targets = [str(folder / "evaluate" / "S" / method) for method in STEPS]
    command = ["snakemake", "--profile", "cluster/local", *targets, "--config", "scale=smoke"]
    done = subprocess.run(
        command, cwd=repo_copy, env=user_env(repo_copy), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (repo_copy / folder).iterdir() if not path.name.startswith(".")}
    assert made == {"dataset", "features", "reference", "teacher", "student", "evaluate"}
    for target in targets:
        rows = list(csv.DictReader((repo_copy / target / "sweep.csv").read_text().splitlines()))
        assert {row["steps"] for row in rows} == STEPS[Path(target).name]
        assert {row["phase"] for row in rows} == {"select", "report"}
        assert all(float(row["fid"]) > 0 and 0 <= float(row["precision"]) <= 1 for row in rows)
    # a student that another one starts as, and that trains a second network beside it
    model = load_model(repo_copy / folder / "student" / "S" / "scd_vsd" / MODEL)
    first = load_model(repo_copy / folder / "student" / "S" / "scd" / MODEL)
    assert model.info["start"] == first.info["run"]
    assert model.info["teacher"] == first.info["teacher"]
