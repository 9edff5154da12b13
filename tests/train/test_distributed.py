# SPDX-License-Identifier: Apache-2.0
"""Several processes, or one that takes its batch in parts, make the same training: order, losses, updates, guard."""

import math
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm_core.data import BatchOrder
from scm_core.nn.build import Model, build_network, student_of
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch, Objective, Terms
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.objectives.methods import METHODS
from scm_core.train.distributed import SINGLE, Ranks, connected, synchronized
from scm_core.train.precision import LossScale, Scaling
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import train_step

CONFIG = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 1}
SIGMA_DATA, STEPS, BATCH, COUNT = 0.5, 6, 8, 20
METHOD = {
    "scd": {"P_mean": -1.0, "P_std": 1.4, "warmup": 4, "guidance": (1.0, 2.0)},
    "dsct": {"P_mean": -1.0, "P_std": 1.4, "warmup": 4, "intervals": 16},
    "scd_vsd": {"P_mean": -1.0, "P_std": 1.4, "warmup": 4, "guidance": (1.0, 2.0)},
}
X0 = torch.randn(COUNT, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * SIGMA_DATA
LABELS = torch.arange(COUNT) % 3


def batch(iteration: int) -> Batch:
    """The whole batch of a step."""
    indices = BatchOrder(COUNT, BATCH, 0).indices(iteration)
    return Batch(X0[indices], LABELS[indices], indices)


def share(ranks: Ranks, whole: Batch) -> Batch:
    """A process's part of a batch."""
    return whole.part(*ranks.share(len(whole.indices)))


def make(
    method: str, ranks: Ranks, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[TrainState, Objective, dict[str, Objective]]:
    """A teacher's or a student's training, the same on every process."""
    torch.manual_seed(1)
    net = build_network(CONFIG).to(dtype)
    nn.init.ones_(net.get_parameter("out_gain"))
    values = {"iterations": STEPS, "batch": BATCH, "lr": 1e-2, "seed": 0, "ema_sigma_rel": 0.1, **changes}
    if method == "diffusion":
        head = LogVarHead(0.0).to(dtype)
        state = TrainState(net, TrainSettings(**values), {"logvar": head}, ranks=ranks)
        return state, DiffusionObjective(net, head, SIGMA_DATA, -0.4, 1.2, label_dropout=0.3), {}
    teacher = Model(net.eval().requires_grad_(False), CONFIG, {})
    options = METHOD[method]
    student = student_of(teacher, guidance_input="guidance" in options, dropout=0.0)[0].to(dtype)
    made = METHODS[method](student, teacher.net, SIGMA_DATA, (2, 4, 4), **options)
    for module in (*made.heads.values(), *(m for c in made.companions.values() for m in (c.net, *c.heads.values()))):
        module.to(dtype)
    own = {**values, "seed": 1, "ema_sigma_rel": None}
    beside = {k: TrainState(c.net, TrainSettings(**own), c.heads, ranks=ranks) for k, c in made.companions.items()}
    state = TrainState(student, TrainSettings(**values), made.heads, beside, ranks)
    return state, made.objective, {k: c.objective for k, c in made.companions.items()}


def run(method: str, ranks: Ranks, **changes: Any) -> tuple[list[list[int]], list[dict[str, float]], dict[str, Tensor]]:
    """Sample indices and scalars of every step, and the state's tensors at the end."""
    state, objective, companions = make(method, ranks, **changes)
    wrapped = synchronized(objective, state.modules(), ranks)
    beside = {k: synchronized(o, state.companions[k].modules(), ranks) for k, o in companions.items()}
    order, scalars = [], []
    state.train()
    for iteration in range(STEPS):
        part = share(ranks, batch(iteration))
        terms = train_step(state, wrapped, part, beside)
        order.append(part.indices.tolist())
        scalars.append({"loss": float(terms.loss), **{k: float(v) for k, v in terms.scalars.items()}})
    return order, scalars, {k: v.clone() for k, v in state.tensors().items()}


@pytest.mark.parametrize("method", ["diffusion", "scd", "dsct", "scd_vsd"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_order_and_the_losses(processes: Any, method: str, count: int) -> None:
    """1, 2 and 4 processes: the same samples in the same order, and the same loss curve to 1e-5."""
    alone_order, alone, tensors = run(method, SINGLE)

    def body(rank: int) -> Any:
        with connected() as ranks:
            return run(method, ranks)

    results = processes(body, count)
    for step in range(STEPS):
        assert [i for order, _, _ in results for i in order[step]] == alone_order[step]
        for key in ("loss", *(k for k in alone[step] if k.endswith("/loss"))):
            mean = math.fsum(scalars[step][key] for _, scalars, _ in results) / count
            assert mean == pytest.approx(alone[step][key], abs=1e-5, rel=1e-5)
        assert results[0][1][step]["grad_norm"] == pytest.approx(alone[step]["grad_norm"], rel=1e-4)
    for other in results[1:]:  # every process has the same weights, bit for bit
        assert all(torch.equal(results[0][2][key], other[2][key]) for key in tensors)


@pytest.mark.parametrize("method", ["diffusion", "scd", "scd_vsd"])
def test_accumulation_gives_the_same_update(method: str) -> None:
    """A batch in 4 parts: the same losses, and updates that differ by 1e-6 of the learning rate at most in float64.

    (In float32 Adam divides a gradient near zero by its own rounding error, in one process as in several.)
    """
    _, whole, _ = run(method, SINGLE)
    _, parts, _ = run(method, SINGLE, accumulation=4)
    for a, b in zip(whole, parts, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5, abs=1e-5)
    wide = Batch(X0[:BATCH].double(), LABELS[:BATCH], torch.arange(BATCH))
    updates = {}
    for accumulation in (1, 4):
        state, objective, companions = make(method, SINGLE, torch.float64, accumulation=accumulation)
        before = [p.detach().clone() for p in state.net.parameters()]
        train_step(state, objective, wide, companions)
        updates[accumulation] = [p.detach() - b for p, b in zip(state.net.parameters(), before, strict=True)]
    assert max(float(a.abs().max()) for a in updates[1]) > 5e-3
    for a, b in zip(updates[1], updates[4], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)  # the rate is 1e-2


def test_accumulation_and_processes_together(processes: Any) -> None:
    """2 processes with 2 parts each: the losses of one process with one part."""
    _, alone, _ = run("scd", SINGLE)

    def body(rank: int) -> Any:
        with connected() as ranks:
            return run("scd", ranks, accumulation=2)[1]

    results = processes(body, 2)
    for step in range(STEPS):
        assert sum(r[step]["loss"] for r in results) / 2 == pytest.approx(alone[step]["loss"], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_a_sharded_optimizer_makes_the_same_steps(processes: Any, optimizer: str) -> None:
    """ZeRO: each process has a part of the moments, the steps are the same bit for bit, and the first one's tensors are whole."""

    def body(rank: int) -> Any:
        with connected() as ranks:
            whole = run("diffusion", ranks, optimizer=optimizer)[2]
            state, *_ = make("diffusion", ranks, optimizer=optimizer, shard_optimizer=True)
            own = sum(len(group["params"]) for group in state.optimizer.optim.param_groups)  # type: ignore[attr-defined]
            return whole, run("diffusion", ranks, optimizer=optimizer, shard_optimizer=True)[2], own

    (whole, sharded, own), (_, _, other) = processes(body, 2)
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[key], sharded[key]) for key in whole)
    parameters = sum(key.endswith("exp_avg") for key in whole)
    assert own + other == parameters
    assert 0 < own < parameters


def test_a_sharded_state_is_restored_by_another_number_of_processes(processes: Any) -> None:
    """From 2 processes with shared-out moments to 1, and from 1 to 2: the next step is the same."""

    def two(rank: int) -> Any:
        with connected() as ranks:
            state, objective, _ = make("diffusion", ranks, shard_optimizer=True)
            wrapped = synchronized(objective, state.modules(), ranks)
            for iteration in range(3):
                train_step(state, wrapped, share(ranks, batch(iteration)))
            stored = {k: v.clone() for k, v in state.tensors().items()}, {**state.meta(), "iteration": 3}
            again, objective, _ = make("diffusion", ranks, shard_optimizer=True)
            box = [stored]
            torch.distributed.broadcast_object_list(box, src=0, group=ranks.host)
            again.restore(*box[0])
            train_step(again, synchronized(objective, again.modules(), ranks), share(ranks, batch(3)))
            return stored, again.tensors()

    (stored, after), _ = processes(two, 2)
    state, objective, _ = make("diffusion", SINGLE)
    state.restore(*stored)
    train_step(state, objective, batch(3))
    for key, value in state.tensors().items():
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["loss", "tangent", "gradient"])
def test_nan_on_one_process_is_applied_by_none(processes: Any, where: str) -> None:
    """NaN in loss, tangent or gradient of process 1 at step 2: no weight, moment or average changes anywhere, and both count it."""

    def body(rank: int) -> Any:
        with connected() as ranks:
            state, objective, _ = make("scd", ranks)
            if rank == 1:
                objective = poisoned(objective, state, where, at=2)
            wrapped, seen = synchronized(objective, state.modules(), ranks), []
            for iteration in range(4):
                train_step(state, wrapped, share(ranks, batch(iteration)))
                seen.append(
                    ({k: v.clone() for k, v in state.tensors().items()}, state.skipped, list(state.descriptions))
                )
            return seen

    for rank, seen in enumerate(processes(body, 2)):
        assert [skipped for _, skipped, _ in seen] == [0, 0, 1, 1]
        assert all(torch.equal(seen[1][0][key], seen[2][0][key]) for key in seen[1][0])
        assert not torch.equal(seen[2][0]["net/conv_in.weight"], seen[3][0]["net/conv_in.weight"])
        if rank == 1 and where != "gradient":
            assert "iteration 2" in seen[2][2][0]


def poisoned(objective: Any, state: TrainState, where: str, at: int) -> Objective:
    """The objective with a NaN in its loss (by addition: its gradient stays finite), its tangent or its gradient at a step."""
    inner = objective.tangent
    now = [0]

    def tangent(*arguments: Any) -> Any:
        result = inner(*arguments)
        return result._replace(g=result.g * math.nan) if where == "tangent" and now[0] == at else result

    objective.tangent = tangent

    def call(part: Batch, generator: torch.Generator, iteration: int) -> Terms:
        now[0] = iteration
        terms = objective(part, generator, iteration)
        if iteration != at or where == "tangent":
            return terms
        if where == "loss":
            return terms._replace(loss=terms.loss + math.nan)
        gain = state.net.get_parameter("out_gain")
        return terms._replace(
            loss=terms.loss + torch.sqrt((gain - gain.detach()).abs())
        )  # 0, with an infinite derivative

    return call


def test_a_dead_process_stops_the_others(processes: Any) -> None:
    """A process that dies within a step: the other ends non-zero, long before the timeout of a collective that nobody joins."""

    def body(rank: int) -> None:
        with connected(timeout_s=20) as ranks:
            state, objective, _ = make("diffusion", ranks)
            wrapped = synchronized(objective, state.modules(), ranks)
            for iteration in range(STEPS):
                if rank == 1 and iteration == 2:
                    os._exit(9)
                train_step(state, wrapped, share(ranks, batch(iteration)))

    began = time.monotonic()
    started = processes.start(body, 2)
    for process in started:
        process.join(40)
    assert started[1].exitcode == 9
    assert started[0].exitcode == 1
    assert time.monotonic() - began < 30


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    """9 samples for 2 processes, or in 2 parts: a ValueError that names both numbers."""
    odd = Batch(torch.zeros(9, 2, 4, 4), None, torch.arange(9))
    with pytest.raises(ValueError, match="batch: expected a multiple of the 2 processes, got 9"):
        Ranks(0, 2).share(9)
    state, objective, _ = make("diffusion", SINGLE, accumulation=2)
    with pytest.raises(ValueError, match="accumulation: expected a divisor of the 9 samples of a process, got 2"):
        train_step(state, objective, odd)


def test_the_scaler_recovers_from_an_overflow() -> None:
    """fp16 gradients that overflow at the start: the scale halves until they do not, then steps are applied, and it grows again."""
    scaling = Scaling(start=2.0**24, interval=3)
    state, _, _ = make("diffusion", SINGLE, loss_scaling=scaling)
    weight = state.net.get_parameter("out_gain")

    def half(part: Batch, generator: torch.Generator, iteration: int) -> Terms:
        return Terms(
            (weight.half() * torch.ones((), dtype=torch.float16) * 0.5).float().sum(), {}
        )  # 2^16 is beyond fp16

    before, scales = weight.detach().clone(), []
    for iteration in range(12):
        train_step(state, half, batch(iteration))
        assert state.loss_scale is not None
        scales.append(math.log2(float(state.loss_scale.scale)))
    assert scales == [23, 22, 21, 20, 19, 18, 17, 16, 15, 15, 15, 16]  # the last three are finite
    assert state.skipped == 9
    assert not torch.equal(before, weight.detach())


def test_scaled_gradients_are_the_unscaled_ones() -> None:
    """A power of two comes out again exactly: the same weights, bit for bit."""
    _, _, plain = run("diffusion", SINGLE)
    _, _, scaled = run("diffusion", SINGLE, loss_scaling=Scaling(start=2.0**10))
    assert all(torch.equal(plain[key], scaled[key]) for key in plain)


def test_the_scale_is_the_published_rule() -> None:
    """Halved at each overflow, doubled after `interval` good steps in a row, within its bounds."""
    scale = LossScale(Scaling(start=4.0, interval=2, smallest=1.0, largest=8.0), torch.device("cpu"))
    found = [0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0]
    seen = []
    for flag in found:
        scale.update(torch.tensor(flag))
        seen.append(float(scale.scale))
    assert seen == [4, 8, 8, 8, 4, 4, 2, 1, 1, 1, 1, 2]


def test_a_masked_update_is_the_update_or_nothing() -> None:
    """What a GPU runs without asking the host: equal to the plain update where all is finite, and no change at all where not."""
    from scm_core.train.update import apply_update, masked_update

    states = []
    for update, found in ((apply_update, 0), (masked_update, 0), (masked_update, 1)):
        state, objective, _ = make("diffusion", SINGLE)
        train_step(state, objective, batch(0))
        before = {k: v.clone() for k, v in state.tensors().items()}
        torch.manual_seed(3)
        for parameter in state.net.parameters():
            parameter.grad = torch.randn_like(parameter)
        if found:
            parameter.grad.fill_(math.nan)
        state.nimg, state.unaveraged = 16, 8
        update(state, torch.tensor(found))
        states.append((before, state.tensors()))
    (_, plain), (_, masked), (before, kept) = states
    for key in plain:
        torch.testing.assert_close(masked[key], plain[key], rtol=1e-6, atol=1e-7)
        assert torch.equal(kept[key], before[key]), key
