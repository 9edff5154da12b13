# SPDX-License-Identifier: Apache-2.0
"""Every method by its name: what it trains, what it leaves alone, its switches, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm_core.guidance import data_velocity
from scm_core.nn.build import Model, build_network, student_of
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch, Method
from scm_core.objectives.consistency import ConsistencyObjective
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.objectives.methods import METHODS
from scm_core.objectives.vsd import SumObjective
from scm_core.tangent import scm_tangent
from scm_core.train.loop import Hooks, train
from scm_core.train.state import TrainSettings, TrainState
from scm_core.trigflow import diffuse, velocity

SIGMA_DATA = 0.5
SHAPE = (2, 4, 4)
D = math.prod(SHAPE)
CONFIG = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 2}
PROPOSAL = {"P_mean": -1.0, "P_std": 1.4, "warmup": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "sct": PROPOSAL,
    "scd": PROPOSAL,
    "dsct": {**PROPOSAL, "intervals": 64},
    "dscd": {**PROPOSAL, "intervals": 64},
    "multistep": {**PROPOSAL, "segments": 4},
    "vsd": {},
    "scd_vsd": PROPOSAL,
    "ect": {"P_mean": -1.0, "P_std": 1.8, "stage_iterations": 3, "c": 0.03},
}
CONSISTENCY = ("sct", "scd", "dsct", "dscd", "multistep")
TAUGHT = ("scd", "dscd", "multistep", "vsd", "scd_vsd")


def networks(guidance_input: bool, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """A student equal to its teacher, and the teacher, as a model file gives it."""
    torch.manual_seed(0)
    teacher = build_network(CONFIG)
    torch.nn.init.constant_(teacher.get_parameter("out_gain"), 0.8)
    net, _ = student_of(Model(teacher, CONFIG, {}), guidance_input=guidance_input, dropout=dropout)
    return net, teacher.eval().requires_grad_(False)


def batch(count: int = 6, seed: int = 1) -> Batch:
    x0 = SIGMA_DATA * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return Batch(x0, torch.arange(count) % 3, torch.arange(count))


def make(name: str, guided: bool = False, **options: Any) -> tuple[nn.Module, nn.Module, Method]:
    net, teacher = networks(guided, options.pop("dropout", 0.0))
    if guided:
        options["guidance"] = (1.0, 2.0)
    return net, teacher, METHODS[name](net, teacher, SIGMA_DATA, SHAPE, **{**OPTIONS[name], **options})


def test_all_methods_are_named() -> None:
    """Continuous and discrete, multistep, VSD, ECT: all that the tables and figures compare."""
    assert set(METHODS) == set(OPTIONS)


@pytest.mark.parametrize(("name", "guided"), [*((n, False) for n in OPTIONS), *((n, True) for n in TAUGHT)])
def test_every_method_trains(name: str, guided: bool) -> None:
    """Six steps through `train`, with dropout: finite losses, no step skipped; student, heads, companions move, the teacher not."""
    net, teacher, method = make(name, guided, dropout=0.2)
    settings = TrainSettings(iterations=6, batch=6, lr=1e-2, seed=0, head_lr=1e-2, log_every=1)
    other = TrainSettings(iterations=6, batch=6, lr=1e-2, seed=1, head_lr=1e-2)
    beside = {key: TrainState(c.net, other, c.heads) for key, c in method.companions.items()}
    modules = {"net": net, "teacher": teacher, **method.heads}
    modules |= {f"companion {key}": state.net for key, state in beside.items()}
    before = {key: [p.detach().clone() for p in module.parameters()] for key, module in modules.items()}
    logged: list[dict[str, float]] = []
    hooks = Hooks(log=lambda nimg, scalars: logged.append(scalars), message=lambda text: None)
    state = TrainState(net, settings, method.heads, beside)
    objectives = {key: c.objective for key, c in method.companions.items()}
    train(state, method.objective, lambda i: batch(6, i), None, hooks, objectives)
    assert len(logged) == 6
    assert all(math.isfinite(value) for scalars in logged for value in scalars.values())
    assert state.skipped == 0
    for key, module in modules.items():
        moved = any(not torch.equal(a, b) for a, b in zip(before[key], module.parameters(), strict=True))
        assert moved == (key != "teacher"), key


@pytest.mark.parametrize(("name", "guided"), [*((n, False) for n in OPTIONS), *((n, True) for n in TAUGHT)])
def test_gradients_reach_the_student_and_its_heads_alone(name: str, guided: bool) -> None:
    """Also where teacher and companions ask for gradients."""
    net, teacher, method = make(name, guided)
    torch.nn.init.constant_(net.get_parameter("out_gain"), 0.7)  # away from the teacher, where sCD's residual is zero
    for companion in method.companions.values():
        torch.nn.init.constant_(companion.net.get_parameter("out_gain"), 0.9)
    teacher.requires_grad_(True)
    terms = method.objective(batch(), torch.Generator().manual_seed(0), 5)
    assert terms.loss.ndim == 0
    assert not any(scalar.requires_grad for scalar in terms.scalars.values())
    terms.loss.backward()
    for key, parameter in net.named_parameters():
        if not guided and "guidance" in key:
            continue
        assert parameter.grad is not None, key
        assert bool(parameter.grad.any()) or "guidance" in key, key
    for head in method.heads.values():
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    strangers = [teacher, *(m for c in method.companions.values() for m in (c.net, *c.heads.values()))]
    assert all(p.grad is None for module in strangers for p in module.parameters())


@pytest.mark.parametrize("name", CONSISTENCY)
@pytest.mark.parametrize("normalize", ["norm", "clip", "none"])
@pytest.mark.parametrize("weighted", [True, False])
def test_switches_of_figure_5(name: str, normalize: str, weighted: bool) -> None:
    """For a batch of one, F = F⁻: the plain loss is ‖g‖²/D with ‖g‖ from the logged norm n: n, n/(n + 0.1), or clipped; e^w, −w around it.

    The tangent is large (output gain 20), so that clipping to [−1, 1] cuts most of it away.
    """
    net, _, method = make(name, normalize=normalize, adaptive_weighting=weighted)
    torch.nn.init.constant_(net.get_parameter("out_gain"), 20.0)
    terms = method.objective(batch(1), torch.Generator().manual_seed(4), 10)
    n, loss = float(terms.scalars["tangent_norm"]), float(terms.loss.detach())
    assert ("logvar" in method.heads) == ("logvar" in terms.scalars) == weighted
    if weighted:
        w = float(terms.scalars["logvar"])
        assert w == pytest.approx(math.log(D) if normalize == "norm" else math.log(4), abs=1e-5)
        loss = (loss + w) * math.exp(-w)
    size = math.sqrt(loss * D)
    if normalize == "norm":
        assert size == pytest.approx(n / (n + 0.1), rel=1e-4)
    elif normalize == "none":
        assert size == pytest.approx(n, rel=1e-4)
    else:
        assert n > 2 * math.sqrt(D)
        assert 0.5 * math.sqrt(D) < size <= math.sqrt(D) * (1 + 1e-5)


@pytest.mark.parametrize("name", ["scd_vsd", "vsd"])
def test_without_adaptive_weighting_there_are_no_heads(name: str) -> None:
    """The switch of Figure 5b holds for L_sCD and L_VSD alike; F_φ, a diffusion model, keeps its own head."""
    _, _, method = make(name, adaptive_weighting=False)
    assert not method.heads
    assert set(method.companions["fake"].heads) == {"logvar"}
    terms = method.objective(batch(), torch.Generator().manual_seed(0), 5)
    assert "vsd_logvar" not in terms.scalars
    assert float(terms.loss.detach()) >= 0


@pytest.mark.parametrize("name", TAUGHT)
def test_a_teacher_is_required(name: str) -> None:
    """Distillation without a teacher: ValueError."""
    net, _ = networks(False)
    with pytest.raises(ValueError, match="teacher: this method distils a teacher, got None"):
        METHODS[name](net, None, SIGMA_DATA, SHAPE, **OPTIONS[name])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in TAUGHT])
def test_no_guidance_without_a_teacher(name: str) -> None:
    """Scales of guidance for a method that follows the data: ValueError; None is fine, and so is no teacher."""
    net, _ = networks(True)
    with pytest.raises(ValueError, match=r"guidance: this method follows the data.*got \(1.0, 2.0\)"):
        METHODS[name](net, None, SIGMA_DATA, SHAPE, guidance=(1.0, 2.0), **OPTIONS[name])
    METHODS[name](net, None, SIGMA_DATA, SHAPE, guidance=None, **OPTIONS[name])


@pytest.mark.parametrize("name", TAUGHT)
def test_guidance_needs_labels(name: str) -> None:
    """Classifier-free guidance of an unconditional batch: ValueError."""
    _, _, method = make(name, guided=True)
    unlabelled = Batch(batch().x0, None, torch.arange(6))
    with pytest.raises(ValueError, match="guidance: classifier-free guidance needs labels, got labels=None"):
        method.objective(unlabelled, torch.Generator().manual_seed(0), 0)


@pytest.mark.parametrize("name", CONSISTENCY)
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("normalize", "l2", "normalize: expected 'norm', 'clip' or 'none', got 'l2'"),
        ("P_std", 0.0, "P_std: expected a positive number, got 0.0"),
        ("P_mean", math.nan, "P_mean: expected a finite number, got nan"),
        ("c", -0.1, "c: expected a positive number, got -0.1"),
        ("warmup", -1, "warmup: expected a number of iterations >= 0, got -1"),
    ],
)
def test_options_out_of_range(name: str, option: str, value: object, message: str) -> None:
    """ValueError with name, expectation and value, when the method is made."""
    with pytest.raises(ValueError, match=message):
        make(name, **{option: value})


@pytest.mark.parametrize("scales", [(2.0, 1.0), (1.0, math.inf), (math.nan, 2.0), (1.0,)])
def test_scales_out_of_range(scales: tuple[float, ...]) -> None:
    """A range of scales is two finite numbers in order."""
    net, teacher = networks(True)
    with pytest.raises(ValueError, match=r"guidance: expected finite scales \(low, high\) with low <= high"):
        METHODS["scd"](net, teacher, SIGMA_DATA, SHAPE, guidance=scales, **OPTIONS["scd"])


@pytest.mark.parametrize("name", CONSISTENCY)
def test_sigma_data_is_positive(name: str) -> None:
    """ValueError when the method is made."""
    net, teacher = networks(False)
    with pytest.raises(ValueError, match="sigma_data: expected a positive number, got 0"):
        METHODS[name](net, teacher, 0.0, SHAPE, **OPTIONS[name], normalize="norm")


@pytest.mark.parametrize("name", ["sct", "scd", "multistep"])
def test_engines_are_known_when_the_method_is_made(name: str) -> None:
    """Not at the first step."""
    make(name, engine="func")
    with pytest.raises(ValueError, match="engine: expected 'auto', 'dual', 'func' or 'finite_difference', got 'jvp'"):
        make(name, engine="jvp")


@pytest.mark.parametrize("name", TAUGHT)
def test_scales_need_an_input_of_the_student(name: str) -> None:
    """A range of scales for a student that was built without a guidance input: ValueError when the method is made."""
    net, teacher = networks(False)
    with pytest.raises(ValueError, match=r"guidance: expected None, .* without a guidance input, got \(1.0, 2.0\)"):
        METHODS[name](net, teacher, SIGMA_DATA, SHAPE, guidance=(1.0, 2.0), **OPTIONS[name])


def test_the_data_has_no_guidance() -> None:
    """Also without the method's name around it."""
    net, _ = networks(True)
    with pytest.raises(ValueError, match="guidance: this method follows the data"):
        ConsistencyObjective(net, None, data_velocity, SIGMA_DATA, -1.0, 1.4, 0, guidance=(1.0, 2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_data": 0.0}, "sigma_data: expected a positive number, got 0"),
        ({"P_std": -1.0}, "P_std: expected a positive number, got -1"),
        ({"P_mean": math.inf}, "P_mean: expected a finite number, got inf"),
        ({"label_dropout": 1.1}, r"label_dropout: expected a number in \[0, 1\], got 1.1"),
        ({"label_dropout": -0.1}, r"label_dropout: expected a number in \[0, 1\], got -0.1"),
        ({"label_dropout": math.nan}, r"label_dropout: expected a number in \[0, 1\], got nan"),
    ],
)
def test_options_of_the_teacher_out_of_range(change: dict[str, float], message: str) -> None:
    """ValueError when the objective is made."""
    good = {"sigma_data": SIGMA_DATA, "P_mean": -0.4, "P_std": 1.2, "label_dropout": 1.0}
    net, head = networks(False)[0], LogVarHead(0.0)
    DiffusionObjective(net, head, **good)
    with pytest.raises(ValueError, match=message):
        DiffusionObjective(net, head, **{**good, **change})


def test_samples_of_other_types_are_named() -> None:
    """Pixels as bytes, or half precision: ValueError with the type, from every objective."""
    for name in OPTIONS:
        _, _, method = make(name)
        for objective in (method.objective, *(c.objective for c in method.companions.values())):
            for dtype in (torch.uint8, torch.float16):
                wrong = batch()._replace(x0=torch.zeros(6, *SHAPE, dtype=dtype))
                with pytest.raises(ValueError, match=f"x0: expected float32 or float64, got {dtype}"):
                    objective(wrong, torch.Generator().manual_seed(0), 0)


# --- float64 -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_too", [False, True])
@pytest.mark.parametrize(("name", "guided"), [*((n, False) for n in OPTIONS), *((n, True) for n in TAUGHT)])
def test_every_method_runs_in_float64(name: str, guided: bool, heads_too: bool) -> None:
    """Networks and data in float64, heads in either: a float64 loss, gradients, and times that were never rounded to float32."""
    net, teacher, method = make(name, guided)
    modules = [net, teacher, *(c.net for c in method.companions.values())]
    heads = [*method.heads.values(), *(head for c in method.companions.values() for head in c.heads.values())]
    for module in [*modules, *(heads if heads_too else [])]:
        module.double()
    data = batch()._replace(x0=batch().x0.double())
    for objective in (method.objective, *(c.objective for c in method.companions.values())):
        terms = objective(data, torch.Generator().manual_seed(0), 5)
        assert terms.loss.dtype == torch.float64
        assert torch.isfinite(terms.loss.detach())
        terms.loss.backward()
        if terms.t is not None:
            assert terms.t.dtype == torch.float64
            assert not torch.equal(terms.t, terms.t.float().double())


def test_the_objectives_in_float64_are_their_formulas() -> None:
    """sCD with guidance and the diffusion loss, rebuilt in float64 from the generator's draws: equal to 1e-11, which float32 is not."""
    net, teacher, method = make("scd", guided=True)
    torch.nn.init.constant_(net.get_parameter("out_gain"), 1.3)
    net.double(), teacher.double(), method.heads["logvar"].double()
    x0, labels = batch().x0.double(), batch().labels
    assert labels is not None
    data, f64 = batch()._replace(x0=x0), torch.float64
    got = method.objective(data, torch.Generator().manual_seed(0), 5).loss
    head = LogVarHead(1.4).double()
    also = DiffusionObjective(net, head, SIGMA_DATA, -0.4, 1.2)(data, torch.Generator().manual_seed(0), 0).loss

    def draw(P_mean: float, P_std: float) -> tuple[Tensor, Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(0)
        z = SIGMA_DATA * torch.randn(x0.shape, generator=generator, dtype=f64)
        tau = P_mean + P_std * torch.randn(6, generator=generator, dtype=f64)
        return z, torch.atan(torch.exp(tau) / SIGMA_DATA), generator

    z, t, generator = draw(-1.0, 1.4)
    s = 1 + torch.rand(6, generator=generator, dtype=f64)
    x_t = diffuse(x0, z, t)
    with torch.no_grad():
        cond, uncond = teacher(x_t / SIGMA_DATA, t, labels), teacher(x_t / SIGMA_DATA, t, None)
    dxdt = SIGMA_DATA * (uncond + s[:, None, None, None] * (cond - uncond))
    _, g = scm_tangent(lambda x, t: net(x, t, labels, s), x_t, t, dxdt, SIGMA_DATA)
    w = method.heads["logvar"](t)
    expected = (w.exp() * g.square().flatten(1).mean(1) - w).mean()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)

    z, t, _ = draw(-0.4, 1.2)
    error = SIGMA_DATA * net(diffuse(x0, z, t) / SIGMA_DATA, t, labels) - velocity(x0, z, t)
    w = head(t)
    expected = (w.exp() * error.square().flatten(1).mean(1) - w).mean()
    torch.testing.assert_close(also, expected, rtol=1e-11, atol=1e-11)


def test_terms_hold_each_samples_share() -> None:
    """The loss is the mean of the samples' own; only a sum of two losses, each with its own times, has none."""
    for name in OPTIONS:
        net, _, method = make(name)
        torch.nn.init.constant_(net.get_parameter("out_gain"), 1.1)
        for objective in (method.objective, *(c.objective for c in method.companions.values())):
            terms = objective(batch(), torch.Generator().manual_seed(0), 5)
            if isinstance(objective, SumObjective):
                assert terms.t is terms.error is None
                continue
            assert terms.t is not None
            assert terms.error is not None
            assert terms.t.shape == terms.error.shape == (6,)
            assert not terms.error.requires_grad
            torch.testing.assert_close(terms.error.mean(), terms.loss.detach(), rtol=1e-6, atol=0)


def test_unconditional_networks() -> None:
    """Without labels and guidance every method works as well."""
    torch.manual_seed(0)
    config = {**CONFIG, "labels": 0}
    for name, options in OPTIONS.items():
        teacher = build_network(config).eval().requires_grad_(False)
        net, _ = student_of(Model(teacher, config, {}), guidance_input=False, dropout=0.0)
        method = METHODS[name](net, teacher, SIGMA_DATA, SHAPE, **options)
        data: Batch = Batch(batch().x0, None, torch.arange(6))
        losses: list[Tensor] = [method.objective(data, torch.Generator().manual_seed(0), 5).loss]
        losses += [c.objective(data, torch.Generator().manual_seed(0), 5).loss for c in method.companions.values()]
        assert all(torch.isfinite(loss) for loss in losses), name
