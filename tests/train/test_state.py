# SPDX-License-Identifier: Apache-2.0
"""The state of a training run: what is stored, what fits, and what a step may change."""

import math

import pytest
import torch
from torch import Tensor, nn

from scm_core.nn.build import build_network
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch, Terms
from scm_core.train.checkpoint import CheckpointError
from scm_core.train.guard import NonFiniteError
from scm_core.train.schedule import Schedule
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import train_step

CONFIG = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 1}
BATCH = Batch(torch.ones(4, 2, 4, 4), torch.zeros(4, dtype=torch.long), torch.arange(4))


def settings(**changes: object) -> TrainSettings:
    return TrainSettings(
        **{"iterations": 10, "batch": 4, "lr": 1e-2, "seed": 0, "ema_sigma_rel": 0.1, "head_lr": 1e-3, **changes}  # type: ignore[arg-type]
    )


def fresh(width: int = 8, seed: int = 0, **changes: object) -> TrainState:
    torch.manual_seed(seed)
    net = build_network({**CONFIG, "width": width})
    torch.nn.init.ones_(net.get_parameter("out_gain"))
    return TrainState(net, settings(**changes), {"logvar": LogVarHead(0.0)})


def objective_of(state: TrainState, factor: float = 1.0):  # type: ignore[no-untyped-def]
    def objective(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        t = torch.rand(len(batch.x0), generator=generator)
        F = state.net(batch.x0, t, batch.labels)
        return Terms(factor * ((F - 1).square().mean() + state.heads["logvar"](t).square().sum() + 0.1), {})

    return objective


def copy_of(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.tensors().items()}


def test_everything_is_stored_by_name() -> None:
    """Weights, both moments and the step of every parameter, and the average: restored into a fresh state, all are equal."""
    state = fresh()
    for _ in range(3):
        train_step(state, objective_of(state), BATCH)
    stored, meta = copy_of(state), {**state.meta(), "iteration": state.iteration}
    for name, _ in state.net.named_parameters():
        assert {f"net/{name}", f"ema/result/{name}", f"optimizer/net/{name}/exp_avg"} <= stored.keys()
    assert "optimizer/logvar/bias/exp_avg_sq" in stored
    other = fresh(seed=1)
    other.restore(stored, meta)
    restored = other.tensors()
    assert restored.keys() == stored.keys()
    assert all(torch.equal(restored[name], stored[name]) for name in stored)
    assert (other.iteration, other.nimg, other.skipped) == (3, 12, 0)
    for a, b in zip(state.net.parameters(), other.net.parameters(), strict=True):
        assert a.stride() == b.stride()  # channels-last stays channels-last
    for s in (state, other):
        train_step(s, objective_of(s), BATCH)
    assert all(torch.equal(a, b) for a, b in zip(copy_of(state).values(), copy_of(other).values(), strict=True))


@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_without_any_applied_step_can_be_stored(steps: int) -> None:
    """Before the first step, or when all steps so far were skipped, there is a checkpoint all the same."""
    state = fresh()
    for _ in range(steps):
        train_step(state, objective_of(state, math.nan), BATCH)
    other = fresh(seed=1)
    other.restore(copy_of(state), {**state.meta(), "iteration": state.iteration})
    for s in (state, other):
        train_step(s, objective_of(s), BATCH)
    assert all(torch.equal(a, b) for a, b in zip(copy_of(state).values(), copy_of(other).values(), strict=True))
    assert other.skipped == steps


def test_parameters_without_gradient_can_be_stored() -> None:
    """A parameter that the loss does not reach (here the head's) is stored and restored like the others."""

    def blind(s: TrainState):  # type: ignore[no-untyped-def]
        return lambda batch, generator, iteration: Terms(s.net(batch.x0, torch.ones(4)).square().mean(), {})

    state, other = fresh(), fresh(seed=1)
    train_step(state, blind(state), BATCH)
    other.restore(copy_of(state), {**state.meta(), "iteration": state.iteration})
    assert torch.equal(other.heads["logvar"].get_parameter("bias"), state.heads["logvar"].get_parameter("bias"))


def test_what_does_not_fit_is_named() -> None:
    """A tensor missing, too many, or of another shape: CheckpointError with its name and the file, and nothing is changed."""
    state = fresh()
    train_step(state, objective_of(state), BATCH)
    stored, meta = copy_of(state), {**state.meta(), "iteration": 1}
    other = fresh(seed=1)
    before = copy_of(other)
    missing = {name: value for name, value in stored.items() if name != "net/conv_in.weight"}
    with pytest.raises(CheckpointError, match=r"step-1: tensor 'net/conv_in.weight' is missing \(1 in all\)"):
        other.restore(missing, meta, "step-1")
    with pytest.raises(CheckpointError, match=r"step-1: tensor 'net/surplus' is unknown here \(1 in all\)"):
        other.restore({**stored, "net/surplus": torch.zeros(1)}, meta, "step-1")
    wrong = {**stored, "ema/result/conv_out.weight": torch.zeros(3)}
    with pytest.raises(
        CheckpointError, match=r"'ema/result/conv_out.weight' has shape \(3,\), expected \(8, 8, 3, 3\)"
    ):
        other.restore(wrong, meta, "step-1")
    after = copy_of(other)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match="has shape"):
        fresh(width=16).restore(stored, meta, "step-1")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_but_the_counters(kind: str) -> None:
    """NaN loss, or a finite loss with an infinite gradient: not applied, counted; images count as seen."""
    state = fresh()
    train_step(state, objective_of(state), BATCH)
    before = copy_of(state)

    def infinite_gradient(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        return Terms(torch.sqrt(state.net.get_parameter("out_gain") * 0), {})

    terms = train_step(state, objective_of(state, math.nan) if kind == "loss" else infinite_gradient, BATCH)
    assert bool(torch.isfinite(terms.loss)) == (kind == "gradient")
    after = copy_of(state)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (state.iteration, state.nimg, state.skipped, state.skipped_in_a_row) == (2, 8, 1, 1)
    train_step(state, objective_of(state), BATCH)
    assert (state.skipped, state.skipped_in_a_row) == (1, 0)
    assert not torch.equal(before["net/conv_in.weight"], state.net.get_parameter("conv_in.weight"))


def test_patience() -> None:
    """`patience` non-finite steps in a row stop the run with the reason; single ones in between do not."""
    state = fresh(patience=3)
    for factor in (math.nan, math.nan, 1.0, math.inf, math.nan):
        train_step(state, objective_of(state, factor), BATCH)
    with pytest.raises(NonFiniteError, match=r"iteration 5: loss nan.*samples \[0, 1, 2, 3\].*3 steps in a row"):
        train_step(state, objective_of(state, math.nan), BATCH)


def test_the_schedule_scales_both_rates() -> None:
    """The network's and the heads' rate are their reference times the schedule's factor of the iteration."""
    state = fresh(schedule=Schedule("linear", ramp_up=2, start=0.5, final=0.0))
    rates = []
    for _ in range(8):
        train_step(state, objective_of(state), BATCH)
        rates.append([group["lr"] for group in state.optimizer.param_groups])
    for iteration, expected in {0: 0.5, 1: 1.0, 5: 1.0, 6: 0.8, 7: 0.6}.items():
        assert rates[iteration] == pytest.approx([1e-2 * expected, 1e-3 * expected])


def test_weights_are_normalised_after_each_step() -> None:
    """Forced weight normalisation: rows of unit RMS after the optimizer's step."""
    state = fresh(lr=0.3)
    train_step(state, objective_of(state), BATCH)
    rows = state.net.get_parameter("conv_in.weight").detach().flatten(1)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(8), rtol=1e-5, atol=0)


def test_the_step_is_adams() -> None:
    """One step of the first and second moments equals torch's plain Adam on the same gradient."""
    torch.manual_seed(0)
    net, reference = nn.Linear(3, 1), nn.Linear(3, 1)
    reference.load_state_dict(net.state_dict())
    state = TrainState(net, settings(ema_sigma_rel=None, head_lr=None, betas=(0.8, 0.95), eps=1e-3))
    adam = torch.optim.Adam(reference.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-3, fused=False)
    x = torch.randn(4, 3)
    for _ in range(5):
        train_step(state, lambda *_: Terms(net(x).square().sum(), {}), BATCH)
        adam.zero_grad()
        reference(x).square().sum().backward()
        adam.step()
    torch.testing.assert_close(net.weight, reference.weight, rtol=1e-5, atol=1e-6)


def test_randomness_is_a_function_of_seed_and_iteration() -> None:
    """What the global generator did before a step does not matter; the iteration does."""
    drawn: list[tuple[float, float]] = []
    state = fresh()

    def spy(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        drawn.append((float(torch.rand(())), float(torch.rand((), generator=generator))))
        return objective_of(state)(batch, generator, iteration)

    for iteration in (0, 0, 1):
        torch.rand(7)
        state.iteration = iteration
        train_step(state, spy, BATCH)
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]
