# SPDX-License-Identifier: Apache-2.0
"""Figure 3: what its stage writes, the same bytes every time, and what its section refuses."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline import registry
from pipeline.context import Context
from pipeline.errors import ParamsError
from pipeline.figures import Figure3
from pipeline.files import read_json
from pipeline.params import Params, read_yaml, validate
from pipeline.stages import figure3
from pipeline.toy import Toy, ddim, measure, total_iterations

ROOT = Path(__file__).resolve().parents[2]
TINY = {"points": 16, "paths": 8, "intervals": [8, 32], "half_intervals": [32], "width": 8, "batch": 8}


class Silent:
    """A tracker that keeps the names of its files alone."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def log_model(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keeps the name."""
        self.files.append(path.name)

    def set_tag(self, key: str, value: str) -> None:
        """Does nothing."""


def changed(**values: Any) -> Params:
    """Scale smoke with other numbers in its figure3, and few iterations."""
    data = read_yaml(ROOT / "params.yaml")
    section = data["scales"]["smoke"]["figure3"]
    section.update({**TINY, **values})
    for run in ("scratch", "tune"):
        section[run] = {**section[run], "iterations": 3}
    return validate(data).with_scale("smoke")


def run_stage(folder: Path) -> Path:
    """The stage's output folder."""
    params = changed()
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    job = registry.find(params, "figure3", {})
    file = folder / "progress.json"
    tracker = Silent()
    figure3.run(Context(job, params, {}, folder / "out", folder / "work", tracker, "run", {}, file, False))
    assert {path.name for path in (folder / "out").iterdir()} == set(tracker.files)
    assert set(tracker.files) == {path.name for path in job.outputs}
    return folder / "out"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage(tmp_path_factory.mktemp("first"))


@pytest.fixture
def section() -> Figure3:
    plan = changed().active.figure3
    assert plan is not None
    return plan


def test_every_student_has_its_numbers(out: Path, section: Figure3) -> None:
    rows = list(csv.DictReader((out / "figure3.csv").read_text().splitlines()))
    assert list(rows[0]) == ["quantity", "method", "precision", "intervals", "value"]
    found = {(row["quantity"], row["method"], row["precision"], row["intervals"]) for row in rows}
    trained = [("sct", "fp32", ""), *(("scd", p, "") for p in ("fp32", "bf16", "fp16"))]
    trained += [("dscd", "fp32", n) for n in ("8", "32")] + [("dscd", p, "32") for p in ("bf16", "fp16")]
    expected = {("rms_error", *row) for row in [*trained, ("ddim", "fp64", "8"), ("ddim", "fp64", "32")]}
    for precision in ("fp32", "bf16", "fp16"):
        expected |= {("tangent_error", "dscd", precision, n) for n in ("8", "32")}
        expected.add(("tangent_error", "scd", precision, ""))
    assert found == expected
    assert len(rows) == len(expected)
    assert all(0 < float(row["value"]) < 10 for row in rows)
    toy = Toy(section, seed=0)
    for n in (8, 32):
        value = next(row["value"] for row in rows if row["method"] == "ddim" and row["intervals"] == str(n))
        assert float(value) == pytest.approx(toy.error(ddim(toy, n)), rel=1e-4)


def test_the_same_bytes_every_time(out: Path, tmp_path: Path) -> None:
    again = run_stage(tmp_path)
    for name in ("figure3.csv", "figure3.png"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name


def test_it_is_a_picture(out: Path) -> None:
    with Image.open(out / "figure3.png") as picture:
        picture.load()
        assert min(picture.size) >= 500
        low, high = picture.convert("L").getextrema()
        assert high - low > 100


def test_progress_ends_where_it_should(out: Path, section: Figure3) -> None:
    assert read_json(out.parent / "progress.json")["done"] == total_iterations(section) == 3 * (2 + 1 + 3 + 2 + 2)


def test_a_student_that_continues_starts_from_the_weights_of_the_other(section: Figure3) -> None:
    toy = Toy(section, seed=0)
    first = toy.student("scd", section.scratch)
    assert all((a == b).all() for a, b in zip(toy.network("bf16", first).parameters(), first.parameters(), strict=True))
    assert any((a != b).any() for a, b in zip(toy.network().parameters(), first.parameters(), strict=True))
    result = measure(toy)
    assert set(result.samples) >= {"exact", "sct-fp32-", "scd-fp32-", "dscd-fp32-8", "dscd-bf16-32"}
    assert all(x.shape == (16, 2) for x in result.samples.values())


def test_paths_lead_along_the_ode(section: Figure3) -> None:
    """From the noise to the exact ends, and a path continued from any of its points is the same path."""
    toy = Toy(section, seed=0)
    path = toy.paths(math.sin(toy.t_max) * toy.z)
    assert path.shape == (17, 16, 2)
    torch.testing.assert_close(path[-1], toy.exact, rtol=0, atol=1e-7)
    t = torch.full((16,), toy.t_max / 2, dtype=torch.float64)
    torch.testing.assert_close(toy.mixture.pf_ode_map(path[8], t), toy.exact, rtol=0, atol=1e-7)


def test_a_scale_without_the_section_has_no_such_job() -> None:
    data = read_yaml(ROOT / "params.yaml")
    del data["scales"]["smoke"]["figure3"]
    assert "figure3" not in {job.name for job in registry.jobs(validate(data), "smoke")}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"paths": 17}, "figure3.paths: must be at most points (16), got 17"),
        ({"intervals": [32, 8]}, "figure3.intervals: must ascend without repetition, got [32, 8]"),
        ({"half_intervals": [1]}, "figure3.half_intervals"),
        ({"width": 7}, "figure3.width: must be even and at least 4, got 7"),
        ({"std": 0.0}, "figure3.std"),
        ({"means": [[0.0, 1.0, 2.0]]}, "figure3.means"),
    ],
)
def test_a_wrong_number_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError) as caught:
        changed(**values)
    assert f"scales.smoke.{words}" in str(caught.value)
