# SPDX-License-Identifier: Apache-2.0
"""Networks that diffusers saved as teachers: what they predict at the trained steps, between them and beyond; discrete schedules."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scm_core.compat import prepare_torchvision
from scm_core.conversions import LinearVPSchedule, from_trigflow, to_trigflow
from scm_core.discrete_steps import DiscreteSchedule, betas
from scm_core.engines import value_and_jvp
from scm_core.interop import RefusedError
from scm_core.interop.foreign import WEIGHTS, read_diffusers
from scm_core.interop.teachers import assembled, read_teacher
from scm_core.nn.build import load_model, save_model, student_of
from scm_core.nn.foreign import ForeignNet
from scm_core.objectives import Batch
from scm_core.objectives.methods import METHODS
from scm_core.sampling import sample_diffusion
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import train_step

prepare_torchvision()
diffusers = pytest.importorskip("diffusers")

SIGMA_DATA = 0.5
F64 = torch.float64


def unet(labels: int | None = None) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=labels,
        attention_head_dim=8,
    )  # fmt: skip


def dit() -> Any:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=2,
        num_embeds_ada_norm=6, norm_num_groups=4,
    )  # fmt: skip


def save(folder: Path, network: Any, pipeline: bool = True, **scheduler: Any) -> Path:
    """A folder as diffusers' pipelines have it, or one of a model with its scheduler beside it."""
    with torch.no_grad():  # the ends of branches begin at zero
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    part = "transformer" if "Transformer" in type(network).__name__ else "unet"
    network.save_pretrained(folder / part if pipeline else folder)
    diffusers.DDPMScheduler(**scheduler).save_pretrained(folder / "scheduler" if pipeline else folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
    ],
)
def test_the_schedule_is_diffusers_own(options: dict[str, Any]) -> None:
    """ᾱ at every step; at t of a trained step s is that step, for any σ_d; there and back between them."""
    scheduler = diffusers.DDPMScheduler(**options)
    config = scheduler.config
    made = betas(config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps)
    torch.testing.assert_close(torch.cumprod(1 - made, 0), scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    schedule, sigma_data = DiscreteSchedule(made), 0.7
    steps = torch.arange(len(made), dtype=F64)
    alpha_bar = torch.cumprod(1 - made, 0)
    t = torch.atan((1 - alpha_bar).sqrt() / (sigma_data * alpha_bar.sqrt()))
    point = schedule.at(t, sigma_data)
    torch.testing.assert_close(point.s, steps, rtol=0, atol=1e-6)
    torch.testing.assert_close(point.alpha, alpha_bar.sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.coefficients(steps)[1], (1 - alpha_bar).sqrt(), rtol=1e-9, atol=1e-12)
    between = torch.linspace(0.05, len(made) - 1.05, 301, dtype=F64)
    x = torch.randn(301, 2, dtype=F64)
    x_t, t = to_trigflow(x, between, schedule, sigma_data)
    back, s = from_trigflow(x_t, t, schedule, sigma_data)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(s, between, rtol=0, atol=1e-7)
    assert (t.diff() > 0).all()
    assert schedule.ends(sigma_data) == pytest.approx((float(to_trigflow(x[:1], steps[:1], schedule, sigma_data)[1]),
                                                       float(to_trigflow(x[:1], steps[-1:], schedule, sigma_data)[1])))  # fmt: skip


def test_the_interpolation_is_smooth_and_near_the_continuous_schedule() -> None:
    """ds/dt is continuous, and s + ½ is 1000 times the VP SDE's own time to 2 steps: the sum of ln(1 − β) is not the integral of −β."""
    schedule = DiscreteSchedule(betas("linear", 1e-4, 0.02, 1000))
    t = torch.linspace(0.03, 1.5, 20001, dtype=F64)
    s, ds = torch.func.jvp(lambda t: schedule.at(t, SIGMA_DATA).s, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(ds[1:-1], (s[2:] - s[:-2]) / (t[2:] - t[:-2]), rtol=2e-3, atol=0)
    assert (ds[1:] / ds[:-1] - 1).abs().max() < 0.02
    exact = LinearVPSchedule(0.1, 20.0).at(t, SIGMA_DATA).s * 1000
    error = (s + 0.5 - exact).abs()[s > 20]
    assert error.max() < 2


class Gaussian(torch.nn.Module):
    """The perfect network of data N(0, c²): ε, v and x0 given x_s, in closed form, as diffusers' networks are called."""

    def __init__(self, kind: str, spread: float) -> None:
        super().__init__()
        self.kind, self.variance = kind, spread**2
        self.levels = torch.cumprod(1 - betas("linear", 1e-4, 0.02, 1000), 0)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, s: Tensor) -> Any:
        self.seen.append(s)
        index = s.round().long()
        alpha, sigma = (
            value.to(x.dtype)[:, None, None, None]
            for value in (self.levels[index].sqrt(), (1 - self.levels[index]).sqrt())
        )
        total = alpha**2 * self.variance + sigma**2
        x0, noise = alpha * self.variance * x / total, sigma * x / total
        out = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[self.kind]
        return type("Out", (), {"sample": out})


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_network_is_the_perfect_F(kind: str, tmp_path: Path) -> None:
    """At the trained steps: F = (cos t · ε − sin t · x0/σ_d), known for Gaussian data. Beyond the ends F stays what it nearly is there."""
    teacher = read_diffusers(save(tmp_path / "a", unet(), prediction_type=kind))
    net = assembled(teacher).net
    assert isinstance(net, ForeignNet)
    spread = 0.6
    net.inner = Gaussian(kind, spread)
    schedule = DiscreteSchedule(betas("linear", 1e-4, 0.02, 1000))
    steps = torch.tensor([0.0, 1, 50, 500, 998, 999], dtype=F64)
    x = torch.randn(6, 3, 8, 8, dtype=F64)
    _, t = to_trigflow(x, steps, schedule, SIGMA_DATA)

    def perfect(x: Tensor, t: Tensor) -> Tensor:
        cos, sin = (f(t)[:, None, None, None] for f in (torch.cos, torch.sin))
        return cos * sin * (1 - spread**2 / SIGMA_DATA**2) * x / (cos**2 * spread**2 / SIGMA_DATA**2 + sin**2)

    torch.testing.assert_close(net(x, t), perfect(x, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.inner.seen[-1], steps, rtol=0, atol=1e-6)
    beyond = torch.tensor([0.0, 0.005, 1.5707, math.pi / 2, 1.568, 1.57], dtype=F64)
    found = net(x, beyond)
    assert found.isfinite().all()
    torch.testing.assert_close(found, perfect(x, beyond), rtol=0, atol=0.06)
    assert net.inner.seen[-1].tolist() == pytest.approx([0, 0, 999, 999, 999, 999], abs=1e-6)


CASES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "unet": (unet, 3, 0), "unet, labels": (lambda: unet(5), 3, 5), "dit": (dit, 4, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_network_is_called_as_diffusers_calls_it(name: str, kind: str, tmp_path: Path) -> None:
    """At a trained step F follows from diffusers' own forward; DDIM steps of diffusers' scheduler lie on our path."""
    make, channels, labels = CASES[name]
    own = make().eval()
    folder = save(tmp_path / "a", own, pipeline=name != "unet", prediction_type=kind, clip_sample=False)
    net: Any = assembled(read_diffusers(folder)).net
    assert (net.shape, net.labels) == ((channels, 8, 8), labels)
    step = torch.tensor([700, 120])
    alpha_bar = diffusers.DDPMScheduler().alphas_cumprod[step].double()
    x_s = torch.randn(2, channels, 8, 8)
    y = torch.tensor([1, 4]) if labels else None
    with torch.no_grad():
        out = own(x_s, step, **({"class_labels": y} if labels else {})).sample[:, :channels].double()
    alpha, sigma = (value.sqrt()[:, None, None, None] for value in (alpha_bar, 1 - alpha_bar))
    x0 = (x_s - sigma * out) / alpha if kind == "epsilon" else alpha * x_s - sigma * out
    noise = out if kind == "epsilon" else sigma * x_s + alpha * out
    t = torch.atan(sigma / (SIGMA_DATA * alpha)).flatten()
    cos, sin = torch.cos(t)[:, None, None, None], torch.sin(t)[:, None, None, None]
    x = (cos * x0 / SIGMA_DATA + sin * noise).float()
    found = net(x, t.float(), *([y] if labels else []))
    torch.testing.assert_close(found.double(), cos * noise - sin * x0 / SIGMA_DATA, rtol=1e-3, atol=1e-3)
    if name == "dit":  # no label is the label behind the last
        with torch.no_grad():
            expected = net(x, t.float(), torch.tensor([6, 6]))
        torch.testing.assert_close(net(x, t.float()), expected)


@pytest.mark.parametrize("name", CASES)
def test_value_and_tangent_sampling_and_a_step_of_scd(name: str, tmp_path: Path) -> None:
    """torch.func.jvp against central differences; the model file brings the network back; a student learns."""
    make, channels, labels = CASES[name]
    teacher = assembled(read_teacher(save(tmp_path / "a", make(), prediction_type="v_prediction"), "diffusers"))
    save_model(tmp_path / "m.safetensors", dict(teacher.net.named_parameters()), teacher.config, teacher.info)
    again = load_model(tmp_path / "m.safetensors")
    x, t = torch.randn(2, channels, 8, 8), torch.tensor([0.4, 1.2])
    y = torch.tensor([0, 3]) if labels else None
    assert torch.equal(again.net(x, t, y), teacher.net(x, t, y))

    wide = copy.deepcopy(teacher.net).double()

    def call(x: Tensor, t: Tensor) -> Tensor:
        result: Tensor = wide(x, t, y)
        return result

    x64, t64, dx, dt = x.double(), t.double(), torch.randn_like(x).double(), torch.full((2,), 0.3, dtype=F64)
    value, tangent = value_and_jvp(call, x64, t64, dx, dt)
    h = 1e-3  # diffusers takes the waves of s in float32, whatever it is called with
    differences = (call(x64 + h * dx, t64 + h * dt) - call(x64 - h * dx, t64 - h * dt)) / (2 * h)
    torch.testing.assert_close(tangent, differences, rtol=0.01, atol=0.01 * float(tangent.abs().max()))
    torch.testing.assert_close(value, call(x64, t64))
    assert sample_diffusion(call, SIGMA_DATA * x64, 3, SIGMA_DATA, "heun").isfinite().all()
    student, _ = student_of(teacher, guidance_input=False, dropout=0.0)
    method = METHODS["scd"](student, teacher.net, SIGMA_DATA, (channels, 8, 8), P_mean=-1.0, P_std=1.4, warmup=2)
    state = TrainState(student, TrainSettings(iterations=2, batch=2, lr=1e-3, seed=0), method.heads)
    before = {key: value.clone() for key, value in student.named_parameters()}
    for _ in range(2):
        train_step(state, method.objective, Batch(SIGMA_DATA * x, y, torch.arange(2)))
    assert not state.skipped
    assert any(not torch.equal(value, before[key]) for key, value in student.named_parameters())
    with pytest.raises(ValueError, match="has no input for a guidance scale"):
        student_of(teacher, guidance_input=True, dropout=0.0)


def change(file: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **values}))

    return edit


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(str(folder / "unet" / WEIGHTS))
        edit(found)
        save_file(found, str(folder / "unet" / WEIGHTS))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "unet" / WEIGHTS).unlink(), "is missing: save the model there with diffusers' save_pretrained"),
        (lambda folder: (folder / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json is missing: it says what"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), "config.json is no JSON"),
        (change("unet/config.json", _class_name="UNet2DConditionModel"), "holds a UNet2DConditionModel; only UNet2DModel, DiT"),
        (change("unet/config.json", time_embedding_type="fourier"), "time_embedding_type is 'fourier', and only 'positional'"),
        (change("unet/config.json", class_embed_type="timestep"), "class_embed_type is 'timestep', and only labels"),
        (change("unet/config.json", sample_size=[8, 16]), r"expected a square sample_size and in_channels, got \[8, 16\] and 3"),
        (change("unet/config.json", block_out_channels=[8, 17]), "diffusers makes no network of it"),
        (change("unet/config.json", nonsense=1), "diffusers makes no network of it|nonsense"),
        (change("scheduler/scheduler_config.json", prediction_type="flow"), "prediction_type is 'flow', and only epsilon, v_prediction"),
        (change("scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "trained or rescaled betas"),
        (change("scheduler/scheduler_config.json", beta_schedule="sigmoid"), "beta_schedule: expected linear, scaled_linear"),
        (tensors(lambda t: t.pop("conv_in.weight")), r"tensor conv_in\.weight is missing"),
        (tensors(lambda t: t.update(extra=torch.zeros(1))), "tensor extra is unknown to the network"),
        (tensors(lambda t: t.update({"conv_in.bias": torch.zeros(3)})), r"conv_in\.bias has shape \(3,\), expected \(8,\)"),
        (lambda folder: (folder / "unet" / WEIGHTS).write_bytes(b"cposix\nsystem\n"), "truncated or no safetensors file"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_used_is_refused_by_name(
    spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "a", unet())
    spoil(folder)
    with pytest.raises((RefusedError, FileNotFoundError, ValueError), match=words):
        read_diffusers(folder)


def test_licence_and_digest(tmp_path: Path) -> None:
    """What the folder's card says; another digest than asked for is refused."""
    folder = save(tmp_path / "a", unet())
    assert read_diffusers(folder).info["licence"].startswith("not stated in the folder")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    assert read_teacher(folder, "diffusers").info["licence"] == "apache-2.0"
    with pytest.raises(ValueError, match="expected for this teacher"):
        read_teacher(folder, "diffusers", "0" * 64)
