# SPDX-License-Identifier: Apache-2.0
"""The training loop: resume, step, log, checkpoint. The same for autoencoder, classifier, teacher and students."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from scm_core.objectives import Batch, Objective
from scm_core.train.checkpoint import CheckpointStore
from scm_core.train.state import TrainState
from scm_core.train.step import train_step

Scalars = dict[str, float]


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear of: `start(iteration)`, where the run begins or goes on; every `log_every` steps `log(nimg, scalars)`,
    with means over those of them that were applied, and `progress(iteration, scalars)`; `sample(state)` every `sample_every` steps;
    `message(text)`."""

    start: Callable[[int], None] = lambda iteration: None
    log: Callable[[int, Scalars], None] = lambda nimg, scalars: None
    progress: Callable[[int, Scalars], None] = lambda iteration, scalars: None
    sample: Callable[[TrainState], None] = lambda state: None
    message: Callable[[str], None] = print


def train(
    state: TrainState,
    objective: Objective,
    data: Callable[[int], Batch],
    store: CheckpointStore | None = None,
    hooks: Hooks | None = None,
    companions: Mapping[str, Objective] | None = None,
) -> TrainState:
    """Run `state` to the end of its settings, from the newest checkpoint of `store` if it has one; `companions` as in `train_step`.

    `data(iteration)` gives the batch of a step, a function of the iteration alone. An interrupted and resumed run ends
    with the weights of an uninterrupted one, bit for bit on one machine. Raises CheckpointError and NonFiniteError.
    """
    hooks, settings = hooks or Hooks(), state.settings
    if store is not None and (checkpoint := store.load()) is not None:
        state.restore(checkpoint.tensors, checkpoint.meta, str(checkpoint.path))
        hooks.message(f"resumed from {checkpoint.path.name}: {state.iteration} of {settings.iterations} iterations")
    hooks.start(state.iteration)
    sums: dict[str, torch.Tensor] = {}
    since, count, applied, skipped = time.perf_counter(), 0, 0, state.skipped
    state.train()
    while state.iteration < settings.iterations:
        terms = train_step(state, objective, data(state.iteration), companions)
        count += 1
        if not state.skipped_in_a_row:  # a mean of what was applied: one NaN would hide the others
            applied += 1
            for key, value in {"loss": terms.loss, **terms.scalars}.items():
                sums[key] = sums[key] + value if key in sums else value
        last = state.iteration == settings.iterations
        if state.iteration % settings.log_every == 0 or last:
            now = time.perf_counter()
            scalars = {key: float(total) / applied for key, total in sums.items()}
            scalars["images_per_second"] = count * settings.batch / (now - since)
            if state.skipped > skipped:
                hooks.message(
                    f"iteration {state.iteration}: {state.skipped - skipped} steps had a non-finite loss or gradient, not applied"
                )
            scalars["skipped_steps"] = float(state.skipped)
            hooks.log(state.nimg, scalars)
            hooks.progress(state.iteration, scalars)
            sums, count, applied, since, skipped = {}, 0, 0, now, state.skipped
        if store is not None and (state.iteration % settings.checkpoint_every == 0 or last):
            store.save(state.iteration, state.tensors(), state.meta())
        if settings.sample_every and state.iteration % settings.sample_every == 0:
            hooks.sample(state)
    state.train(False)
    return state
