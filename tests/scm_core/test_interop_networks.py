# SPDX-License-Identifier: Apache-2.0
"""Imported EDM and EDM2 networks against an evaluation of the same weights that is written from the papers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm_core.engines import value_and_jvp
from scm_core.interop import RefusedError, Teacher, read_edm, read_edm2
from scm_core.nn.build import Model, build_network, student_of
from scm_core.nn.layers import mp_weights, row_rms
from scm_core.objectives import Batch
from scm_core.objectives.methods import METHODS
from scm_core.sampling import Guided, sample_diffusion
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import train_step
from tests.scm_core.network_pickles import (
    Persistent,
    Pickled,
    denoiser,
    edm2_pickle,
    edm2_raw,
    edm_pickle,
    edm_raw,
    heun,
)

F64 = torch.float64
SIGMA_DATA = 0.5


def built(teacher: Teacher) -> nn.Module:
    """The network in float64, every parameter from the file."""
    net = build_network(teacher.config).double().eval().requires_grad_(False)
    assert teacher.weights.keys() == dict(net.named_parameters()).keys()
    net.load_state_dict(teacher.weights, strict=False)
    return net


CASES: dict[str, tuple[Callable[..., Pickled], dict[str, Any], Any, Any]] = {
    "edm2": (edm2_pickle, {}, read_edm2, edm2_raw),
    "edm2, no labels, three levels": (
        edm2_pickle, {"labels": 0, "widths": (6, 12, 18), "blocks": 1, "attention": (4, 2), "head": 3}, read_edm2, edm2_raw,
    ),
    "edm2, latents, half": (edm2_pickle, {"channels": 4, "dtype": torch.float16}, read_edm2, edm2_raw),
    "edm": (edm_pickle, {}, read_edm, edm_raw),
    "edm, labels": (edm_pickle, {"labels": 3, "multipliers": (1, 2), "blocks": 2, "augment": 0}, read_edm, edm_raw),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Pickled, nn.Module, Any, Path]:
    """A pickle, its network imported, how to evaluate the pickle, and the file that its code would write."""
    make, options, read, raw = CASES[request.param]
    trap = tmp_path / "trap"
    pickled = make(trap, **options)
    return pickled, built(read(pickled.write(tmp_path / "network.pkl"))), raw, trap


def drawn(net: Any, batch: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, t over all that samplers use, labels with one that is missing."""
    x = torch.randn(batch, *net.shape, dtype=F64)
    t = torch.atan(torch.tensor([0.002, 0.3, 80.0], dtype=F64) / SIGMA_DATA)
    labels = torch.tensor([0, -1, net.labels - 1]) if net.labels else None
    return x, t, labels


def test_the_imported_network_is_the_files_and_nothing_was_run(case: tuple[Pickled, nn.Module, Any, Path]) -> None:
    """F(x, t) = −raw(x, ¼ ln(σ_d tan t)), to the float32 that weights are kept in, for all labels and none."""
    pickled, net, raw, trap = case
    x, t, labels = drawn(net)
    expected = -raw(pickled.net, x, torch.log(SIGMA_DATA * torch.tan(t)) / 4, labels)
    assert expected.square().mean() > 0.01
    torch.testing.assert_close(net(x, t, labels), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not trap.exists()


def test_the_weights_are_exact(tmp_path: Path) -> None:
    """With weights that float32 holds exactly nothing but the rounding of float64 is left."""
    pickled = edm_pickle(tmp_path / "trap", labels=3)
    net = built(read_edm(pickled.write(tmp_path / "network.pkl")))
    x, t, labels = drawn(net)
    expected = -edm_raw(pickled.net, x, torch.log(SIGMA_DATA * torch.tan(t)) / 4, labels)
    torch.testing.assert_close(net(x, t, labels), expected, rtol=1e-11, atol=1e-11)


def test_edm2s_weights_are_normalised(tmp_path: Path) -> None:
    """Rows have RMS 1 up to EDM2's ε; with rows in float64 the network is the file's to 1e-10."""
    pickled = edm2_pickle(tmp_path / "trap")
    net = built(read_edm2(pickled.write(tmp_path / "network.pkl")))
    sizes = [row_rms(layer.weight.clone()) for _, layer in mp_weights(net)]
    assert max(float((1 - size).abs().max()) for size in sizes) < 5e-4
    exact = dict(net.named_parameters())
    for name, value in pickled.tensors.items():  # the layers whose order is kept
        ours = {"unet.emb_noise.weight": "embed_time.weight", "unet.out_conv.weight": "conv_out.weight"}.get(name)
        if ours:
            rms = value.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (value.ndim - 1))
            torch.testing.assert_close(exact[ours], value / (rms + 1e-4), rtol=1e-6, atol=1e-7)


def test_value_and_tangent_of_an_imported_network(case: tuple[Pickled, nn.Module, Any, Path]) -> None:
    """The pairs' pass gives what torch.func.jvp and central differences give."""
    _, net, _, _ = case
    x, _, labels = drawn(net)
    t = torch.tensor([0.1, 0.7, 1.4], dtype=F64)
    dx, dt = torch.randn_like(x), torch.full_like(t, 0.2)

    def call(x: Any, t: Any) -> Any:
        return net(x, t, labels)

    h = 1e-5
    differences = (call(x + h * dx, t + h * dt) - call(x - h * dx, t - h * dt)) / (2 * h)
    func = value_and_jvp(call, x, t, dx, dt, "func")[1]
    call.supports_dual = True  # type: ignore[attr-defined]
    dual = value_and_jvp(call, x, t, dx, dt, "dual")[1]
    torch.testing.assert_close(dual, func, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dual, differences, rtol=1e-4, atol=1e-5)


def test_sampling_is_edms(case: tuple[Pickled, nn.Module, Any, Path]) -> None:
    """Heun in TrigFlow's variables from z = σ_d ε is EDM's sampler from σ_max ε.

    It starts at sin(t_max) z, where EDM's x/√(σ² + σ_d²) would be the same at equal noise: σ_max ε · σ_d/√(σ_max² + σ_d²).
    """
    pickled, net, raw, _ = case
    noise = torch.randn(2, *net.shape, dtype=F64)  # type: ignore[misc]
    labels = torch.tensor([0, 2]) if net.labels else None
    found = sample_diffusion(Guided(net, labels), SIGMA_DATA * noise, 6, SIGMA_DATA, solver="heun")
    expected = heun(raw, pickled.net, noise, 6, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_denoiser_follows_from_F(case: tuple[Pickled, nn.Module, Any, Path]) -> None:
    """D = cos(t) x_t − sin(t) σ_d F at x_t = cos(t) x_σ."""
    pickled, net, raw, _ = case
    x, t, labels = drawn(net)
    sigma = SIGMA_DATA * torch.tan(t)
    cos, sin = torch.cos(t)[:, None, None, None], torch.sin(t)[:, None, None, None]
    x_sigma = SIGMA_DATA * x / cos
    found = cos * SIGMA_DATA * x - sin * SIGMA_DATA * net(x, t, labels)
    torch.testing.assert_close(found, denoiser(raw, pickled.net, x_sigma, sigma, labels), rtol=1e-5, atol=1e-5)


def extra() -> Persistent:
    """A layer that the format does not have."""
    made = Persistent("Linear", Path("trap"))
    made.weight, made.bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    return made


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["edm2", "edm, labels"])
def test_scd_takes_a_step_on_an_imported_teacher(name: str, guided: bool, tmp_path: Path) -> None:
    """A student starts equal to its teacher and learns from it with the usual step, weights normalised as ours are."""
    make, options, read, _ = CASES[name]
    imported = read(make(tmp_path / "trap", **options).write(tmp_path / "network.pkl"))
    net = build_network(imported.config)
    net.load_state_dict(imported.weights)
    teacher = Model(net.eval().requires_grad_(False), imported.config, imported.info)
    student, _ = student_of(teacher, guidance_input=guided, dropout=0.0)
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    t = torch.rand(8) + 0.2
    assert torch.equal(student(x, t, labels), teacher.net(x, t, labels))
    method = METHODS["scd"](
        student,
        teacher.net,
        SIGMA_DATA,
        (3, 8, 8),
        P_mean=-1.0,
        P_std=1.4,
        guidance=(1.0, 2.0) if guided else None,
        warmup=2,
    )
    state = TrainState(student, TrainSettings(iterations=4, batch=8, lr=1e-3, seed=0), method.heads)
    before = {key: value.clone() for key, value in student.named_parameters()}
    for _ in range(2):
        train_step(state, method.objective, Batch(SIGMA_DATA * x, labels, torch.arange(8)))
    moved = {key for key, value in student.named_parameters() if not torch.equal(value, before[key])}
    assert {"conv_out.weight", "conv_in.weight"} <= moved
    assert not state.skipped
    for _, layer in mp_weights(student):
        assert math.isclose(float(row_rms(layer.weight.detach().clone()).mean()), 1, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net: net.unet.enc["8x8_block1"].__delattr__("conv_res1"), r"enc\.8x8_block1\.conv_res1\.weight is missing"),
        (lambda net: net.unet.__setattr__("extra", extra()), r"tensor unet\.extra\.bias is unknown: .*\(and 1 more\)"),
        (
            lambda net: net.unet.dec["4x4_in0"].conv_res0.__setattr__("weight", nn.Parameter(torch.zeros(16, 16, 1, 1))),
            r"dec\.4x4_in0\.conv_res0\.weight has shape \(16, 16, 1, 1\), expected \(16, 16, 3, 3\)",
        ),
        (lambda net: net.unet.emb_fourier.freqs.fill_(math.nan), r"emb_fourier\.freqs has numbers that are not finite"),
        (lambda net: net.unet.__dict__.update(concat_balance=0.3), r"concat_balance is 0\.3, and only 0\.5 can be computed"),
        (
            lambda net: net.unet.enc["4x4_down"].__dict__.update(resample_filter=[1, 3, 3, 1]),
            r"resample_filter is \[1, 3, 3, 1\], and only \[1, 1\]",
        ),
        (lambda net: net.__dict__.update(sigma_data="much"), r"Precond has no number sigma_data"),
        (lambda net: net.__dict__.update(img_channels=-3), r"img_channels: expected a whole number of at least 1, got -3"),
        (lambda net: net.__dict__.update(img_resolution=16), r"are not those of an EDM2 network"),
        (lambda net: net.__dict__.update(_about=("Other", Path("x"))), r"a network of class 'Other'; only Precond can be imported"),
    ],
)  # fmt: skip
def test_another_network_than_edm2s_is_named(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    pickled = edm2_pickle(tmp_path / "trap")
    change(pickled.net)
    with pytest.raises(RefusedError, match=rf"network\.pkl.*{words}"):
        read_edm2(pickled.write(tmp_path / "network.pkl"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net: net.__dict__.update(_about=("VPPrecond", Path("x"))), "variance-preserving preconditioning of Score SDE"),
        (lambda net: net.model.__dict__.update(_about=("DhariwalUNet", Path("x"))), r"is a DhariwalUNet; only DDPM\+\+"),
        (lambda net: net.model.map_noise.__dict__.update(_about=("FourierEmbedding", Path("x"))), r"NCSN\+\+ \(Fourier embedding\)"),
        (lambda net: net.model.enc.__setitem__("4x4_aux_residual", extra()), r"NCSN\+\+ \(4x4_aux_residual\)"),
        (lambda net: net.model.enc["4x4_down"].conv0.resample_filter.fill_(0.2), "another filter than a box"),
        (lambda net: net.model.enc["8x8_block0"].__dict__.update(adaptive_scale=True), "adaptive_scale is True, and only False"),
        (lambda net: net.model.enc["8x8_block0"].norm0.__dict__.update(eps=1e-5), "eps is 1e-05, and only 1e-06"),
        (lambda net: net.model.__delattr__("map_layer1"), r"model\.map_layer1\.weight is missing"),
    ],
)  # fmt: skip
def test_another_network_than_edms_ddpmpp_is_named(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    pickled = edm_pickle(tmp_path / "trap")
    change(pickled.net)
    with pytest.raises(RefusedError, match=words):
        read_edm(pickled.write(tmp_path / "network.pkl"))


def test_what_the_file_says_beside_its_weights(tmp_path: Path) -> None:
    """Licence, label dropout, and for latents those that the network is for: EDM2's are of images in [0, 1]."""
    info = read_edm2(edm2_pickle(tmp_path / "trap", channels=4).write(tmp_path / "a.pkl")).info
    assert info["licence"] == "CC BY-NC-SA 4.0"
    assert info["label_dropout"] is False
    assert info["latents"] == {
        "vae": "sd-vae-ft-mse", "images": [0.0, 1.0], "mean": [5.81, 3.25, 0.12, -2.15], "std": [4.17, 4.62, 3.71, 3.28],
    }  # fmt: skip
    assert "latents" not in read_edm2(edm2_pickle(tmp_path / "trap").write(tmp_path / "b.pkl")).info
    assert read_edm(edm_pickle(tmp_path / "trap").write(tmp_path / "c.pkl")).info["label_dropout"] is False
