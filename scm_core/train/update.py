# SPDX-License-Identifier: Apache-2.0
"""What follows a finite gradient: optimizer, forced weight normalisation, averages. Nothing of it follows another."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scm_core.nn.layers import mp_weights, normalize_weights, row_rms
from scm_core.train.optimizers import is_fused, local

if TYPE_CHECKING:
    from scm_core.train.state import TrainState


def set_learning_rate(state: "TrainState") -> None:
    """The schedule's rates for step number `state.iteration`."""
    factor = state.settings.schedule(state.iteration, state.settings.iterations, state.settings.batch)
    for group, reference in zip(state.optimizer.param_groups, state.reference_lr, strict=True):
        group["lr"] = reference * factor


def apply_update(state: "TrainState", found: Tensor) -> None:
    """Update weights and averages unless `found`, of shape (), is 1. With a fused optimizer on a GPU the host does not wait for it."""
    if found.is_cuda and is_fused(state.optimizer):
        masked_update(state, found)
    elif not bool(found):
        state.optimizer.step()
        normalize_weights(state.normalized)
        for average in state.averages.values():
            average.update(state.nimg, state.unaveraged)


@torch.no_grad()
def masked_update(state: "TrainState", found: Tensor) -> None:
    """`apply_update` without a look at `found` by the host: every kernel runs, and leaves all as it was where `found` is 1."""
    own = local(state.optimizer)
    own.found_inf = found.float()  # type: ignore[attr-defined]  # what torch.amp tells a fused optimizer
    state.optimizer.step()
    bad = found > 0
    for _, layer in mp_weights(state.normalized):
        layer.weight.copy_(torch.where(bad, layer.weight, layer.weight / row_rms(layer.weight)))
    for average in state.averages.values():
        average.update(state.nimg, state.unaveraged, keep=bad)
