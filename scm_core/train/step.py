# SPDX-License-Identifier: Apache-2.0
"""One training step: loss, gradient, guard, optimizer, forced weight normalisation, average."""

from collections.abc import Mapping

import torch
from torch import Tensor

from scm_core.nn.layers import project_gradients
from scm_core.objectives import Batch, Objective, Terms
from scm_core.train.gradient import gradient
from scm_core.train.guard import settle, verdict
from scm_core.train.state import TrainState
from scm_core.train.update import apply_update, set_learning_rate


def train_step(
    state: TrainState,
    objective: Objective,
    batch: Batch,
    companions: Mapping[str, Objective] | None = None,
) -> Terms:
    """Step number `state.iteration` on this process's part of its batch. Its randomness is a function of (seed, iteration) and of a
    sample's place in the batch alone; dropout's, of the place of the first sample of each part.

    The state's companions make a step of their own first, with their objectives in `companions`.
    A step whose loss or gradient is not finite on any process changes no weight and no average; it is counted, and `patience` of them in a
    row raise NonFiniteError. The images count as seen either way, so that the order of the data does not depend on the guard.
    """
    scalars: dict[str, Tensor] = {}
    for name, other in state.companions.items():
        terms = train_step(other, (companions or {})[name], batch)
        scalars |= {f"{name}/{key}": value for key, value in {"loss": terms.loss, **terms.scalars}.items()}

    ranks, terms = state.ranks, gradient(state, objective, batch)
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        raise ValueError("objective: expected a loss that depends on the trained weights, got none of their gradients")
    if state.loss_scale is not None:
        state.loss_scale.unscale(gradients)
    project_gradients(state.normalized)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    found = ranks.largest((~(torch.isfinite(norm) & torch.isfinite(terms.loss))).to(torch.int32))
    if state.loss_scale is not None:
        state.loss_scale.update(found)
        scalars["loss_scale"] = state.loss_scale.scale.clone()

    settle(state)  # the step before, if it was computed on a GPU, which has this one to compute meanwhile
    images = len(batch.x0) * ranks.count
    state.nimg += images
    state.unaveraged += images
    state.pending.append(verdict(state.iteration, state.unaveraged, found, norm, terms, batch))
    set_learning_rate(state)
    apply_update(state, found)
    state.unaveraged = 0
    state.iteration += 1
    if not found.is_cuda:
        settle(state)
    return Terms(terms.loss, {**terms.scalars, "grad_norm": norm, "skipped": found, **scalars}, terms.t, terms.error)
