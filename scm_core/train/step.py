# SPDX-License-Identifier: Apache-2.0
"""One training step: loss, gradient, guard, optimizer, forced weight normalisation, average."""

from collections.abc import Mapping

import torch
from torch import Tensor

from scm_core.nn.layers import project_gradients
from scm_core.objectives import Batch, Objective, Terms
from scm_core.seeds import Shard, derive_seed
from scm_core.train.distributed import accumulating
from scm_core.train.guard import NonFiniteError, describe, verdict
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
    project_gradients(state.net)
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


def gradient(state: TrainState, objective: Objective, batch: Batch) -> Terms:
    """Put the gradient of the batch's mean loss, scaled, into the weights' `.grad`; the mean loss and scalars of its parts, detached."""
    settings, iteration, ranks = state.settings, state.iteration, state.ranks
    own = len(batch.x0)
    first, total, size = ranks.rank * own, ranks.count * own, own // settings.accumulation
    if size * settings.accumulation != own:
        raise ValueError(
            f"accumulation: expected a divisor of the {own} samples of a process, got {settings.accumulation}"
        )
    state.optimizer.zero_grad(set_to_none=True)
    done: list[Terms] = []
    for start in range(0, own, size):
        part = batch if size == own else slice_of(batch, start, size)
        at = first + start
        seed_dropout(derive_seed(settings.seed, "dropout", iteration, *([at] if at else [])), batch.x0.device)
        draws = Shard(derive_seed(settings.seed, "step", iteration), total, at, size, batch.x0.device)
        if start + size < own:
            with accumulating(objective):
                terms = backward(state, objective(part, draws, iteration))
        else:
            terms = backward(state, objective(part, draws, iteration))
        done.append(terms)
    return done[0] if len(done) == 1 else mean(done)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generators of CPU and device, which dropout alone draws from. (torch.manual_seed costs half a millisecond more.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def slice_of(batch: Batch, start: int, count: int) -> Batch:
    """`count` samples of a batch, from number `start` on."""
    part = slice(start, start + count)
    return Batch(batch.x0[part], None if batch.labels is None else batch.labels[part], batch.indices[part])


def backward(state: TrainState, terms: Terms) -> Terms:
    """Add the gradient of a part's share of the loss, times the loss scale; the terms without their graph."""
    loss = terms.loss / state.settings.accumulation
    (loss if state.loss_scale is None else loss * state.loss_scale.scale).backward()
    return terms._replace(loss=terms.loss.detach())


def mean(parts: list[Terms]) -> Terms:
    """The terms of a batch from those of its equal parts."""
    loss = torch.stack([terms.loss for terms in parts]).mean()
    scalars = {key: torch.stack([terms.scalars[key] for terms in parts]).mean() for key in parts[0].scalars}
    t, error = ([getattr(terms, name) for terms in parts] for name in ("t", "error"))
    return Terms(loss, scalars, None if t[0] is None else torch.cat(t), None if error[0] is None else torch.cat(error))


def settle(state: TrainState) -> None:
    """Wait for the verdicts that are on their way and count them; NonFiniteError after `patience` bad ones in a row."""
    settings = state.settings
    for other in state.companions.values():
        settle(other)
    while state.pending:
        step = state.pending.popleft()
        if not step.bad():
            state.skipped_in_a_row = 0
            continue
        state.skipped += 1
        state.skipped_in_a_row += 1
        state.unaveraged += step.images
        state.descriptions.append(describe(step))
        if state.skipped_in_a_row >= settings.patience:
            raise NonFiniteError(
                f"{state.descriptions[-1]}: {settings.patience} steps in a row were not finite; lower the learning rate "
                f"(now {settings.lr}) or look at these samples"
            )
