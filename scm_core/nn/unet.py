# SPDX-License-Identifier: Apache-2.0
"""What the U-Nets DDPM++ and EDM2 have in common beside their layout (`layout`): dropout by resolution, and the way through the blocks."""

from typing import Protocol

from torch import nn

from scm_core.nn.dual import Maybe
from scm_core.nn.layout import Layout, Place


class Runner(Protocol):
    """Runs a block on x, the embedding and, where it takes one, the skip (`Network.run`)."""

    def __call__(self, block: nn.Module, *inputs: Maybe) -> Maybe: ...


def block_dropout(place: Place, dropout: float, resolution: int | None) -> float:
    """The dropout of a block: none where its resolution is above `resolution` (None: everywhere the same)."""
    return dropout if resolution is None or place.resolution <= resolution else 0.0


def check_dropout(dropout: float, resolution: int | None) -> None:
    """ValueError unless dropout is a probability below 1 and its resolution, if there is one, positive."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if resolution is not None and resolution < 1:
        raise ValueError(f"dropout_resolution: expected a positive number or None, got {resolution}")


def through(run: Runner, plan: Layout, encoder: nn.ModuleList, decoder: nn.ModuleList, x: Maybe, emb: Maybe) -> Maybe:
    """x through all blocks; a decoder's block with `skip` gets the encoder's latest output not used so far."""
    skips = [x]
    for block in encoder:
        x = run(block, x, emb)
        skips.append(x)
    for place, block in zip(plan.decoder, decoder, strict=True):
        x = run(block, x, emb, skips.pop()) if place.skip else run(block, x, emb)
    return x
