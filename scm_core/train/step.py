# SPDX-License-Identifier: Apache-2.0
"""One training step: loss, gradient, guard, Adam, forced weight normalisation, average."""

from collections.abc import Mapping

import torch

from scm_core.nn.layers import normalize_weights, project_gradients
from scm_core.objectives import Batch, Objective, Terms
from scm_core.seeds import derive_seed, generator_for
from scm_core.train.state import TrainState


class NonFiniteError(Exception):
    """Too many steps in a row gave a non-finite loss or gradient."""


def train_step(
    state: TrainState, objective: Objective, batch: Batch, companions: Mapping[str, Objective] | None = None
) -> Terms:
    """Step number `state.iteration`: its randomness is a function of (seed, iteration) alone.

    The state's companions make a step of their own first, with their objectives in `companions`.
    A step whose loss or gradient is not finite changes no weight and no average; it is counted, and `patience` of them in a row raise
    NonFiniteError. The images count as seen either way, so that the order of the data does not depend on the guard.
    """
    scalars: dict[str, torch.Tensor] = {}
    for name, other in state.companions.items():
        terms = train_step(other, (companions or {})[name], batch)
        scalars |= {f"{name}/{key}": value for key, value in {"loss": terms.loss, **terms.scalars}.items()}
    settings = state.settings
    torch.manual_seed(derive_seed(settings.seed, "dropout", state.iteration))  # the one use of the global generator
    state.optimizer.zero_grad(set_to_none=True)
    terms = objective(batch, generator_for(settings.seed, "step", state.iteration), state.iteration)
    terms.loss.backward()
    project_gradients(state.net)
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    finite = bool(torch.isfinite(norm) & torch.isfinite(terms.loss))

    state.nimg += len(batch.x0)
    if finite:
        factor = settings.schedule(state.iteration, settings.iterations)
        for group, reference in zip(state.optimizer.param_groups, state.reference_lr, strict=True):
            group["lr"] = reference * factor
        state.optimizer.step()
        normalize_weights(state.net)
        if state.ema is not None:
            state.ema.update(state.nimg, len(batch.x0))
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= settings.patience:
            raise NonFiniteError(
                f"iteration {state.iteration}: loss {terms.loss.item()}, gradient norm {norm.item()}: {settings.patience} steps in a "
                f"row were not finite; lower the learning rate (now {settings.lr}) or look at samples {batch.indices.tolist()[:8]} …"
            )
    state.iteration += 1
    return Terms(terms.loss.detach(), {**terms.scalars, "grad_norm": norm.detach(), **scalars})
