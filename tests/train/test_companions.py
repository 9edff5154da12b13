# SPDX-License-Identifier: Apache-2.0
"""Networks trained beside the student (VSD's F_φ): checkpoints, streams of noise, and who gets whose gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core.data import BatchOrder
from scm_core.nn.build import Model, build_network, student_of
from scm_core.objectives import Batch, Objective, Terms
from scm_core.objectives.methods import METHODS
from scm_core.seeds import derive_seed
from scm_core.train.checkpoint import CheckpointError, CheckpointStore
from scm_core.train.loop import Hooks, train
from scm_core.train.schedule import Schedule
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import train_step

CONFIG = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 2}
ITERATIONS, BATCH = 17, 6


class Killed(Exception):
    """Stands for the end of the process."""


def data(iteration: int) -> Batch:
    """Batches of ten samples that straddle epochs; a function of the iteration."""
    x0 = 0.5 * torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(77))
    indices = BatchOrder(10, BATCH, seed=1).indices(iteration)
    return Batch(x0[indices], indices % 3, indices)


def run_of(**changes: Any) -> tuple[TrainState, Objective, dict[str, Objective]]:
    """sCD + VSD with guidance, dropout in every network, warm-up, adaptive weighting; F_φ with a seed of its own."""
    torch.manual_seed(0)
    config = {**CONFIG, "dropout": 0.2}
    teacher = build_network(config)
    torch.nn.init.ones_(teacher.get_parameter("out_gain"))
    net, _ = student_of(Model(teacher, config, {}), guidance_input=True, dropout=0.3)
    method = METHODS["scd_vsd"](
        net,
        teacher.eval().requires_grad_(False),
        0.5,
        (2, 4, 4),
        P_mean=-1.0,
        P_std=1.4,
        warmup=10,
        guidance=(1.0, 2.0),
    )
    values: dict[str, Any] = {
        "iterations": ITERATIONS,
        "batch": BATCH,
        "lr": 1e-2,
        "seed": 3,
        "schedule": Schedule("linear", ramp_up=4, start=0.3, final=0.03),
        "head_lr": 1e-2,
        "ema_sigma_rel": 0.1,
        "log_every": 4,
        "checkpoint_every": 5,
        **changes,
    }
    own = {**values, "seed": derive_seed(values["seed"], "fake"), "ema_sigma_rel": None}
    fake = method.companions["fake"]
    beside = {"fake": TrainState(fake.net, TrainSettings(**own), fake.heads)}
    return TrainState(net, TrainSettings(**values), method.heads, beside), method.objective, {"fake": fake.objective}


def result_of(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.tensors().items()}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    state, objective, others = run_of()
    return result_of(train(state, objective, data, companions=others))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("kills", [(1,), (5,), (8,), (3, 7, 12, 16)])
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, uninterrupted: dict[str, Tensor], kills: tuple[int, ...]
) -> None:
    """Student, F_φ, heads, both optimizers: the same bits after kills at any iteration."""
    store = CheckpointStore(tmp_path)
    for kill in kills:
        state, objective, others = run_of(sample_every=1)

        def sample(state: TrainState, kill: int = kill) -> None:
            if state.iteration == kill:
                raise Killed

        with pytest.raises(Killed):
            train(state, objective, data, store, Hooks(sample=sample, message=lambda text: None), others)
    state, objective, others = run_of()
    train(state, objective, data, store, Hooks(message=lambda text: None), others)
    assert_equal(result_of(state), uninterrupted)
    names = "".join(uninterrupted)
    assert all(part in names for part in ("companion/fake/net/", "companion/fake/logvar/", "vsd_logvar/"))
    assert any(name.startswith("companion/fake/optimizer/net/") for name in uninterrupted)
    assert state.companions["fake"].iteration == ITERATIONS


def test_killed_between_the_two_steps(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    """F_φ's step is applied, the student's is not: the checkpoint before both is what counts."""
    store = CheckpointStore(tmp_path)
    state, objective, others = run_of()

    def dying(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        if iteration == 8:
            raise Killed
        return objective(batch, generator, iteration)

    with pytest.raises(Killed):
        train(state, dying, data, store, companions=others)
    assert (state.iteration, state.companions["fake"].iteration) == (8, 9)
    state, objective, others = run_of()
    train(state, objective, data, store, Hooks(message=lambda text: None), others)
    assert_equal(result_of(state), uninterrupted)


def test_a_checkpoint_without_the_companion_does_not_fit() -> None:
    """Resumed as another method: the missing tensor is named."""
    state, _, _ = run_of()
    stored = {name: value for name, value in result_of(state).items() if not name.startswith("companion/")}
    with pytest.raises(CheckpointError, match=r"tensor 'companion/fake/.*' is missing"):
        state.restore(stored, {**state.meta(), "iteration": 1})


def test_the_streams_of_noise_differ() -> None:
    """The companion's generator and dropout masks are not the student's, at any step; each is a function of (seed, iteration)."""
    drawn: dict[str, list[tuple[float, float]]] = {"fake": [], "student": []}

    def spy(name: str, objective: Objective) -> Objective:
        def spied(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
            terms = objective(batch, generator, iteration)
            drawn[name].append((float(torch.rand(())), float(torch.rand((), generator=generator))))
            return terms

        return spied

    for _ in range(2):
        state, objective, others = run_of(iterations=5)
        train(state, spy("student", objective), data, None, None, {"fake": spy("fake", others["fake"])})
    assert drawn["fake"][:5] == drawn["fake"][5:]
    assert drawn["student"][:5] == drawn["student"][5:]
    values = [value for name in drawn for pair in drawn[name][:5] for value in pair]
    assert len(set(values)) == 20


def test_a_companion_needs_a_seed_of_its_own() -> None:
    """With the student's seed it would see the student's noise and masks: ValueError."""
    state, _, _ = run_of()
    with pytest.raises(ValueError, match=r"companions: expected seeds of their own.*seed 3"):
        TrainState(state.net, state.settings, state.heads, {"fake": TrainState(state.net, state.settings)})


def test_each_step_moves_its_own_network() -> None:
    """F_φ's step gives the student no gradient and moves no weight of it; the student's none of F_φ; the one comes before the other."""
    state, objective, others = run_of()
    state.train()
    fake = state.companions["fake"]
    order: list[str] = []

    def gradients(state: TrainState) -> list[Tensor]:
        return [p.grad.clone() for m in state.modules().values() for p in m.parameters() if p.grad is not None]

    def spy_fake(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        order.append("fake")
        terms = others["fake"](batch, generator, iteration)
        student = [p for module in state.modules().values() for p in module.parameters()]
        reached = torch.autograd.grad(terms.loss, student, allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in reached)
        terms.loss.register_hook(lambda gradient: order.append("fake backward"))
        return terms

    def spy(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        order.append("student")
        weights_of_fake.append({k: v.clone() for k, v in fake.tensors().items()})
        before.append(gradients(fake))
        return objective(batch, generator, iteration)

    weights_of_fake: list[dict[str, Tensor]] = []
    before: list[list[Tensor]] = []
    start = {name: p.detach().clone() for name, p in fake.net.named_parameters()}
    train_step(state, spy, data(0), {"fake": spy_fake})
    assert order == ["fake", "fake backward", "student"]
    assert any(not torch.equal(start[name], p) for name, p in fake.net.named_parameters())
    for name, value in fake.tensors().items():  # the student's backward and step changed nothing of F_φ
        assert torch.equal(value, weights_of_fake[0][name]), name
    assert before[0]
    assert all(torch.equal(a, b) for a, b in zip(before[0], gradients(fake), strict=True))
    assert gradients(state)


def test_what_is_logged_of_a_companion() -> None:
    """Its loss and scalars stand under its name beside the student's."""
    state, objective, others = run_of()
    state.train()
    terms = train_step(state, objective, data(0), others)
    assert {"fake/loss", "fake/velocity_error", "fake/grad_norm", "vsd_error", "vsd_logvar", "tangent_norm"} <= set(
        terms.scalars
    )
