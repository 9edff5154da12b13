# SPDX-License-Identifier: Apache-2.0
"""A slot with a published autoencoder from images to samples, in one process; the reconstruction floor; what is refused by name."""

import hashlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from pipeline import registry
from pipeline.autoencoders import PUBLISHED
from pipeline.context import Context
from pipeline.errors import PipelineError
from pipeline.job import Job
from pipeline.modelling import Decoder, load_vae
from pipeline.params import Params, validate
from pipeline.paths import MANIFEST
from pipeline.ranks import Silent
from pipeline.stages import dataset, evaluate, features, latents, reconstruction, reference, student, teacher, vae
from pipeline.tables import floor_note
from scm_core.autoencoder_kl import KNOWN, AutoencoderKL
from scm_core.compat import prepare_torchvision
from scm_core.data import load_images, load_latents, writing
from scm_core.disk import file_digest
from scm_core.nn import build
from scm_core.nn.build import save_model
from scm_core.vae import VAE
from tests.pipeline.plain import plain

prepare_torchvision()
diffusers = pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
SLOT = "latent_guided"
STAGES = {
    module.__name__.rpartition(".")[2]: module
    for module in (dataset, vae, latents, features, reference, reconstruction, teacher, student, evaluate)
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
STATISTICS = {"mean": [0.25, -0.5, 0.0, 1.0], "std": [1.5, 0.5, 2.0, 1.0]}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A greyscale autoencoder that diffusers made and saved; half the side."""
    torch.manual_seed(3)
    network = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=2,
    )
    folder = tmp_path_factory.mktemp("published") / "tiny"
    network.save_pretrained(folder)
    return folder


def smallest(section: dict[str, Any]) -> dict[str, Any]:
    """params.yaml with scikit-learn's digits through this autoencoder at scale smoke, with as little training as there can be."""
    data = plain()
    data["scale"] = "smoke"
    slot = data["scales"]["smoke"]["slots"][SLOT]
    slot["dataset"] = {"source": "digits", "resolution": 8, "channels": 1, "labels": 10}
    slot["vae"] = section
    slot["features"]["training"]["iterations"] = 2
    slot["evaluation"] |= {"samples": 20, "select_samples": 10, "batch": 10, "teacher": {"solver": "ddim", "steps": 2}}
    for name in ("teacher", "students"):
        for training in [slot[name]] if name == "teacher" else slot[name].values():
            training |= {"iterations": 1, "checkpoint_every": 1, "sample_every": 1}
    return data


@pytest.fixture
def section(published: Path) -> dict[str, Any]:
    digest = hashlib.sha256((published / WEIGHTS).read_bytes()).hexdigest()
    sizes = {"latent_channels": 4, "downsampling": 2}
    return {
        "pretrained": str(published),
        "sha256": digest,
        **sizes,
        "statistics": "measured",
        "engine": {"batch": 300},
    }


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stages' folders are."""
    monkeypatch.setenv("SCM_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("{}\n")
    return tmp_path


def run(root: Path, params: Params, stage: str, **axes: str) -> Path:
    """The output of a stage, made as the executor would have it made."""
    job = registry.find(params, stage, {"slot": SLOT, **axes})
    context = context_of(root, params, job)
    STAGES[stage].run(context)
    (context.out / MANIFEST).write_text(json.dumps({"run": context.run_id}))
    return context.out


def context_of(root: Path, params: Params, job: Job) -> Context:
    out, work = root / job.outputs[0], root / "work" / job.name
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    inputs = {name: root / path for name, path in job.inputs.items()}
    runs = {name: f"{name}-01234567" for name in inputs}
    return Context(job, params, inputs, out, work, Silent(), f"{job.name}-0", runs, work / "progress.json", False)


def test_from_images_to_samples_and_the_floor(repository: Path, published: Path, section: dict[str, Any]) -> None:
    """Encode, train a step of teacher and student, decode, measure: with diffusers' own class as the oracle of both ends."""
    params = validate(smallest(section))
    for stage in ("vae", "dataset", "latents", "features", "reference"):
        run(repository, params, stage)
    oracle = diffusers.AutoencoderKL.from_pretrained(published).eval()
    images = load_images(repository / "runs/smoke" / SLOT / "dataset")
    store = load_latents(repository / "runs/smoke" / SLOT / "latents", verify=True)
    assert store.shape == (4, 4, 4)
    with torch.no_grad():
        posterior = oracle.encode(images.images[:40].float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(store.mean[:40], posterior.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(store.std[:40], posterior.std, rtol=1e-6, atol=1e-6)
    run(repository, params, "teacher", size="S")
    run(repository, params, "student", size="S", method="scd")
    for method in ("teacher", "scd"):
        rows = pd.read_csv(run(repository, params, "evaluate", size="S", method=method) / "sweep.csv")
        assert (rows.fid > 0).all()
    job = registry.find(params, "evaluate", {"slot": SLOT, "size": "S", "method": "scd"})
    decode = Decoder(params.active.slots[SLOT], context_of(repository, params, job).inputs)
    x0 = store.sample(torch.arange(7), torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = oracle.decode(x0 * store.channel_std[:, None, None] / 0.5 + store.channel_mean[:, None, None]).sample
    assert (decode(x0).float() - ((decoded + 1) * 127.5).clamp(0, 255)).abs().max() <= 0.501  # the nearest level
    folder = run(repository, params, "reconstruction")
    facts = json.loads((folder / "reconstruction.json").read_text())
    assert facts["vae"] == {"architecture": "autoencoder_kl", "source": "tiny", "sha256": section["sha256"]}
    assert (facts["samples"], facts["reference_images"], facts["dataset"]) == (20, 1797, "digits")
    (row,) = pd.read_csv(folder / "reconstruction.csv").to_dict("records")
    assert (row["space"], row["fid"], row["fid_se"]) == (
        "classifier",
        facts["reported"]["fid"],
        facts["reported"]["fid_se"],
    )
    assert 0 <= row["precision"] <= 1
    assert f"FID {row['fid']:.3f} ± {row['fid_se']:.3f} of 20 images" in floor_note(folder)


def test_params_know_the_sizes_of_published_autoencoders() -> None:
    """Without torch; the library's own networks are the oracle."""
    assert PUBLISHED.keys() == KNOWN.keys()
    for name, known in KNOWN.items():
        with torch.device("meta"):
            net = AutoencoderKL(**known.config)
        assert PUBLISHED[name] == (net.channels, net.latent_channels, net.downsampling)


def test_given_statistics_scale_the_latents(repository: Path, section: dict[str, Any]) -> None:
    params = validate(smallest({**section, "statistics": STATISTICS}))
    for stage in ("vae", "dataset"):
        run(repository, params, stage)
    store = load_latents(run(repository, params, "latents"))
    assert (store.channel_mean.tolist(), store.channel_std.tolist()) == (STATISTICS["mean"], STATISTICS["std"])


def test_decoding_in_parts_gives_the_same_images(repository: Path, section: dict[str, Any]) -> None:
    """To the last bit of a float the parts may differ, in pixels they do not; how many are decoded at once is a part of the cache's key."""
    params = validate(smallest(section))
    for stage in ("vae", "dataset", "latents"):
        run(repository, params, stage)
    slots = [validate(smallest({**section, "engine": {"batch": n}})).active.slots[SLOT] for n in (100, 7)]
    inputs = {name: repository / "runs/smoke" / SLOT / name for name in ("latents", "vae")}
    one, parts = (Decoder(slot, inputs) for slot in slots)
    seen: list[int] = []
    assert parts.vae is not None
    network = parts.vae.decode
    parts.vae.decode = lambda z: (seen.append(len(z)), network(z))[1]  # type: ignore[method-assign, func-returns-value]
    x0 = torch.randn(30, 4, 4, 4, generator=torch.Generator().manual_seed(0)) / 2
    assert (one(x0).int() - parts(x0).int()).abs().max() <= 1
    assert seen == [7, 7, 7, 7, 2]
    assert one.facts != parts.facts


def killed_after(batches: int, root: Path, params: Params) -> None:
    """kill -9 the stage's process before it encodes so many batches and one."""

    def encoding() -> None:
        left = batches

        def loaded(folder: Path) -> Any:
            net = load_vae(folder)
            encode = net.encode

            def counted(x: Tensor) -> tuple[Tensor, Tensor]:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return encode(x)

            net.encode = counted  # type: ignore[method-assign]
            return net

        latents.load_vae = loaded
        run(root, params, "latents")

    child = multiprocessing.get_context("fork").Process(target=encoding)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def test_a_killed_encoding_goes_on_to_the_same_digests(
    repository: Path, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 400 * 2 * 4 * 64)  # five shards, each of two batches
    params = validate(smallest(section))
    for stage in ("vae", "dataset"):
        run(repository, params, stage)
    killed_after(5, repository, params)
    job = registry.find(params, "latents", {"slot": SLOT})
    (left,) = (repository / "work" / job.name).glob("latents-*")
    assert sorted(path.name for path in left.glob("mean-*.npy")) == ["mean-00000.npy", "mean-00001.npy"]
    resumed = {path.name: file_digest(path) for path in run(repository, params, "latents").iterdir()}
    assert "mean-00004.npy" in resumed
    other = repository / "other"
    for name in ("runs/smoke/latent_guided/dataset", "runs/smoke/latent_guided/vae"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).symlink_to(repository / name)
    assert {path.name: file_digest(path) for path in run(other, params, "latents").iterdir()} == resumed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, "0000 expected for the VAE {folder}: give the right file or the right sha256"),
        ({"pretrained": "no/such/folder"}, "no/such/folder/config.json is missing: a VAE is one of sd-vae-ft-mse, or a folder"),
        ({"latent_channels": 8}, "vae.latent_channels is 8 in params.yaml, and the VAE {folder} has 4: change it, or use another VAE"),
        ({"downsampling": 4}, "vae.downsampling is 4 in params.yaml, and the VAE {folder} has 2: change it, or use another VAE"),
    ],
)  # fmt: skip
def test_an_autoencoder_that_is_not_what_params_say_is_refused(
    repository: Path, published: Path, section: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    """By the first job, which needs neither data nor a GPU."""
    params = validate(smallest({**section, **change}))
    job = registry.find(params, "vae", {"slot": SLOT})
    assert (job.resources.gpus, dict(job.inputs)) == (0, {})
    with pytest.raises(PipelineError) as caught:
        run(repository, params, "vae")
    assert words.format(folder=published) in str(caught.value)
    assert str(caught.value).startswith(f"vae-{SLOT}: ")


def test_images_of_another_number_of_channels_are_refused(
    repository: Path, section: dict[str, Any], published: Path, tmp_path: Path
) -> None:
    """Greyscale digits, and an autoencoder of colour images."""
    colour = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    colour.save_pretrained(tmp_path / "colour")
    digest = hashlib.sha256((tmp_path / "colour" / WEIGHTS).read_bytes()).hexdigest()
    own = {**section, "pretrained": str(tmp_path / "colour"), "sha256": digest, "downsampling": 1}
    with pytest.raises(PipelineError, match=r"dataset\.channels is 1 in params\.yaml, and the VAE .*colour has 3"):
        run(repository, validate(smallest(own)), "vae")


class Exact(VAE):
    """An autoencoder that loses nothing, or in each 4×4 block of pixels all but the first `kept`."""

    def __init__(self, kept: int) -> None:
        super().__init__(1, 16, 1)
        self.kept = kept

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.pixel_unshuffle(x, 4)
        return mean, torch.full_like(mean, -60.0)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(torch.cat([z[:, : self.kept], -torch.ones_like(z[:, self.kept :])], dim=1), 4)


def test_the_floor_of_an_identity_is_zero_and_grows_with_what_is_lost(
    repository: Path, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images of the reference: what is left is rounding."""
    monkeypatch.setitem(build.ARCHITECTURES, "exact", Exact)
    data = smallest({**section, "latent_channels": 16, "downsampling": 4})
    data["scales"]["smoke"]["slots"][SLOT]["evaluation"] |= {"samples": 5000, "batch": 500, "groups": 0}
    params = validate(data)
    for stage in ("dataset", "features", "reference"):
        run(repository, params, stage)
    found = {}
    for kept in (16, 12, 4):
        folder = repository / "runs/smoke" / SLOT / "vae"
        folder.mkdir(exist_ok=True)
        save_model(folder / "vae.safetensors", Exact(kept).state_dict(), {"architecture": "exact", "kept": kept})
        out = repository / "runs/smoke" / SLOT / "latents"
        for path in (*out.glob("*"), *(repository / "work").rglob("latents-*/*")):
            path.unlink() if path.is_file() else None
        run(repository, params, "latents")
        facts = json.loads((run(repository, params, "reconstruction") / "reconstruction.json").read_text())
        assert facts["samples"] == facts["reference_images"] == 1797
        found[kept] = facts["reported"]["fid"]
    assert abs(found[16]) < 1e-6
    assert found[16] + 1e-3 < found[12] < found[4]


def test_the_whole_file_is_valid_yaml_of_the_schema(section: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads((ROOT / "params.schema.json").read_text()))
    for statistics in ("measured", STATISTICS):
        data = yaml.safe_load(yaml.safe_dump(smallest({**section, "statistics": statistics})))
        assert list(validator.iter_errors(data)) == []
    assert list(validator.iter_errors(smallest({**section, "statistics": "mesured"}))) != []
