# SPDX-License-Identifier: Apache-2.0
"""Every method by its name: what it trains, what it leaves alone, its switches, and what it refuses."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm_core.nn.build import Model, build_network, student_of
from scm_core.objectives import Batch, Method
from scm_core.objectives.methods import METHODS
from scm_core.train.loop import Hooks, train
from scm_core.train.state import TrainSettings, TrainState

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
    """For a batch of one, F = F⁻: the plain loss is ‖g‖²/D ‖g‖ from the logged norm n: n, n/(n + 0.1), or ≤ n; e^w, −w around it."""
    net, _, method = make(name, normalize=normalize, adaptive_weighting=weighted)
    torch.nn.init.constant_(net.get_parameter("out_gain"), 0.5)
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
        assert 0.2 * n < size <= n * (1 + 1e-4)
        assert size <= math.sqrt(D)


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
