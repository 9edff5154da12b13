# SPDX-License-Identifier: Apache-2.0
"""Runs that are told to stop: all processes save at one step and end with the requeue status; started again, nothing is lost."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from scm_core.objectives import Batch, Objective, Terms
from scm_core.train import checkpoint as checkpoint_module
from scm_core.train.distributed import Ranks, connected
from scm_core.train.guard import NonFiniteError
from scm_core.train.loop import Hooks, train
from scm_core.train.signals import REQUEUE_STATUS, Stopped, StopRequest

AT = 6  # the step that is disturbed; checkpoints are due at 4 and 8


def quiet(**hooks: Any) -> Hooks:
    return Hooks(message=lambda text: None, **hooks)


def disturbed(objective: Objective, signals: tuple[int, ...]) -> Objective:
    """The objective of a process to which signals come in the middle of the tangent of step AT."""
    inner = objective.tangent  # type: ignore[attr-defined]

    def call(part: Batch, generator: torch.Generator, iteration: int) -> Terms:
        def tangent(net: Any, *arguments: Any) -> Any:
            def noisy(x: Any, t: Any) -> Any:
                for signum in signals if iteration == AT else ():
                    os.kill(os.getpid(), signum)
                return net(x, t)

            noisy.supports_dual = True  # type: ignore[attr-defined]
            return inner(noisy, *arguments)

        objective.tangent = tangent  # type: ignore[attr-defined]
        return objective(part, generator, iteration)

    return call


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM,),
        (signal.SIGUSR1,),
        (signal.SIGUSR2,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR2, signal.SIGTERM),
    ],
    ids=lambda signals: "+".join(signal.Signals(s).name for s in signals),
)
def test_in_the_middle_of_a_tangent(run: Any, trainer: Any, uninterrupted: Any, signals: tuple[int, ...]) -> None:
    """Once, twice, or two kinds: the step is finished, saved, and the process ends with the requeue status."""

    def stopped() -> None:
        state, objective = trainer()
        with pytest.raises(Stopped) as caught, StopRequest() as stop:
            train(state, disturbed(objective, signals), run.data, run.store(), quiet(), stop=stop)
        assert caught.value.iteration == AT + 1
        assert caught.value.reason == signal.Signals(signals[0]).name
        os._exit(REQUEUE_STATUS)

    began = time.monotonic()
    assert run.wait_for(run.fork(stopped)) == REQUEUE_STATUS
    assert time.monotonic() - began < 10
    assert [path.name for path in run.store().paths()] == ["step-00000004", "step-00000007"]
    assert run.wait_for(run.fork(run.go)) == 0
    assert min(run.steps()) == AT + 1  # it goes on where it was
    assert_same_result(run, uninterrupted)


def assert_same_result(run: Any, uninterrupted: Any) -> None:
    """The end of the uninterrupted run; the first attempt's steps were not recorded."""
    result = run.result()
    assert all(torch.equal(result[name], value) for name, value in uninterrupted.result.items())


def test_during_a_save(run: Any, trainer: Any, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while a checkpoint is being written: both that one and the one at the stop are valid."""
    write = checkpoint_module.write_tensors

    def interrupted(*arguments: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    def stopped() -> None:
        monkeypatch.setattr(checkpoint_module, "write_tensors", interrupted)
        state, objective = trainer()
        with pytest.raises(Stopped) as caught, StopRequest() as stop:
            train(state, objective, run.data, run.store(), quiet(), stop=stop)
        assert 4 <= caught.value.iteration <= 8
        os._exit(REQUEUE_STATUS)

    assert run.wait_for(run.fork(stopped)) == REQUEUE_STATUS
    assert run.store().load() is not None
    assert run.wait_for(run.fork(run.go)) == 0
    assert_same_result(run, uninterrupted)


def shared(
    ranks: Ranks, trainer: Any, run: Any, objective_of: Callable[[Objective], Objective] = lambda o: o
) -> tuple[list[list[int]], list[float], str]:
    """Train as one of several processes: the indices of each step, this process's losses, and how it ended."""
    state, objective = trainer()
    state.ranks = ranks
    inner, order, losses = objective_of(objective), [], []

    def recorded(part: Batch, generator: torch.Generator, iteration: int) -> Terms:
        terms = inner(part, generator, iteration)
        order.append(part.indices.tolist())
        losses.append(terms.loss.item())
        return terms

    try:
        with StopRequest() as stop:
            train(state, recorded, lambda i: part_of(run.data(i), ranks), run.store(), quiet(), stop=stop)
    except Stopped as error:
        return order, losses, f"stopped at {error.iteration} by {error.reason}"
    return order, losses, "done"


@pytest.mark.parametrize("told", [0, 1], ids=["the first process is told", "the second process is told"])
def test_one_process_is_told_and_all_stop(processes: Any, run: Any, trainer: Any, told: int) -> None:
    """SIGUSR2 to one of two processes, twice: both stop at the same step, with one valid checkpoint of it; then 4 processes go on with
    the same data in the same order."""

    def two(rank: int) -> Any:
        with connected() as ranks:
            signals = (signal.SIGUSR2, signal.SIGUSR2) if rank == told else ()
            return shared(ranks, trainer, run, lambda objective: disturbed(objective, signals))

    began = time.monotonic()
    first = processes(two, 2)
    assert time.monotonic() - began < 10
    stops = {ended.split(" by ")[0] for _, _, ended in first}
    assert len(stops) == 1
    at = int(stops.pop().removeprefix("stopped at "))
    assert at in (AT + 1, AT + 2)
    newest = run.store().load()
    assert newest is not None
    assert newest.meta["iteration"] == at

    def four(rank: int) -> Any:
        with connected() as ranks:
            state, _ = trainer()
            assert len(run.data(0).indices) % ranks.count == 0
            return shared(ranks, trainer, run), state.settings.iterations

    second = processes(four, 4)
    iterations = second[0][1]
    assert all(ended == "done" for (_, _, ended), _ in second)
    for step in range(iterations):
        parts = (
            [order[step] for order, _, _ in first] if step < at else [order[step - at] for (order, _, _), _ in second]
        )
        assert [index for part in parts for index in part] == run.data(step).indices.tolist()


def test_the_losses_of_several_processes_are_those_of_one(processes: Any, new_run: Any, trainer: Any) -> None:
    """Through the whole loop, with a stop and a resume from 2 to 4 processes: the loss curve of one process to 1e-5 (without dropout)."""

    def without_dropout() -> Any:
        state, objective = trainer()
        for module in state.net.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
        return state, objective

    alone, together = new_run(), new_run()
    _, expected, ended = shared(Ranks(), without_dropout, alone)
    assert ended == "done"

    def body(rank: int, signals: tuple[int, ...]) -> Any:
        with connected() as ranks:
            return shared(ranks, without_dropout, together, lambda objective: disturbed(objective, signals))

    first = processes(lambda rank: body(rank, (signal.SIGTERM,) if rank else ()), 2)
    second = processes(lambda rank: body(rank, ()), 4)
    before = len(first[0][1])
    losses = [sum(own[step] for _, own, _ in first) / 2 for step in range(before)]
    losses += [sum(own[step] for _, own, _ in second) / 4 for step in range(len(expected) - before)]
    assert losses == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_a_time_budget(run: Any, trainer: Any) -> None:
    """Spent before the end: saved and stopped, for that reason."""
    state, objective = trainer()
    with pytest.raises(Stopped, match="time budget") as caught, StopRequest(budget_s=1e-9) as stop:
        train(state, objective, run.data, run.store(), quiet(), stop=stop)
    assert caught.value.iteration == 1
    newest = run.store().load()
    assert newest is not None
    assert newest.meta["iteration"] == 1


def test_nothing_finite_stops_every_process(processes: Any, run: Any, trainer: Any) -> None:
    """NaN on one process at every step: both give up at the same step, with an explanation, and the step is in no checkpoint as applied."""

    def body(rank: int) -> str:
        with connected() as ranks:

            def poison(objective: Objective) -> Objective:
                def call(part: Batch, generator: torch.Generator, iteration: int) -> Terms:
                    terms = objective(part, generator, iteration)
                    return terms._replace(loss=terms.loss * float("nan")) if rank else terms

                return call

            state, objective = trainer()
            state.ranks = ranks
            object.__setattr__(state.settings, "patience", 5)
            try:
                train(state, poison(objective), lambda i: part_of(run.data(i), ranks), run.store(), quiet())
            except NonFiniteError as error:
                return f"{state.iteration}: {error}"
            return "trained"

    first, second = processes(body, 2)
    assert first.startswith("5: iteration 4: loss ")
    assert second.startswith("5: iteration 4: loss nan")
    assert "5 steps in a row were not finite" in first


def part_of(whole: Batch, ranks: Ranks) -> Batch:
    """A process's part."""
    return whole.part(*ranks.share(len(whole.indices)))
