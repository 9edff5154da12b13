# SPDX-License-Identifier: Apache-2.0
"""From images to an evaluation in one process, at a resolution below the source's own; the commands `evaluate` and `compare`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from pipeline import compare, manifest, paths, registry
from pipeline import evaluate as command
from pipeline.context import Context
from pipeline.errors import PipelineError
from pipeline.job import Job
from pipeline.measured import measured_points
from pipeline.params import Params, validate
from pipeline.ranks import Silent
from pipeline.results import read
from pipeline.stages import dataset, evaluate, evaluations, features, reference
from scm_core.ema import save_snapshot
from scm_core.nn.build import build_network, save_model
from tests.pipeline.plain import plain

ROOT = Path(__file__).resolve().parents[2]
SLOT = {"slot": "pixel_cond"}
TEACHER = {**SLOT, "size": "S", "method": "teacher"}


def smallest() -> dict[str, Any]:
    """params.yaml with MNIST at 16×16 in pixels at scale smoke, with as little training and sampling as there can be."""
    data = plain()
    data["scale"] = "smoke"
    slots = data["scales"]["smoke"]["slots"]
    slot = {key: value for key, value in slots["latent_guided"].items() if key not in ("vae", "figure2")}
    slot["dataset"] = {"source": "mnist5k", "resolution": 16, "channels": 1, "labels": 10}
    slot["features"]["training"]["iterations"] = 2
    slot["evaluation"] |= {"samples": 20, "select_samples": 10, "batch": 10, "teacher": {"solver": "ddim", "steps": 2}}
    data["scales"]["smoke"]["slots"] = {"pixel_cond": slot}
    return data


@pytest.fixture(scope="module")
def params() -> Params:
    return validate(smallest())


def context(job: Job, params: Params, root: Path) -> Context:
    """What the executor would give the stage."""
    out, work = root / job.outputs[0], root / "work" / job.name
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    inputs = {name: root / path for name, path in job.inputs.items()}
    file = work / "progress.json"
    return Context(job, params, inputs, out, work, Silent(), f"{job.name}-0", {}, file, False)


def publish(root: Path, job: Job) -> Path:
    """A job's output folder, with a manifest as of something that is done."""
    folder = root / job.outputs[0]
    folder.mkdir(parents=True, exist_ok=True)
    made = {"format": manifest.FORMAT, "files": {}, "run": f"{job.name}-01234567", "name": job.name}
    (folder / paths.MANIFEST).write_text(json.dumps(made))
    return folder


@pytest.fixture(scope="module")
def repository(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with data, features, reference and a teacher that was never trained, with snapshots of it."""
    root = tmp_path_factory.mktemp("evaluation")
    (root / "params.yaml").write_text(yaml.safe_dump(smallest(), sort_keys=False))
    for stage in (dataset, features, reference):
        job = registry.find(params, stage.__name__.rpartition(".")[2], SLOT)
        stage.run(context(job, params, root))
        publish(root, job)
    slot = params.active.slots["pixel_cond"]
    config = {**slot.sizes["S"].network.config(slot.sigma_data), "channels": 1, "resolution": 16, "labels": 10}
    config["guidance_input"] = False
    torch.manual_seed(0)
    net = build_network(config)
    torch.nn.init.ones_(net.get_parameter("out_gain"))
    folder = publish(root, registry.find(params, "teacher", {**SLOT, "size": "S"}))
    save_model(folder / "model.safetensors", net.state_dict(), config, {"run": "teacher-pixel_cond-S-01234567"})
    (folder / "snapshots").mkdir()
    for nimg in (100, 200):
        for width in (0.05, 0.1):
            weights = {name: value + nimg * 1e-3 for name, value in net.state_dict().items()}
            save_snapshot(folder / "snapshots" / f"{nimg}-{width}.safetensors", nimg, width, weights)
    return root


@pytest.fixture
def made(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, found by what is called."""
    monkeypatch.setenv("SCM_ROOT", str(repository))
    monkeypatch.chdir(repository)
    return repository


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images each call of the sampler makes."""
    from pipeline import subjects

    calls: list[int] = []
    sample = subjects.samples

    def counted(slot: Any, student: Any, net: Any, noise: Any, *rest: Any) -> torch.Tensor:
        calls.append(len(noise[0]))
        return sample(slot, student, net, noise, *rest)

    monkeypatch.setattr(subjects, "samples", counted)
    return calls


def run_stage(params: Params, root: Path) -> pd.DataFrame:
    job = registry.find(params, "evaluate", TEACHER)
    evaluate.run(context(job, params, root))
    return pd.read_csv(root / job.outputs[0] / "sweep.csv")


# ---- the stage -------------------------------------------------------------------------------------------------------------


def test_a_resolution_below_the_sources_own_is_measured(params: Params, made: Path) -> None:
    """The reference is of the data set that was scaled down, and is recognised as such."""
    rows = run_stage(params, made)
    facts = json.loads((made / registry.find(params, "evaluate", TEACHER).outputs[0] / "evaluation.json").read_text())
    assert facts["dataset"] == "mnist5k-16"
    assert facts["reported"]["2-step"]["fid_sets"] == 2
    assert list(rows.phase) == ["select", "select", *["report"] * (len(rows) - 2)]
    assert rows.best.sum() == 2  # of two sets
    assert (rows.fid > 0).all()
    for name in ("precision", "recall", "coverage"):
        assert rows[name].between(0, 1).all()
    assert (rows[["fid_se", "precision_se", "recall_se"]] >= 0).all(axis=None)
    assert rows.key.nunique() == len(rows)


def test_what_was_measured_is_found_and_another_scale_alone_is_sampled(
    params: Params, made: Path, sampled: list[int]
) -> None:
    before = run_stage(params, made)
    sampled.clear()
    job = registry.find(params, "evaluate", TEACHER)
    table = (made / job.outputs[0] / "sweep.csv").read_bytes()
    run_stage(params, made)
    assert (sum(sampled), (made / job.outputs[0] / "sweep.csv").read_bytes()) == (0, table)
    progress = json.loads((made / "work" / job.name / "progress.json").read_text())
    assert (progress["done"] > 0, progress["rate"]) == (True, None)  # what was found is no measure of speed
    data = smallest()
    data["scales"]["smoke"]["slots"]["pixel_cond"]["evaluation"]["guidance"] = [1.0, 1.25, 1.5]
    after = run_stage(validate(data), made)
    more = after[~after.key.isin(before.key)]
    assert set(more.guidance) == {1.25}
    assert sum(sampled) == more.samples.sum()
    same = [column for column in before if column != "best"]
    kept = after[after.key.isin(before.key)][same].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before[before.key.isin(after.key)][same].reset_index(drop=True))


def test_a_killed_evaluation_goes_on_at_the_next_chunk(
    params: Params, made: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short after the first of two chunks of a set that was not measured before, by an exception as of Ctrl-C."""
    from pipeline import subjects

    whole = run_stage(params, made)
    data = smallest()
    data["scales"]["smoke"]["slots"]["pixel_cond"]["evaluation"] |= {"report_seed": 500_000, "report_sets": 1}
    other = validate(data)
    counted = subjects.samples

    def interrupted(*arguments: Any) -> torch.Tensor:
        if len(sampled) == 1:
            raise KeyboardInterrupt
        return counted(*arguments)

    sampled.clear()
    monkeypatch.setattr(subjects, "samples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(other, made)
    assert sampled == [10]
    monkeypatch.setattr(subjects, "samples", counted)
    rows = run_stage(other, made)
    assert sum(sampled) == rows[rows.phase == "report"].samples.sum()  # no chunk twice
    assert not set(rows[rows.phase == "report"].key) & set(whole.key)


def test_other_code_measures_again(
    params: Params, made: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(params, made)
    sampled.clear()
    monkeypatch.setattr("pipeline.subjects.meaning_of", lambda *patterns: "b" * 64)
    rows = run_stage(params, made)
    assert sum(sampled) == rows.samples.sum()


@pytest.mark.slow
def test_processes_share_the_sampling(repository: Path, tmp_path: Path) -> None:
    """Two processes of a job give the numbers of one."""
    tables = []
    for count in (1, 2):
        root = tmp_path / str(count)
        shutil.copytree(repository, root, ignore=shutil.ignore_patterns(".cache", "evaluate"))
        data = smallest()
        data["scales"]["smoke"]["slots"]["pixel_cond"]["evaluation"]["processes"] = count
        (root / "params.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        job = registry.find(validate(data), "evaluate", TEACHER)
        environment = {**os.environ, "SCM_ROOT": str(root), "SCM_TRACKING": "off", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "run", *job.arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append(pd.read_csv(root / job.outputs[0] / "sweep.csv"))
    pd.testing.assert_frame_equal(*tables, rtol=1e-9)


def swept(**more: Any) -> dict[str, Any]:
    """The same parameters with other averages and earlier checkpoints, or whatever else of the evaluation."""
    data = smallest()
    slot = data["scales"]["smoke"]["slots"]["pixel_cond"]
    slot["teacher"] |= {"iterations": 60, "batch": 5, "snapshots": {"sigma_rel": [0.05, 0.1], "every": 20}}
    slot["evaluation"] |= more
    return data


def test_the_stage_sweeps_other_averages_and_earlier_checkpoints(
    params: Params, made: Path, sampled: list[int]
) -> None:
    """A width in full, with a scale of its own; a checkpoint once at the scales of the published average. What was known stays as it is."""
    before = run_stage(params, made)
    sampled.clear()
    after = run_stage(validate(swept(averages=[0.08, 0.1], checkpoints=[20, 40, 60])), made)
    assert list(after[after.ema.isna()].key) == list(before.key)
    assert sum(sampled) == after[after.ema.notna()].samples.sum()
    width = after[(after.ema == 0.08) & after.nimg.isna()]
    published = after[after.ema.isna()]
    assert list(width.phase) == ["select", "select", *["report"] * (len(width) - 2)]
    assert (
        width[width.phase == "report"].first_index.nunique()
        == published[published.phase == "report"].first_index.nunique()
    )
    assert not (after.ema == 0.1)[after.nimg.isna()].any()  # that is the published one
    earlier = after[after.nimg.notna()]
    assert sorted(earlier.nimg.unique()) == [
        100,
        200,
    ]  # images: 20 and 40 iterations of 5; the end is what is published
    assert set(earlier.ema) == {0.1}
    assert set(earlier.phase) == {"report"}
    reported = published[published.phase == "report"]
    for _, group in earlier.groupby("nimg"):
        assert set(group.guidance) == set(reported.guidance)
        assert list(group[group.best].guidance.unique()) == list(reported[reported.best].guidance.unique())
    assert after.key.nunique() == len(after)
    facts = json.loads((made / registry.find(params, "evaluate", TEACHER).outputs[0] / "evaluation.json").read_text())
    assert facts["reported"]["2-step"]["fid"] == pytest.approx(reported[reported.best].fid.mean())
    run_stage(params, made)


def test_the_points_of_a_scale_are_one_file_with_what_they_were_made_of(params: Params, made: Path) -> None:
    run_stage(params, made)
    folder = made / registry.find(params, "evaluate", TEACHER).outputs[0]
    reference = {"run": "reference-pixel_cond-1", "digest": "b" * 64}
    inputs = {"teacher": {"run": "teacher-pixel_cond-S-01234567", "digest": "a" * 64}, "reference": reference}
    (folder / paths.MANIFEST).write_text(
        json.dumps({"format": manifest.FORMAT, "files": {}, "run": "r", "inputs": inputs})
    )
    name = "evaluate-pixel_cond-S-teacher"
    table = measured_points(folder, "smoke", name)
    rows = pd.read_csv(folder / "sweep.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(table[list(rows.columns)], rows)  # digit by digit
    first = table.iloc[0]
    assert (first.scale, first.slot, first["size"], first.method) == ("smoke", "pixel_cond", "S", "teacher")
    assert (first.model, first.model_sha256) == ("teacher-pixel_cond-S-01234567", "a" * 64)
    assert (first.reference, first.reference_sha256, first.dataset) == (
        "reference-pixel_cond-1",
        "b" * 64,
        "mnist5k-16",
    )
    assert not {"commit", "time"} & set(table.columns)
    job = registry.find(params, "evaluations", {})
    assert set(job.inputs) == {
        f"evaluate-pixel_cond-{size}-{method}" for size in "SM" for method in ("teacher", "scd", "sct")
    }
    one = replace(job, inputs={name: job.inputs[name]})
    evaluations.run(context(one, params, made))
    written = pd.read_csv(made / "reports" / "evaluations.csv" / "evaluations.csv", dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(written.fillna(""), table.astype(str), check_dtype=False)


def test_pairs_are_compared_with_a_part_of_the_reference(
    params: Params, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FID has the digits of all images; the rest is another number, known by another name."""
    root = tmp_path / "part"
    shutil.copytree(repository, root, ignore=shutil.ignore_patterns(".cache", "evaluate"))
    monkeypatch.setenv("SCM_ROOT", str(root))
    whole = run_stage(params, root)
    part = validate(swept(manifold_images=500))
    job = registry.find(part, "reference", SLOT)
    assert "scales.smoke.slots.pixel_cond.evaluation.manifold_images" in job.params
    reference.run(context(job, part, root))
    rows = run_stage(part, root)
    assert (rows.fid - whole.fid).abs().max() < 1e-6 * whole.fid.max()
    assert (rows.kid != whole.kid).all()
    facts = json.loads((root / registry.find(part, "evaluate", TEACHER).outputs[0] / "evaluation.json").read_text())
    assert (facts["reference_images"], facts["manifold_images"]) == (5000, 500)


# ---- the commands ----------------------------------------------------------------------------------------------------------


def test_the_command_finds_what_the_stage_measured(
    params: Params, made: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_stage(params, made)
    sampled.clear()
    reported = rows[(rows.phase == "report") & rows.best]
    scale = f"{reported.guidance.iloc[0]}"
    command.main(["teacher-pixel_cond-S", "--guidance", scale, "--sets", "2", "-o", str(made / "points.csv")])
    assert sampled == []
    found = read(made / "points.csv")
    assert list(found.key) == list(reported.key)
    assert list(found.fid) == list(reported.fid)
    text = capsys.readouterr().out
    assert f"{reported.fid.iloc[0]:.4f}" in text
    assert "minimum" in text  # of two sets


def test_a_folder_of_png_files_measures_as_the_model_that_made_them(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same images: the same numbers; and no distance to each other."""
    folder, file = tmp_path / "images", tmp_path / "points.parquet"
    shared = ["--samples", "20", "-o", str(file)]
    command.main(["teacher-pixel_cond-S", "--guidance", "1.0", "--images", str(folder), *shared])
    assert len(list(folder.glob("*.png"))) == 20
    command.main([str(folder), *shared])
    model, pictures = read(file).to_dict("records")
    for key in ("fid", "precision", "recall", "kid"):
        assert model[key] == pytest.approx(pictures[key], rel=1e-9)
    capsys.readouterr()
    compare.main(["teacher-pixel_cond-S", str(folder), "--samples", "20"])
    lines = capsys.readouterr().out.splitlines()
    assert any("fid" in line and "+0.0000 ±" in line for line in lines)
    distance = next(float(line.rpartition(" ")[2]) for line in lines if "to each other" in line)
    assert abs(distance) < 1e-6
    command.main([str(folder), "--reference", str(folder), "--samples", "20"])
    assert "folder images" not in capsys.readouterr().err


def test_other_averages_come_from_snapshots(made: Path) -> None:
    file = made / "averages.csv"
    arguments = ["teacher-pixel_cond-S", "--guidance", "1.0", "--samples", "10", "-o", str(file)]
    command.main([*arguments, "--ema", "0.05,0.08", "--nimg", "100,200"])
    command.main(arguments)
    rows = read(file)
    assert rows.key.nunique() == len(rows) == 5
    assert rows.fid.nunique() == 5
    with pytest.raises(PipelineError, match=r"an earlier checkpoint needs the width of its average; add --ema"):
        command.main([*arguments, "--nimg", "100"])


def test_the_same_run_named_twice_is_one_set(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under any of its names: no spread over seeds comes of it, nor a second row."""
    file = made / "twice.csv"
    names = ["teacher-pixel_cond-S", "runs/smoke/pixel_cond/teacher/S"]
    command.main([*names, "--guidance", "1.0", "--samples", "10", "-o", str(file)])
    assert len(read(file)) == 1
    assert "seeds" not in capsys.readouterr().out


def test_files_that_were_changed_are_not_measured(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "changed"
    shutil.copytree(repository, root, ignore=shutil.ignore_patterns(".cache", "evaluate"))
    monkeypatch.setenv("SCM_ROOT", str(root))
    folder = root / "runs/smoke/pixel_cond/teacher/S"
    entry = {"bytes": 3, "sha256": "0" * 64}
    made = json.loads((folder / paths.MANIFEST).read_text()) | {"files": {"model.safetensors": entry}}
    (folder / paths.MANIFEST).write_text(json.dumps(made))
    with pytest.raises(
        PipelineError, match=r"teacher/S/model.safetensors has \d+ bytes where its manifest says 3; make it again with"
    ):
        command.main(["teacher-pixel_cond-S", "--samples", "10"])


def test_the_reference_of_a_folder_is_made_once_for_all_runs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import evaluation

    folder = tmp_path / "real"
    folder.mkdir()
    torch.manual_seed(0)
    for i in range(12):
        Image.fromarray(torch.randint(256, (16, 16), dtype=torch.uint8).numpy()).save(folder / f"{i}.png")
    calls: list[Path] = []
    made_once = evaluation.reference_of
    monkeypatch.setattr(evaluation, "reference_of", lambda path, *more: (calls.append(path), made_once(path, *more))[1])
    compare.main(["teacher-pixel_cond-S", str(folder), "--reference", str(folder), "--samples", "12"])
    assert calls == [folder]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of four PNG files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("L", (16, 16), 40 * i).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher-pixel_cond-L"], "teacher-pixel_cond-L: no teacher or student of scale smoke"),
        (["student-pixel_cond-S-scd"], "student-pixel_cond-S-scd: not trained yet; run it with: python -m pipeline run student"),
        (["teacher-pixel_cond-S", "--metrics", "fidd"], "--metrics: fidd: did you mean 'fid'?"),
        (["teacher-pixel_cond-S", "--metrics", "fd_dinov2"], "fd_dinov2: slot pixel_cond is not measured in its features; add dinov2 to"),
        (["teacher-pixel_cond-S", "--steps", "1"], "--steps: teacher-pixel_cond-S samples in 2 steps, got 1"),
        (["teacher-pixel_cond-S", "--guidance", "x"], "--guidance: expected numbers"),
        (["teacher-pixel_cond-S", "--samples", "1"], "--samples: must be at least 2, got 1"),
        (["teacher-pixel_cond-S", "--samples", "3"], "--samples: must be above evaluation.neighbours (3), got 3"),
        (["teacher-pixel_cond-S", "--samples", "9"], "--samples: 9 are too few for errors from evaluation.groups (10)"),
        (["teacher-pixel_cond-S", "--guidance=-1"], "--guidance: teacher-pixel_cond-S takes scales of at least 0, got -1"),
        (["teacher-pixel_cond-S-76543210"], "this run's result is not here any more; runs/smoke/pixel_cond/teacher/S holds teacher"),
        (["teacher-pixel_cond-S", "-o", "no/points.csv"], "no/points.csv: there is no folder no; make it first"),
        (["teacher-pixel_cond-S", "-o", "params.csv"], "params.csv: cannot be read as measured rows"),
        (["PICTURES", "--samples", "4"], "--samples: 4 are too few for errors from evaluation.groups (10)"),
        (["LARGE"], "its images are 24×20, those of the slot's data set 16×16; resize them"),
        (["teacher-pixel_cond-S", "--sets", "0"], "--sets: must be at least 1, got 0"),
        (["teacher-pixel_cond-S", "-o", "points.txt"], "points.txt: expected a file that ends in .csv or .parquet"),
        (["teacher-pixel_cond-S", "--images", "new"], "--images: there is one folder, and 2 points of 1 runs; ask for one"),
        (["PICTURES", "--guidance", "1.0"], "is a folder of images, which are as they are; leave it out"),
        (["PICTURES", "--samples", "5"], "holds 4 images, 5 are asked for"),
        (["PICTURES", "--slot", "pixel"], "--slot: pixel: did you mean 'pixel_cond'?"),
        (["EMPTY"], "empty: "),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said_in_a_sentence(
    made: Path, pictures: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    large = tmp_path / "large"
    large.mkdir()
    Image.new("L", (24, 20)).save(large / "0.png")
    (made / "params.csv").write_bytes(b"")
    named = {"PICTURES": str(pictures), "EMPTY": str(empty), "LARGE": str(large)}
    with pytest.raises((PipelineError, ValueError)) as caught:
        command.main([named.get(word, word) for word in arguments])
    assert words in str(caught.value)


def test_a_reference_that_is_not_there_is_named(made: Path, pictures: Path, params: Params) -> None:
    folder = made / registry.find(params, "reference", SLOT).outputs[0]
    folder.rename(folder.with_name("away"))
    try:
        with pytest.raises(PipelineError, match=r"pixel_cond/reference: not made yet; run it with: .* run reference"):
            command.main([str(pictures)])
    finally:
        folder.with_name("away").rename(folder)


@pytest.mark.parametrize(
    ("first", "second", "option", "used"),
    [
        ("folder", "folder", "steps", False),
        ("folder", "folder", "first", False),
        ("folder", "plain", "steps", True),
        ("folder", "plain", "guidance", False),
        ("plain", "guided", "guidance", True),
    ],
)
def test_an_option_that_neither_heeds_is_refused(first: str, second: str, option: str, used: bool) -> None:
    """`compare a b --guidance 1.5` of two unguided models would compare something else than was asked for."""

    def target(kind: str) -> Any:
        return SimpleNamespace(subject=SimpleNamespace(is_folder=kind == "folder", guidable=kind == "guided"))

    given = dict.fromkeys(("guidance", "steps", "first")) | {option: 1}
    options = argparse.Namespace(a="a", b="b", **given)
    if used:
        compare.require_a_use([target(first), target(second)], options)
        return
    with pytest.raises(PipelineError, match=f"^--{option}: means nothing to a and b; leave it out$"):
        compare.require_a_use([target(first), target(second)], options)


def test_numbers_of_two_references_are_not_compared() -> None:
    """A folder is measured in the slot that --slot names, a run in its own: a difference of such numbers would mean nothing."""

    def target(slot: str, key: str) -> Any:
        references = {"classifier": SimpleNamespace(key=key)}
        return SimpleNamespace(names={"slot": slot}, evaluator=SimpleNamespace(references=references))

    a, b = target("pixel_cond", "a" * 64), target("latent_guided", "b" * 64)
    compare.require_one_reference([a, a], ["one", "two"])
    with pytest.raises(
        PipelineError,
        match=r"^one in slot pixel_cond and pngs in slot latent_guided are measured against different ref",
    ):
        compare.require_one_reference([a, b], ["one", "pngs"])


def test_the_library_s_words_are_the_commands(made: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.__main__ import main

    for i in range(4, 12):
        shutil.copy(pictures / "0.png", pictures / f"{i}.png")
    (pictures / "1.png").write_bytes(b"no picture")
    assert main(["evaluate", str(pictures)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "1.png" in error
    assert "Traceback" not in error


def test_only_the_librarys_sentences_hide_a_traceback(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.__main__ import main

    def fault(*arguments: Any, **options: Any) -> Callable[..., None]:
        raise ValueError("a bug of the pipeline's")

    monkeypatch.setattr("pipeline.evaluate.points", fault)
    with pytest.raises(ValueError, match="a bug of the pipeline's"):
        main(["evaluate", "teacher-pixel_cond-S"])
