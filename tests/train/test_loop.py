# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumption bit for bit, skipped steps, the order of the data, what is logged."""

import errno
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scm_core.data import BatchOrder
from scm_core.guidance import teacher_velocity
from scm_core.nn.build import Model, build_network, student_of
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch, Terms
from scm_core.objectives.consistency import ConsistencyObjective
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.train import checkpoint as checkpoint_module
from scm_core.train.checkpoint import CheckpointError, CheckpointStore
from scm_core.train.loop import Hooks, train
from scm_core.train.schedule import Schedule
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import Objective, train_step

CONFIG = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 2}
ITERATIONS = 23
BATCH = 6


class Killed(Exception):
    """Stands for the end of the process."""


def settings(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "iterations": ITERATIONS,
        "batch": BATCH,
        "lr": 1e-2,
        "seed": 3,
        "schedule": Schedule("linear", ramp_up=4, start=0.3, final=0.03),
        "head_lr": 1e-2,
        "ema_sigma_rel": 0.1,
        "log_every": 4,
        "checkpoint_every": 5,
        "sample_every": 3,
    }
    return TrainSettings(**{**values, **changes})  # type: ignore[arg-type]


def data(iteration: int) -> Batch:
    """Batches of ten samples that straddle epochs; a function of the iteration."""
    generator = torch.Generator().manual_seed(77)
    x0 = 0.5 * torch.randn(10, 2, 4, 4, generator=generator)
    indices = BatchOrder(10, BATCH, seed=1).indices(iteration)
    return Batch(x0[indices], indices % 3, indices)


def guided_distillation(**changes: object) -> tuple[TrainState, Objective]:
    """A whole sCD set-up in channels-last order: teacher, guidance, dropout, warmup, adaptive weighting."""
    torch.manual_seed(0)
    teacher = build_network(CONFIG)
    torch.nn.init.ones_(teacher.get_parameter("out_gain"))
    net, _ = student_of(Model(teacher, CONFIG, {}), guidance_input=True, dropout=0.3)
    assert net.get_parameter("blocks.0.conv0.weight").is_contiguous(memory_format=torch.channels_last)
    head = LogVarHead(math.log(32))
    velocity = teacher_velocity(teacher.eval(), 0.5)
    objective = ConsistencyObjective(net, head, velocity, 0.5, -1.0, 1.4, warmup=10, guidance=(1.0, 2.0))
    return TrainState(net, settings(**changes), {"logvar": head}), objective


def result_of(state: TrainState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.tensors().items()}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    state, objective = guided_distillation()
    return result_of(train(state, objective, data))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Network, average, optimizer and heads, bit for bit."""
    assert got.keys() == expected.keys()
    assert any(name.startswith("ema/") for name in got)
    assert any(name.startswith("logvar/") for name in got)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def logged(store: CheckpointStore | None, hooks: dict[int, dict[str, float]], kill: int | None = None) -> None:
    """Trains with a bad batch on the way; `hooks` gets the scalars by images seen, without the speed."""

    def at(iteration: int) -> Batch:
        batch = data(iteration)
        return batch._replace(x0=batch.x0 * float("nan")) if iteration == 8 else batch

    def log(nimg: int, scalars: dict[str, float]) -> None:
        hooks[nimg] = {key: value for key, value in scalars.items() if key != "images_per_second"}

    def sample(state: TrainState) -> None:
        if state.iteration == kill:
            raise Killed

    state, objective = guided_distillation(sample_every=1)
    train(state, objective, at, store, Hooks(log=log, sample=sample, message=lambda text: None))


@pytest.mark.parametrize("kill", [5, 11, 17])
def test_what_is_logged_does_not_depend_on_an_interruption(tmp_path: Path, kill: int) -> None:
    """Checkpoints every 5 steps lie in the middle of intervals of 4: means are over all of them, also those before the interruption, one of
    which was skipped (step 9, between the checkpoints 5 and 10)."""
    expected: dict[int, dict[str, float]] = {}
    logged(None, expected)
    assert len(expected) == 6
    assert {scalars["skipped_steps"] for scalars in expected.values()} == {0.0, 1.0}
    store, found = CheckpointStore(tmp_path), dict[int, dict[str, float]]()
    with pytest.raises(Killed):
        logged(store, found, kill)
    logged(store, found)
    assert found == expected


@pytest.mark.parametrize("kills", [(1,), (5,), (9,), (22,), (3, 7, 11, 16)])
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, uninterrupted: dict[str, Tensor], kills: tuple[int, ...]
) -> None:
    """Killed at any iteration, before the first checkpoint too, and started again: the same weights, bit for bit."""
    store = CheckpointStore(tmp_path)
    for kill in kills:
        state, objective = guided_distillation(sample_every=1)

        def sample(state: TrainState, kill: int = kill) -> None:
            if state.iteration == kill:
                raise Killed

        with pytest.raises(Killed):
            train(state, objective, data, store, Hooks(sample=sample, message=lambda text: None))
    state, objective = guided_distillation()
    messages: list[str] = []
    train(state, objective, data, store, Hooks(message=messages.append))
    last = max(kills) // 5 * 5
    assert messages == ([f"resumed from step-{last:08d}: {last} of 23 iterations"] if last else [])
    assert_equal(result_of(state), uninterrupted)
    assert state.nimg == ITERATIONS * BATCH


def test_killed_inside_a_step_or_a_write(
    tmp_path: Path, uninterrupted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between backward and the optimizer's step, or with a full disk: the resumed run ends with the same weights."""
    store = CheckpointStore(tmp_path)
    state, objective = guided_distillation()

    def dying(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        terms = objective(batch, generator, iteration)
        if iteration == 8:
            terms.loss.register_hook(lambda gradient: (_ for _ in ()).throw(Killed()))
        return terms

    with pytest.raises(Killed):
        train(state, dying, data, store)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    state, objective = guided_distillation()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_tensors", full)
        with pytest.raises(CheckpointError, match="No space left"):
            train(state, objective, data, store)
    assert 10 <= state.iteration <= 15  # said at a step after the one that wrote, at the next write at the latest
    state, objective = guided_distillation()
    train(state, objective, data, store)
    assert_equal(result_of(state), uninterrupted)


def test_a_damaged_checkpoint_costs_time_only(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    """From the checkpoint before a damaged one the run comes to the same weights."""
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, warn=warnings.append)
    state, objective = guided_distillation(sample_every=1)

    def stop(state: TrainState) -> None:
        if state.iteration == 15:
            raise Killed

    with pytest.raises(Killed):
        train(state, objective, data, store, Hooks(sample=stop))
    file = store.paths()[-1] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    state, objective = guided_distillation()
    train(state, objective, data, store)
    assert len(warnings) == 1
    assert_equal(result_of(state), uninterrupted)


def test_a_finished_run_does_nothing_more(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    """The last iteration is a checkpoint: another call trains no step."""
    store = CheckpointStore(tmp_path)
    state, objective = guided_distillation()
    train(state, objective, data, store)
    state, _ = guided_distillation()

    def never(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        raise AssertionError("trained a finished run")

    train(state, never, data, store)
    assert state.iteration == ITERATIONS
    assert_equal(result_of(state), uninterrupted)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    """Never silently from the start: CheckpointError with the tensor's name."""
    store = CheckpointStore(tmp_path)
    store.save(5, {"net/other": torch.zeros(1)}, {"nimg": 30, "skipped": 0, "skipped_in_a_row": 0})
    state, objective = guided_distillation()
    with pytest.raises(CheckpointError, match=r"step-00000005.*is missing"):
        train(state, objective, data, store)


def with_faults(objective: Objective, faults: set[int]) -> Objective:
    """The objective with a NaN loss at some iterations."""

    def faulty(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        terms = objective(batch, generator, iteration)
        return terms._replace(loss=terms.loss * math.nan) if iteration in faults else terms

    return faulty


def test_a_skipped_step_is_counted_and_said_and_shifts_no_data(tmp_path: Path) -> None:
    """NaN at two steps: they change no weight; the data of every iteration, its noise and the schedule are as without them."""

    def run(faults: set[int]) -> tuple[TrainState, list[list[int]], dict[int, Tensor], list[str]]:
        state, objective = guided_distillation(sample_every=1)
        seen: list[list[int]] = []
        weights: dict[int, Tensor] = {}
        messages: list[str] = []

        def spy(iteration: int) -> Batch:
            batch = data(iteration)
            seen.append(batch.indices.tolist())
            return batch

        def sample(state: TrainState) -> None:
            weights[state.iteration] = state.net.get_parameter("conv_in.weight").detach().clone()

        train(state, with_faults(objective, faults), spy, None, Hooks(sample=sample, message=messages.append))
        return state, seen, weights, messages

    clean, faulty = run(set()), run({7, 9})
    assert clean[1] == faulty[1]
    assert len(clean[1]) == ITERATIONS
    assert (faulty[0].skipped, faulty[0].nimg, faulty[0].iteration) == (2, ITERATIONS * BATCH, ITERATIONS)
    assert clean[0].skipped == 0
    assert torch.equal(clean[2][7], faulty[2][7])
    assert torch.equal(faulty[2][8], faulty[2][7])  # step number 7 was not applied
    assert not torch.equal(faulty[2][9], faulty[2][8])
    assert not clean[3]
    assert [text.split(":")[1] for text in faulty[3]] == [" iteration 7", " iteration 9"]
    assert all("not applied" in text and "at t = " in text for text in faulty[3])


def test_resumption_remembers_skipped_steps(tmp_path: Path) -> None:
    """With steps skipped on both sides of the interruption the resumed run is the uninterrupted one, counters too."""
    faults = {0, 1, 2, 3, 4, 12}
    reference, objective = guided_distillation()
    train(reference, with_faults(objective, faults), data, None, Hooks(message=lambda text: None))
    store = CheckpointStore(tmp_path)
    for kill in (5, 14, None):
        state, objective = guided_distillation(sample_every=1)

        def sample(state: TrainState, kill: int | None = kill) -> None:
            if state.iteration == kill:
                raise Killed

        hooks = Hooks(sample=sample, message=lambda text: None)
        if kill is None:
            train(state, with_faults(objective, faults), data, store, hooks)
        else:
            with pytest.raises(Killed):
                train(state, with_faults(objective, faults), data, store, hooks)
    assert state.skipped == reference.skipped == 6
    assert_equal(result_of(state), result_of(reference))


def test_what_is_logged() -> None:
    """Every `log_every` iterations and at the end: means over the applied steps since, by images seen; progress by iterations."""
    state, objective = guided_distillation()
    logged: list[tuple[int, dict[str, float]]] = []
    progress: list[int] = []
    hooks = Hooks(
        log=lambda nimg, scalars: logged.append((nimg, scalars)),
        progress=lambda iteration, scalars: progress.append(iteration),
        message=lambda text: None,
    )
    train(state, with_faults(objective, {5}), data, None, hooks)
    assert progress == [4, 8, 12, 16, 20, 23]
    assert [nimg for nimg, _ in logged] == [BATCH * iteration for iteration in progress]
    assert {"loss", "tangent_norm", "grad_norm", "logvar", "images_per_second", "skipped_steps"} <= logged[0][1].keys()
    assert [scalars["skipped_steps"] for _, scalars in logged] == [0, 1, 1, 1, 1, 1]
    assert all(math.isfinite(value) for _, scalars in logged for value in scalars.values())

    by_hand, objective = guided_distillation()
    by_hand.net.train()
    losses = [float(train_step(by_hand, objective, data(i)).loss) for i in range(4)]
    assert logged[0][1]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_the_caller_hears_where_a_run_goes_on(tmp_path: Path) -> None:
    """Before the first step: 0 for a new run, the checkpoint's iteration for a resumed one."""
    heard: list[tuple[str, int]] = []
    hooks = Hooks(
        start=lambda iteration: heard.append(("start", iteration)),
        progress=lambda iteration, scalars: heard.append(("progress", iteration)),
        message=lambda text: None,
    )
    state, objective = guided_distillation(iterations=10)
    train(state, objective, data, CheckpointStore(tmp_path), hooks)
    assert heard == [("start", 0), ("progress", 4), ("progress", 8), ("progress", 10)]
    heard.clear()
    state, objective = guided_distillation()
    train(state, objective, data, CheckpointStore(tmp_path), hooks)
    assert heard[:2] == [("start", 10), ("progress", 12)]


def test_samples_are_asked_for_at_their_times() -> None:
    """Every `sample_every` iterations counted from the start of the run; never when it is 0."""
    for every, expected in ((3, [3, 6, 9, 12, 15, 18, 21]), (0, [])):
        state, objective = guided_distillation(sample_every=every)
        times: list[int] = []
        record: Callable[[TrainState], None] = lambda state, times=times: times.append(state.iteration)  # noqa: E731
        train(state, objective, data, None, Hooks(sample=record))
        assert times == expected
    assert not state.net.training  # left in evaluation mode


def test_training_trains() -> None:
    """Data of a single image: the velocity error of the diffusion model falls far below that of an untrained one, σ_d²."""
    image = 0.5 * torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(5)).expand(16, 2, 4, 4)
    torch.manual_seed(0)
    net, head = build_network(CONFIG), LogVarHead(math.log(4))
    objective = DiffusionObjective(net, head, 0.5, -0.4, 1.2)
    errors: list[float] = []
    hooks = Hooks(log=lambda nimg, scalars: errors.append(scalars["velocity_error"]))
    state = TrainState(net, settings(iterations=150, lr=3e-2, log_every=15, sample_every=0), {"logvar": head})
    train(state, objective, lambda i: Batch(image, torch.zeros(16, dtype=torch.long), torch.arange(16)), None, hooks)
    assert errors[0] > 0.15
    assert errors[-1] < 0.1
