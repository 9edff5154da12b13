# SPDX-License-Identifier: Apache-2.0
"""Steps that are not finite: not applied by any process, counted, and described.

On a CPU the verdict over a step is known at once. On a GPU it would have to be waited for; there the update itself looks at it (see
`scm_core.train.update`), and the host reads it one step later, while the GPU has the next step to compute.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from scm_core.objectives import Batch, Terms

if TYPE_CHECKING:
    from scm_core.train.state import TrainState

SHOWN = 8  # samples named in a description


class NonFiniteError(Exception):
    """Too many steps in a row gave a non-finite loss or gradient."""


class Step(NamedTuple):
    """A step whose verdict is on its way: `found` is 1 if something was not finite on any process, `norm` the gradient's."""

    iteration: int
    images: int  # those that the averages were told of
    found: Tensor
    norm: Tensor
    terms: Terms
    batch: Batch
    ready: torch.cuda.Event | None

    def bad(self) -> bool:
        """Whether it was not finite; waits for the verdict."""
        if self.ready is not None:
            self.ready.synchronize()
        return bool(self.found)


def verdict(iteration: int, images: int, found: Tensor, norm: Tensor, terms: Terms, batch: Batch) -> Step:
    """A step to be judged; from a GPU its verdict starts on its way to the host."""
    if not found.is_cuda:
        return Step(iteration, images, found, norm, terms, batch, None)
    host = torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return Step(iteration, images, host, norm, terms, batch, ready)


def describe(step: Step) -> str:
    """What was not finite at a step, with the t and the indices of the samples concerned, those of this process."""
    loss, norm = float(step.terms.loss), float(step.norm)
    what = f"iteration {step.iteration}: loss {loss}, gradient norm {norm}"
    error, t, indices = step.terms.error, step.terms.t, step.batch.indices
    if t is None:
        return f"{what}; samples {indices[:SHOWN].tolist()}{f' and {len(indices) - SHOWN} more' if len(indices) > SHOWN else ''}"
    bad = torch.arange(0) if error is None else (~torch.isfinite(error)).nonzero().flatten().cpu()
    which = "not finite for" if len(bad) else "samples"  # each one's own loss may be finite, and the gradient not
    chosen = bad if len(bad) else torch.arange(len(t))
    named = ", ".join(f"{indices[i]} at t = {t[i]:.6g}" for i in chosen[:SHOWN].tolist())
    return f"{what}; {which} {named}{f' and {len(chosen) - SHOWN} more' if len(chosen) > SHOWN else ''}"


def settle(state: "TrainState") -> None:
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
