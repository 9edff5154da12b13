# SPDX-License-Identifier: Apache-2.0
"""Teachers that are imported: by the stage, from the file to an evaluated student, and by hand; what is refused by name."""

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from pydantic import TypeAdapter

from pipeline import __main__, manifest, registry
from pipeline.doctorfiles import checks
from pipeline.errors import PipelineError
from pipeline.importing import fault
from pipeline.networks import Network
from pipeline.params import ParamsError, validate
from pipeline.stages import dataset, evaluate, features, reference, student, teacher
from scm_core.compat import prepare_torchvision
from scm_core.interop import read_edm, read_edm2
from scm_core.interop.teachers import misfit
from scm_core.nn.build import load_model
from tests.pipeline.plain import plain
from tests.pipeline.test_latent_slot import context_of
from tests.scm_core.network_pickles import edm2_pickle, edm_pickle

ROOT = Path(__file__).resolve().parents[2]
SLOT = "pixel_cond"
STAGES = {
    module.__name__.rpartition(".")[2]: module for module in (dataset, features, reference, teacher, student, evaluate)
}
NETWORK = {
    "architecture": "ddpmpp", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": [4], "noise_channels": 8,
    "norm": "shift", "embedding": "positional", "c_noise": "edm", "checkpointing": False, "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of weights, with a DDPM++ of EDM for the digits of scikit-learn; its code would write tmp_path/trap."""
    folder = tmp_path / "weights"
    folder.mkdir()
    edm_pickle(tmp_path / "trap", channels=1, labels=10, multipliers=(1, 2)).write(folder / "edm-digits.pkl")
    monkeypatch.setenv("SCM_WEIGHTS", str(folder))
    return folder


@pytest.fixture
def repository(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stages' folders are, with a params.yaml of one slot whose teacher is imported."""
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.setenv("SCM_ROOT", str(root))
    monkeypatch.chdir(root)
    (root / "params.yaml").write_text(yaml.safe_dump(parameters(weights), sort_keys=False))
    return root


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parameters(weights: Path, **changes: Any) -> dict[str, Any]:
    """Scale smoke with one pixel slot of digits, as little training as there can be, and an imported teacher of size S."""
    data = plain()
    slots = data["scales"]["smoke"]["slots"]
    slot = {key: value for key, value in slots["latent_guided"].items() if key not in ("vae", "figure2", "sizes")}
    slot["dataset"] = {"source": "digits", "resolution": 8, "channels": 1, "labels": 10}
    slot["features"]["training"]["iterations"] = 2
    slot["evaluation"] |= {"samples": 20, "select_samples": 10, "batch": 10, "teacher": {"solver": "heun", "steps": 2}}
    slot["evaluation"] |= {"guidance": [1.0]}
    training = {"iterations": 1, "checkpoint_every": 1, "sample_every": 1}
    slot["teacher"] |= {**training, "label_dropout": 0.0}
    slot["students"] = {"scd": {**slot["students"]["scd"], **training, "guidance": None}}
    imported = {"file": "edm-digits.pkl", "sha256": digest(weights / "edm-digits.pkl"), "format": "edm"}
    slot["sizes"] = {"S": {"network": dict(NETWORK), "imported": imported, "teacher": {}, "students": {"scd": {}}}}
    for key, value in changes.items():
        place: Any = slot
        *parents, last = key.split("__")
        for part in parents:
            place = place[part]
        place[last] = value
    return {"scale": "smoke", "scales": {"smoke": {"seed": 0, "slots": {SLOT: slot}}}}


def run(root: Path, data: dict[str, Any], stage: str, **axes: str) -> Path:
    """The output of a stage, made as the executor would have it made."""
    params = validate(data)
    job = registry.find(params, stage, {"slot": SLOT, **axes})
    inputs = manifest.read_inputs(job)
    mark = manifest.fingerprint(job, params, inputs)
    runs = {name: str(item.run) for name, item in inputs.items()}
    context = replace(context_of(root, params, job), run_id=manifest.run_id(job, mark), input_runs=runs)
    STAGES[stage].run(context)
    made = manifest.build(job, params, inputs, mark, context.out)
    (context.out / "manifest.json").write_text(json.dumps(made))
    return context.out


def test_from_the_file_to_an_evaluated_student(repository: Path, weights: Path, tmp_path: Path) -> None:
    """Imported, distilled, measured; the licence is in both model files, and nothing of the pickle was run."""
    data = parameters(weights)
    for stage in ("dataset", "features", "reference"):
        run(repository, data, stage)
    made = load_model(run(repository, data, "teacher", size="S") / "model.safetensors")
    net = read_edm(weights / "edm-digits.pkl")
    for name, value in made.net.named_parameters():
        assert torch.equal(value, net.weights[name])
    trained = load_model(run(repository, data, "student", size="S", method="scd") / "model.safetensors")
    for model in (made, trained):
        assert model.info["licence"] == "CC BY-NC-SA 4.0"
        assert model.info["imported"]["file"] == "edm-digits.pkl"
        assert model.info["imported"]["sha256"] == digest(weights / "edm-digits.pkl")
    for method in ("teacher", "scd"):
        rows = pd.read_csv(run(repository, data, "evaluate", size="S", method=method) / "sweep.csv")
        assert (rows.fid > 0).all()
    assert not (tmp_path / "trap").exists()
    export_with_a_card(repository, data)


def export_with_a_card(root: Path, data: dict[str, Any]) -> None:
    """Student and teacher for others: what the card says is what the runs say."""
    (root / "params.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    name = f"student-{SLOT}-S-scd"
    assert __main__.main(["export", name, "-o", "out/pipeline", "--format", "diffusers"]) == 0
    assert __main__.main(["export", name, "-o", "out/weights"]) == 0
    assert __main__.main(["export", f"teacher-{SLOT}-S", "-o", "out/teacher"]) == 0
    made = {
        stage: read(root / f"runs/smoke/{SLOT}/{stage}/manifest.json")
        for stage in ("teacher/S", "student/S/scd", "dataset")
    }
    facts = read(root / f"runs/smoke/{SLOT}/evaluate/S/scd/evaluation.json")
    for folder in ("pipeline", "weights"):
        text = (root / "out" / folder / "README.md").read_text()
        front = yaml.safe_load(text.split("---")[1])
        assert front["license"] == "cc-by-nc-sa-4.0"
        assert "**CC BY-NC-SA 4.0**: these weights descend from published ones" in text
        assert "Karras2022edm" in text
        assert all(f"{entry['run']}, commit not recorded" in text for entry in made.values())
        assert f"{facts['reported']['1-step']['fid']:.4g}" in text
        settings = json.loads(text.partition("```json\n")[2].partition("```")[0])
        assert settings == made["student/S/scd"]["params"]
    assert "pipe(labels=[0, 1, 2], num_inference_steps=2)" in (root / "out/pipeline/README.md").read_text()
    assert (root / "out/weights/model.safetensors").read_bytes() == (
        root / f"runs/smoke/{SLOT}/student/S/scd/model.safetensors"
    ).read_bytes()
    assert not list((root / "out").glob(".*"))  # no drafts


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_the_job_depends_on_the_file_and_the_network_and_needs_no_gpu(weights: Path) -> None:
    """Neither on the seed nor on a training that there is not."""
    data = parameters(weights)
    params = validate(data)
    job = registry.find(params, "teacher", {"slot": SLOT, "size": "S"})
    assert registry.settings(job, params).keys() == {
        f"slots.{SLOT}.{key}" for key in ("sigma_data", "sizes.S.network", "sizes.S.imported")
    }
    data["scales"]["smoke"]["hardware"] = {
        "gpu": "a GPU", "memory_gb": 80, "peak_tflops": 312, "utilisation": 0.3, "gpus_per_node": 1, "cpus_per_gpu": 8,
        "host_memory_per_gpu_gb": 32, "time_limit_hours": 24,
    }  # fmt: skip
    params = validate(data)
    assert registry.find(params, "teacher", {"slot": SLOT, "size": "S"}).resources.gpus == 0
    assert registry.find(params, "student", {"slot": SLOT, "size": "S", "method": "scd"}).resources.gpus == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes__S__imported__sha256": "0" * 64}, r"edm-digits\.pkl has SHA-256 [0-9a-f]{64}, 0{64} expected for this teacher"),
        ({"sizes__S__imported__file": "other.pkl"}, r"other\.pkl is missing: put it at .*repository/other\.pkl or .*weights/other\.pkl"),
        ({"sizes__S__imported__format": "edm2"}, r"holds a network of class 'EDMPrecond'; only Precond can be imported"),
        ({"dataset__labels": 0}, r"its labels is 10, and dataset\.labels is 0: import another network, or change params\.yaml"),
        ({"dataset__resolution": 4, "sizes__S__network__attention_resolutions": [2], "features": None, "evaluation__spaces": ["inception"]},
         r"its attention_resolutions is \[4\], and sizes\.S\.network\.attention_resolutions is \[2\]"),
        ({"sigma_data": 1.0}, r"its sigma_data is 0\.5, and sigma_data is 1\.0"),
        ({"sizes__S__network__blocks": 2}, r"its blocks is 1, and sizes\.S\.network\.blocks is 2"),
        ({"sizes__S__network__norm": "double"}, r"its norm is 'shift'|its norm is shift, and sizes\.S\.network\.norm is double"),
        ({"teacher__label_dropout": 0.1}, r"cannot be guided: set label_dropout of the teacher of size S to 0"),
    ],
)  # fmt: skip
def test_another_network_than_the_slots_is_refused(
    repository: Path, weights: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PipelineError, match=f"^teacher-pixel_cond-S: .*({words})"):
        run(repository, parameters(weights, **changes), "teacher", size="S")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes__S__imported__sha256": "abc"}, r"sizes\.S\.imported\.sha256: must be 64 hex digits \(`python -m pipeline import"),
        ({"sizes__S__imported__format": "onnx"}, r"sizes\.S\.imported\.format: must be 'edm', 'edm2'"),
        ({"sizes__S__imported": {"path": "x"}}, r"sizes\.S\.imported\.path: unknown key"),
        ({"sizes__S__imported__format": "edm2", "teacher__label_dropout": 0.1}, r"label_dropout: must be 0, as networks of format edm2"),
    ],
)  # fmt: skip
def test_the_section_is_checked(weights: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        validate(parameters(weights, **changes))


def test_latents_must_be_those_that_the_network_is_for(tmp_path: Path) -> None:
    """EDM2's are of images in [0, 1], with statistics of their own."""
    network = read_edm2(edm2_pickle(tmp_path / "trap", channels=4, labels=10).write(tmp_path / "a.pkl"))
    data = plain()
    data["scale"] = "smoke"
    slot = data["scales"]["smoke"]["slots"]["latent_guided"]
    statistics = {"mean": [5.81, 3.25, 0.12, -2.15], "std": [4.17, 4.62, 3.71, 3.28]}
    edm2 = {
        "architecture": "edm2", "width": 8, "multipliers": [1, 2], "blocks": 2, "attention_resolutions": [4], "head_channels": 4,
        "norm": "adagn", "embedding": "fourier", "fourier_scale": 1.0, "c_noise": "edm", "checkpointing": False, "precision": "fp32",
    }  # fmt: skip

    def said(vae: dict[str, Any]) -> str | None:
        slot["dataset"] = {"source": "images", "path": "x", "resolution": 64, "channels": 3, "labels": 10}
        slot["vae"] = vae
        slot["teacher"]["label_dropout"] = 0.0
        slot["evaluation"]["guidance"] = [1.0]
        slot["students"] = {"sct": slot["students"]["sct"]}
        slot["sizes"] = {"S": {"network": edm2, "teacher": {}, "students": {"sct": {}}}}
        return fault(network, validate(data).active.slots["latent_guided"], "S")

    right = {"pretrained": "sd-vae-ft-mse", "unit_images": True, "statistics": statistics}
    assert said(right) is None
    assert "set vae.unit_images to true" in str(said({**right, "unit_images": False}))
    assert "give them in vae.statistics, instead of measured" in str(said({**right, "statistics": "measured"}))
    other = {**statistics, "std": [5.27, 5.91, 4.21, 4.31]}
    assert "instead of [5.27, 5.91, 4.21, 4.31]" in str(said({**right, "statistics": other}))
    own = {"pretrained": "own", "sha256": "0" * 64, "latent_channels": 4, "downsampling": 8}
    assert "name it in vae.pretrained" in str(said({**right, **own}))


def test_the_doctor_looks_for_the_file(repository: Path, weights: Path) -> None:
    """There, with the right bytes; else what to do."""

    def said(quick: bool) -> list[tuple[bool, str]]:
        return [
            (check.ok, f"{check.detail} {check.remedy}")
            for check in checks(quick, None)
            if check.what.startswith("teacher ")
        ]

    assert said(quick=False)[0][0]
    (weights / "edm-digits.pkl").write_bytes(b"x")
    assert said(quick=True)[0][0]
    ((right, words),) = said(quick=False)
    assert not right
    assert "another digest" in words
    (weights / "edm-digits.pkl").unlink()
    ((right, words),) = said(quick=True)
    assert not right
    assert "edm-digits.pkl is missing: put it at" in words


def test_import_by_hand(
    repository: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Callable[[str], int]
) -> None:
    """It says what the file is, under which licence, and the lines that params.yaml then takes; -o writes the model file."""
    assert call("import edm-digits.pkl -o out") == 0
    said = capsys.readouterr().out
    assert "for items of 1 × 8 × 8, 10 labels, sigma_data 0.5" in said
    assert "licence: CC BY-NC-SA 4.0" in said
    lines = yaml.safe_load(said.partition("sizes.<size>:\n")[2].partition("\n\n")[0])
    assert lines["imported"] == {
        "file": "edm-digits.pkl",
        "sha256": digest(weights / "edm-digits.pkl"),
        "format": "edm",
    }
    assert lines["network"] == NETWORK
    assert load_model(repository / "out" / "model.safetensors").info["licence"] == "CC BY-NC-SA 4.0"
    assert call(f"import {weights / 'edm-digits.pkl'} --slot {SLOT} --size S") == 0
    assert f"fits size S of slot {SLOT}" in capsys.readouterr().out
    edm2_pickle(tmp_path / "trap", channels=4).write(weights / "edm2.pkl")
    assert call("import edm2.pkl") == 0
    said = capsys.readouterr().out
    lines = yaml.safe_load(said.partition("sizes.<size>:\n")[2].partition("and for its latents")[0])
    made = TypeAdapter(Network).validate_python(lines["network"])
    assert misfit(read_edm2(weights / "edm2.pkl"), made.config(0.5)) is None
    assert "vae: {pretrained: sd-vae-ft-mse, unit_images: true, statistics: {mean: [5.81, 3.25, 0.12, -2.15]" in said
    assert not (tmp_path / "trap").exists()


def test_a_network_of_diffusers_from_its_folder_to_a_student(
    repository: Path, weights: Path, capsys: pytest.CaptureFixture[str], call: Callable[[str], int]
) -> None:
    """The lines that `import` prints make a size whose teacher is that network; students learn through torch.func.jvp."""
    prepare_torchvision()
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=10,
    )  # fmt: skip
    network.save_pretrained(weights / "ddpm" / "unet")
    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(weights / "ddpm" / "scheduler")
    assert call("import ddpm") == 0
    said = capsys.readouterr().out
    lines = yaml.safe_load(said.partition("sizes.<size>:\n")[2])
    assert lines["imported"]["format"] == "diffusers"
    assert lines["network"]["parameters"] == sum(p.numel() for p in network.parameters())
    assert lines["network"]["forward_flops"] > 1e5
    data = parameters(weights)
    size = {**lines, "students": {"scd": {}}}
    data["scales"]["smoke"]["slots"][SLOT]["sizes"] = {"S": size}
    run(repository, data, "dataset")
    run(repository, data, "teacher", size="S")
    trained = load_model(run(repository, data, "student", size="S", method="scd") / "model.safetensors")
    assert trained.info["licence"].startswith("not stated in the folder")
    size["students"] = {"scd": {"dropout": 0.1}}
    with pytest.raises(ParamsError, match=r"students\.scd\.dropout: must be 0 for a network of diffusers"):
        validate(data)
    size["students"] = {"scd": {"guidance": [1.0, 2.0]}}
    size["teacher"] = {"label_dropout": 0.1}
    with pytest.raises(
        ParamsError, match=r"students\.scd\.guidance: must be null: a network of diffusers has no input"
    ):
        validate(data)
    size |= {"students": {"scd": {}}, "teacher": {}, "network": dict(NETWORK)}
    with pytest.raises(ParamsError, match=r"network\.architecture: must be diffusers if the teacher is imported"):
        validate(data)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[[str], int]:
    """Run a command line in this process."""
    return lambda line: __main__.main(shlex.split(line))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import nowhere.pkl", "nowhere.pkl is missing: put it at"),
        ("import edm-digits.pkl --slot pixel_cond", "--slot and --size go together"),
        ("import edm-digits.pkl --slot pixel --size S", "pixel: unknown slot"),
        ("import edm-digits.pkl --slot pixel_cond --size M", "M: unknown size"),
        ("import half.pkl", "half.pkl: is truncated or damaged"),
        (
            "import evil.pkl",
            "evil.pkl: imports 'posix.system', which is not of the format: nothing of the file was run",
        ),
        ("import data.pkl", "data.pkl: holds no network under 'ema'"),
        (
            "export student-pixel_cond-S-scd -o out",
            "student-pixel_cond-S-scd: not trained yet; run it with: python -m pipeline run student",
        ),
        ("export student-pixel_cond-S-scd -o .", ".: is there already; name a new folder, or remove it"),
        (
            "export teacher-pixel_cond-S -o out --format diffusers",
            "a diffusers pipeline is made of a student; use --format safetensors",
        ),
        ("export student-pixel_cond-L -o out", "student-pixel_cond-L: no teacher or student of scale smoke"),
    ],
)
def test_by_hand_it_refuses_in_one_sentence(
    repository: Path,
    weights: Path,
    call: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
    line: str,
    words: str,
) -> None:
    whole = (weights / "edm-digits.pkl").read_bytes()
    (weights / "half.pkl").write_bytes(whole[: len(whole) // 2])
    (weights / "evil.pkl").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    (weights / "data.pkl").write_bytes(b"\x80\x04}.")
    assert call(line) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
