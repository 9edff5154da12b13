# SPDX-License-Identifier: Apache-2.0
"""Exported students: in a process that has diffusers but not this project, the same images for the same noise; diffusers' own scheduler."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scm_core.autoencoder_kl import load_pretrained
from scm_core.compat import prepare_torchvision
from scm_core.disk import file_digest
from scm_core.interop.export import (
    CARRIED,
    Latents,
    Sampling,
    closure,
    export_diffusers,
    export_safetensors,
    relative,
    source_of,
)
from scm_core.nn.build import Model, build_network, load_model, save_model
from scm_core.sampling import Guided, sample_consistency, sample_multistep
from scm_core.trigflow import t_max
from scm_core.vae import VAE

prepare_torchvision()
diffusers = pytest.importorskip("diffusers")

SIGMA_DATA = 0.5
TIMES = (t_max(SIGMA_DATA), 1.1)
NETWORKS = {
    "small": {"architecture": "small", "channels": 4, "resolution": 8, "labels": 5, "width": 8, "blocks": 2, "guidance_input": True},
    "edm2": {
        "architecture": "edm2", "channels": 4, "resolution": 8, "labels": 5, "width": 8, "multipliers": [1, 2], "blocks": 1,
        "attention_resolutions": [4], "head_channels": 4, "norm": "adagn", "embedding": "fourier", "c_noise": "edm",
        "waves": [[0.5, -1.0, 2.0, 0.1, 0.0, 3.0, -0.2, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.5]],
    },
    "ddpmpp": {
        "architecture": "ddpmpp", "channels": 3, "resolution": 8, "width": 8, "multipliers": [1, 2], "blocks": 1,
        "attention_resolutions": [4], "noise_channels": 8, "norm": "double",
    },
}  # fmt: skip


def network(config: dict[str, Any]) -> Model:
    """A network whose output, gains and guidance input are not zero, as those of a trained one."""
    torch.manual_seed(1)
    net = build_network(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Model(net.requires_grad_(False), dict(config), {})


def demo_vae() -> Model:
    config = {"architecture": "vae", "channels": 1, "latent_channels": 4, "width": 8}
    return Model(network(config).net, config, {})


def published_vae(folder: Path, unit_images: bool) -> Model:
    torch.manual_seed(2)
    made = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    made.save_pretrained(folder)
    digest = file_digest(folder / "diffusion_pytorch_model.safetensors")
    return Model(*load_pretrained(folder, digest, unit_images=unit_images))


# Loads a folder and samples as job.json says, where scm_core and pipeline cannot be imported; saves what came out.
STRANGER = """
import json, sys
sys.modules["scm_core"] = sys.modules["pipeline"] = None
import torch
library = torch.library.Library("torchvision", "FRAGMENT")  # as compat.prepare_torchvision does
for schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    try:
        library.define(schema)
    except RuntimeError:
        pass
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
for folder, calls in json.load(open("job.json")).items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "SCMScheduler"
    noise = load_file(folder + ".noise")["noise"]
    for name, (options, seed) in calls.items():
        generator = torch.Generator().manual_seed(seed)
        out = pipe(latents=noise, generator=generator, output_type="pt", **options).images
        save_file({"images": out.contiguous()}, f"{folder}.{name}")
    pil = pipe(latents=noise, generator=torch.Generator().manual_seed(0), **options).images
    pil[0].save(f"{folder}.png")
"""


def strangers_images(
    root: Path, jobs: dict[str, dict[str, tuple[dict[str, Any], int]]], noise: dict[str, Tensor]
) -> None:
    """Run all calls in one process of its own."""
    for name, value in noise.items():
        save_file({"noise": value}, str(root / f"{name}.noise"))
    (root / "job.json").write_text(json.dumps(jobs))
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(root / "hub"), "HOME": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def decoded(x0: Tensor, latents: Latents | None) -> Tensor:
    """Our images in [0, 1]."""
    if latents is not None:
        mean, std = (torch.tensor(values)[:, None, None] for values in (latents.mean, latents.std))
        net: Any = latents.vae.net
        x0 = net.decode(x0 * std / SIGMA_DATA + mean)
    return (x0 / 2 + 0.5).clamp(0, 1)


def test_a_stranger_makes_the_same_images(tmp_path: Path) -> None:
    """Every architecture, with the demo's VAE, a published one, one of images in [0, 1], and none: to 1e-5."""
    scaling = ([0.1, -0.2, 0.0, 0.3], [0.9, 1.1, 1.0, 2.0])
    cases = {
        "small": (network(NETWORKS["small"]), Latents(demo_vae(), *scaling), Sampling(SIGMA_DATA, TIMES)),
        "edm2": (
            network(NETWORKS["edm2"]),
            Latents(published_vae(tmp_path / "vae", False), *scaling),
            Sampling(SIGMA_DATA, TIMES),
        ),
        "unit": (
            network(NETWORKS["edm2"]),
            Latents(published_vae(tmp_path / "vae2", True), *scaling),
            Sampling(SIGMA_DATA, TIMES),
        ),
        "ddpmpp": (network(NETWORKS["ddpmpp"]), None, Sampling(SIGMA_DATA, TIMES)),
        "segments": (network(NETWORKS["ddpmpp"]), None, Sampling(SIGMA_DATA, TIMES[:1], segments=3)),
    }
    jobs: dict[str, dict[str, tuple[dict[str, Any], int]]] = {}
    noise, expected = {}, {}
    for name, (model, latents, sampling) in cases.items():
        export_diffusers(model, sampling, latents, tmp_path / name)
        net: Any = model.net
        noise[name] = torch.randn(3, *net.shape, generator=torch.Generator().manual_seed(5))
        labels = [0, 4, 2] if net.labels else None
        guidance = 1.7 if net.guidance_input else None
        bound = Guided(net, torch.tensor(labels) if labels else None, guidance, student=True)
        options = {"labels": labels} if labels else {}
        options |= {"guidance_scale": guidance} if guidance else {}
        z = SIGMA_DATA * noise[name]
        if sampling.segments:
            jobs[name] = {"3": (options, 0)}
            expected[name, "3"] = decoded(sample_multistep(bound, z, 3, SIGMA_DATA), latents)
            continue
        fresh = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
        jobs[name] = {"1": ({**options, "num_inference_steps": 1}, 0), "2": ({**options, "num_inference_steps": 2}, 7)}
        one = sample_consistency(bound, z, TIMES[:1], SIGMA_DATA)
        # the scheduler draws noise after each step, the last one's times sin 0
        two = sample_consistency(bound, z, TIMES, SIGMA_DATA, noise=[SIGMA_DATA * fresh])
        expected |= {(name, "1"): decoded(one, latents), (name, "2"): decoded(two, latents)}
    strangers_images(tmp_path, jobs, noise)
    for (name, steps), images in expected.items():
        found = load_file(str(tmp_path / f"{name}.{steps}"))["images"]
        assert images.std() > 0.01, name
        torch.testing.assert_close(found, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "ddpmpp"])
def test_diffusers_scheduler_and_our_sampler_agree(name: str) -> None:
    """SCMScheduler fed with σ_d F of a shared network steps as `sample_consistency` does, in one step, two and three."""
    net: Any = network(
        NETWORKS[name]
    ).net.double()  # in float32 the two round differently, by more or less on each processor
    for times in (TIMES[:1], TIMES, (1.5, 0.9, 0.3)):
        scheduler = diffusers.SCMScheduler(sigma_data=SIGMA_DATA)
        scheduler.set_timesteps(len(times), timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None)
        z = SIGMA_DATA * torch.randn(2, *net.shape, dtype=torch.float64)
        drawn, again = (torch.Generator().manual_seed(3) for _ in range(2))
        x = math.sin(times[0]) * z
        for t in scheduler.timesteps[:-1]:
            output = SIGMA_DATA * net(x / SIGMA_DATA, t.expand(2))
            x = scheduler.step(output, t, x, generator=drawn, return_dict=False)[0]
        fresh = [SIGMA_DATA * torch.randn(z.shape, generator=again).to(z) for _ in times[1:]]
        torch.testing.assert_close(x, sample_consistency(net, z, times, SIGMA_DATA, noise=fresh), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", CARRIED)
def test_the_carried_modules_are_ours_but_for_their_imports(architecture: str) -> None:
    """Nothing of scm_core is imported by them any more; every other line is as it is here."""
    from scm_core.nn.build import ARCHITECTURES

    modules = closure(ARCHITECTURES[architecture].__module__)
    assert "scm_core.nn.dual" in modules
    names = {name: f"x_{name.rpartition('.')[2]}" for name in modules}
    for name in modules:
        own, carried = source_of(name).splitlines(), relative(source_of(name), names).splitlines()
        assert len(own) == len(carried)
        for before, after in zip(own, carried, strict=True):
            if before != after:
                assert before.strip().startswith("from scm_core")
                assert after.strip().startswith("from .")
        assert not any("from scm_core" in line or "import scm_core" in line for line in carried)


def test_an_architecture_that_cannot_be_carried(tmp_path: Path) -> None:
    model = Model(nn.Identity(), {"architecture": "mlp"}, {})
    with pytest.raises(
        ValueError,
        match=r"architecture mlp: a diffusers pipeline can carry small, edm2, ddpmpp; use --format safetensors",
    ):
        export_diffusers(model, Sampling(SIGMA_DATA, TIMES), None, tmp_path / "x")


def test_safetensors(tmp_path: Path) -> None:
    """The model file as it is, its description readable beside it."""
    model = network(NETWORKS["small"])
    save_model(tmp_path / "m.safetensors", dict(model.net.named_parameters()), model.config, {"run": "r"})
    out = tmp_path / "out"
    out.mkdir()
    export_safetensors(tmp_path / "m.safetensors", load_model(tmp_path / "m.safetensors"), out)
    again = load_model(out / "model.safetensors")
    for name, value in model.net.named_parameters():
        assert torch.equal(dict(again.net.named_parameters())[name], value)
    assert json.loads((out / "config.json").read_text()) == {"config": model.config, "info": {"run": "r"}}


def test_unit_images_are_half_the_contrast(tmp_path: Path) -> None:
    """An autoencoder that is shown (x + 1)/2 and gives 2y − 1."""
    plain, unit = (published_vae(tmp_path / str(flag), flag).net for flag in (False, True))
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert not isinstance(plain, VAE)
    for found, expected in zip(unit.encode(x), plain.encode((x + 1) / 2), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(found, expected)
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(unit.decode(z), 2 * plain.decode(z) - 1)  # type: ignore[operator]
