# SPDX-License-Identifier: Apache-2.0
"""Which block stands where in a U-Net: numbers alone, without torch, so that what a network costs can be counted without building it.

Per level of resolution the encoder has `blocks` blocks after a halving one (none at the top), the decoder two at the bottom or a doubling
one elsewhere, then blocks + 1 that each take one of the encoder's outputs by concatenation (Ronneberger et al. 2015; Ho et al. 2020).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Resample = Literal["down", "up"]


class Place(NamedTuple):
    """What a block's place asks of it: channels in (with the skip's) and out, its resolution, what it does first, what it has."""

    inputs: int
    outputs: int
    resolution: int
    resample: Resample | None = None
    attention: bool = False
    skip: bool = False


class Layout(NamedTuple):
    """The places of the blocks, in the order in which they are passed."""

    encoder: list[Place]
    decoder: list[Place]


def layout(
    resolution: int,
    width: int,
    multipliers: Sequence[int],
    blocks: int,
    attention_resolutions: Sequence[int],
    entry: int | None = None,
    last_only: bool = False,
) -> Layout:
    """The blocks of a network with width · multipliers channels at resolution, resolution/2, …, entered with `entry` channels
    (None: those of the first level).

    Attention stands in every block that keeps one of `attention_resolutions` and in the first at the bottom; with `last_only` the
    decoder's levels have it in their last block alone.

    Raises ValueError for a resolution that cannot be halved that often, an attention resolution that does not occur, or no blocks.
    """
    if width < 1 or width % 2:
        raise ValueError(f"width: expected a positive multiple of 2, got {width}")
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers: expected positive numbers, one for each level, got {tuple(multipliers)}")
    if blocks < 1:
        raise ValueError(f"blocks: expected at least 1 for each level, got {blocks}")
    levels = len(multipliers)
    if resolution < 1 or resolution % 2 ** (levels - 1):
        raise ValueError(
            f"resolution: expected a multiple of {2 ** (levels - 1)} for the {levels} levels of multipliers, got {resolution}"
        )
    sides = [resolution >> level for level in range(levels)]
    for side in attention_resolutions:
        if side not in sides:
            raise ValueError(f"attention_resolutions: expected some of the network's, {sides}, got {side}")
    widths = [width * multiplier for multiplier in multipliers]
    attentive = set(attention_resolutions)

    encoder, now = [], widths[0] if entry is None else entry
    skips = [now]
    for level, (channels, side) in enumerate(zip(widths, sides, strict=True)):
        if level:
            encoder.append(Place(now, now, side, "down"))
            skips.append(now)
        for _ in range(blocks):
            encoder.append(Place(now, channels, side, attention=side in attentive))
            now = channels
            skips.append(now)

    decoder = [Place(now, now, sides[-1], attention=True), Place(now, now, sides[-1])]
    for level in reversed(range(levels)):
        channels, side = widths[level], sides[level]
        if level < levels - 1:
            decoder.append(Place(now, now, side, "up"))
        for i in range(blocks + 1):
            attention = side in attentive and (i == blocks or not last_only)
            decoder.append(Place(now + skips.pop(), channels, side, attention=attention, skip=True))
            now = channels
    return Layout(encoder, decoder)
