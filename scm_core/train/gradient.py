# SPDX-License-Identifier: Apache-2.0
"""The gradient of a step: of this process's part of the batch, at once or in accumulated parts; the result does not depend on the cut."""

import torch

from scm_core.objectives import Batch, Objective, Terms
from scm_core.seeds import Shard, derive_seed
from scm_core.train.distributed import accumulating
from scm_core.train.state import TrainState


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
        part = batch.part(start, size)
        at = first + start
        seed_dropout(derive_seed(settings.seed, "dropout", iteration, *([at] if at else [])), batch.x0.device)
        draws = Shard(derive_seed(settings.seed, "step", iteration), total, at, size, batch.x0.device)
        with accumulating(objective, more=start + size < own):
            done.append(backward(state, objective(part, draws, iteration)))
    return done[0] if len(done) == 1 else mean(done)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the global generators of CPU and device, which dropout alone draws from. (torch.manual_seed costs half a millisecond more.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def backward(state: TrainState, terms: Terms) -> Terms:
    """Add the gradient of a part's share of the loss, times the loss scale; the terms without their graph."""
    parts = state.settings.accumulation
    loss = terms.loss if parts == 1 else terms.loss / parts
    (loss if state.loss_scale is None else loss * state.loss_scale.scale).backward()
    return terms._replace(loss=terms.loss.detach())


def mean(parts: list[Terms]) -> Terms:
    """The terms of a batch from those of its equal parts."""
    loss = torch.stack([terms.loss for terms in parts]).mean()
    scalars = {key: torch.stack([terms.scalars[key] for terms in parts]).mean() for key in parts[0].scalars}
    t, error = ([getattr(terms, name) for terms in parts] for name in ("t", "error"))
    return Terms(loss, scalars, None if t[0] is None else torch.cat(t), None if error[0] is None else torch.cat(error))
