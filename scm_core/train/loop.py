# SPDX-License-Identifier: Apache-2.0
"""The training loop: resume, step, log, checkpoint, stop. The same for autoencoder, classifier, teacher, students and F_φ."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scm_core.ema import save_snapshot
from scm_core.objectives import Batch, Objective, Terms
from scm_core.train.checkpoint import Checkpoint, CheckpointStore
from scm_core.train.distributed import Ranks, StopVote, synchronized
from scm_core.train.guard import settle
from scm_core.train.monitor import Monitor
from scm_core.train.resume import check_unchanged
from scm_core.train.signals import Stopped, StopRequest
from scm_core.train.state import TrainState
from scm_core.train.step import train_step

Scalars = dict[str, float]


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear of, on the first process: `start(iteration)`, where the run begins or goes on; every `log_every` steps
    `log(nimg, scalars)`, with means over those of them that were applied, and `progress(iteration, scalars)`; `sample(state)` every
    `sample_every` steps; `warn(nimg, text)` of what looks wrong; and, on every process, `message(text)`."""

    start: Callable[[int], None] = lambda iteration: None
    log: Callable[[int, Scalars], None] = lambda nimg, scalars: None
    progress: Callable[[int, Scalars], None] = lambda iteration, scalars: None
    sample: Callable[[TrainState], None] = lambda state: None
    warn: Callable[[int, str], None] = lambda nimg, text: print(f"warning: {text}", flush=True)
    message: Callable[[str], None] = print


@dataclass(frozen=True)
class Continuation:
    """What a run is made with (`identity`: settings, code), which its checkpoints must agree with unless `allow_changes`."""

    identity: Mapping[str, Any] = field(default_factory=dict)
    allow_changes: bool = False


def train(
    state: TrainState,
    objective: Objective,
    data: Callable[[int], Batch],
    store: CheckpointStore | None = None,
    hooks: Hooks | None = None,
    companions: Mapping[str, Objective] | None = None,
    stop: StopRequest | None = None,
    snapshots: Path | None = None,
    continuation: Continuation | None = None,
) -> TrainState:
    """Run `state` to the end of its settings, from the newest checkpoint of `store` if it has one; `companions` as in `train_step`.

    `data(iteration)` gives this process's part of a step's batch, a function of the iteration alone. An interrupted and resumed run ends
    with the weights of an uninterrupted one, bit for bit on one machine. Asked to stop on any process, all save at the same step and raise
    Stopped. The averages `settings.snapshots` are written to the folder `snapshots`.

    Raises CheckpointError for checkpoints that cannot be used or written, and NonFiniteError.
    """
    hooks, settings, ranks = hooks or Hooks(), state.settings, state.ranks
    continuation, monitor, vote = continuation or Continuation(), Monitor(), StopVote(ranks)
    if state.companions.keys() != (companions or {}).keys():
        raise ValueError(
            f"companions: expected objectives of {sorted(state.companions)}, got {sorted(companions or {})}"
        )
    with ExitStack() as stack:
        if store is not None and ranks.first:
            stack.enter_context(store.locked())
        interval = Interval()
        if store is not None:
            resume(state, store, monitor, interval, hooks, continuation)
        trained = synchronized(objective, state.modules(), ranks)
        beside = {
            name: synchronized(other, state.companions[name].modules(), ranks)
            for name, other in (companions or {}).items()
        }
        if ranks.first:
            hooks.start(state.iteration)
        interval.begin()
        state.train()
        while state.iteration < settings.iterations:
            interval.add(train_step(state, trained, data(state.iteration), beside))
            report_skipped(state, hooks)
            last = state.iteration == settings.iterations
            stopping = vote(stop is not None and stop.requested() is not None) and not last
            if state.iteration % settings.log_every == 0 or last:
                scalars = interval.close(state)
                if ranks.first:
                    for text in monitor.update(state.iteration, scalars):
                        hooks.warn(state.nimg, text)
                    hooks.log(state.nimg, scalars)
                    hooks.progress(state.iteration, scalars)
            if store is not None:
                if state.iteration % settings.checkpoint_every == 0 or last or stopping:
                    save(state, store, monitor, interval, continuation)
                store.check()
            if ranks.first and settings.snapshot_every and state.iteration % settings.snapshot_every == 0:
                write_snapshots(state, snapshots)
            if ranks.first and settings.sample_every and state.iteration % settings.sample_every == 0:
                hooks.sample(state)
            if stopping:
                if store is not None:
                    store.wait()
                ranks.wait()
                raise Stopped((stop.reason() if stop is not None else None) or "another process", state.iteration)
        if store is not None:
            store.wait()
    state.train(False)
    return state


def resume(
    state: TrainState,
    store: CheckpointStore,
    monitor: Monitor,
    interval: "Interval",
    hooks: Hooks,
    continuation: Continuation,
) -> None:
    """Take over the newest valid checkpoint, the same on every process: the first one looks for it."""
    ranks = state.ranks
    found: Checkpoint | None = store.load() if ranks.first else None
    path = ranks.agree(str(found.path) if found is not None else "")
    if not path:
        return
    if found is not None:
        source, identity = str(found.path), found.meta.get("identity", {})
        for change in check_unchanged(identity, continuation.identity, continuation.allow_changes, source):
            hooks.message(f"resumed with a change: {change}")
    checkpoint = found or store.read(Path(path))
    state.restore(checkpoint.tensors, checkpoint.meta, str(checkpoint.path))
    if "monitor" in checkpoint.meta:
        monitor.restore(checkpoint.meta["monitor"])
    interval.earlier = checkpoint.meta.get("interval", {})
    if ranks.first:
        hooks.message(
            f"resumed from {checkpoint.path.name}: {state.iteration} of {state.settings.iterations} iterations"
        )


def save(
    state: TrainState, store: CheckpointStore, monitor: Monitor, interval: "Interval", continuation: Continuation
) -> None:
    """Hand a checkpoint of the present state to the store, which writes it while training goes on."""
    settle(state)
    begun = interval.state(state.ranks)
    tensors = state.tensors()  # on every process: they may have parts of it
    if state.ranks.first:
        meta = {**state.meta(), "identity": dict(continuation.identity), "monitor": monitor.state(), "interval": begun}
        store.save_async(state.iteration, tensors, meta)


def write_snapshots(state: TrainState, folder: Path | None) -> None:
    """The averages that others can be reconstructed from, one file each."""
    if folder is None:
        raise ValueError(
            f"snapshots: expected a folder for the averages of every {state.settings.snapshot_every} iterations"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for width in state.settings.snapshots:
        path = folder / f"{state.nimg:012d}-{width}.safetensors"
        save_snapshot(path, state.nimg, width, state.averages[str(width)].state())


def report_skipped(state: TrainState, hooks: Hooks, name: str = "") -> None:
    """Say which steps were not applied, and why, as soon as that is known."""
    for text in state.descriptions:
        hooks.message(f"{name}not finite, step not applied: {text}")
    state.descriptions.clear()
    for other, companion in state.companions.items():
        report_skipped(companion, hooks, f"{other}: ")


class Interval:
    """The scalars of the steps since the last log, left on the device until they are asked for.

    A checkpoint in the middle of an interval keeps those that it has (`earlier`, by name), so that a resumed run logs what an uninterrupted
    one would have.
    """

    def __init__(self) -> None:
        self.terms: list[dict[str, torch.Tensor]] = []
        self.earlier: dict[str, list[float]] = {}
        self.since = time.perf_counter()

    def begin(self) -> None:
        """The clock starts."""
        self.since = time.perf_counter()

    def add(self, terms: Terms) -> None:
        """Another step."""
        self.terms.append({"loss": terms.loss, **terms.scalars})

    def state(self, ranks: Ranks) -> dict[str, list[float]]:
        """The scalars of each step so far by name, means over the processes: call it on every process."""
        table = {key: values.tolist() for key, values in self._table().items()}
        flat = ranks.mean({f"{key} {at}": value for key, values in table.items() for at, value in enumerate(values)})
        return {key: [flat[f"{key} {at}"] for at in range(len(values))] for key, values in table.items()}

    def _table(self) -> dict[str, torch.Tensor]:
        if not self.terms:
            return {key: torch.tensor(values) for key, values in self.earlier.items()}
        table = {key: torch.stack([one[key].float() for one in self.terms]).cpu() for key in self.terms[0]}
        if self.earlier.keys() == table.keys():  # others are of other settings
            table = {key: torch.cat([torch.tensor(self.earlier[key]), values]) for key, values in table.items()}
        return table

    def close(self, state: TrainState) -> Scalars:
        """Means over the steps that were applied (one NaN would hide the others) and over the processes; begins the next interval."""
        settle(state)
        count, table = len(self.terms), self._table()
        scalars = {}
        for key, values in table.items():
            owner = key.rpartition("/")[0]
            applied = table[f"{owner}/skipped" if owner else "skipped"] == 0
            if not key.endswith("skipped") and bool(applied.any()):
                scalars[key] = float(values[applied].double().mean())
        scalars = state.ranks.mean(scalars)
        scalars["skipped_steps"] = float(state.skipped)
        scalars |= {f"{name}/skipped_steps": float(other.skipped) for name, other in state.companions.items()}
        now = time.perf_counter()
        scalars["images_per_second"] = count * state.settings.batch / (now - self.since)
        self.terms, self.earlier, self.since = [], {}, now
        return scalars
