# SPDX-License-Identifier: Apache-2.0
"""A small magnitude-preserving network for images and latents of a few pixels (the scales that run on a CPU).

One level of residual blocks after a pixel-unshuffle: EDM2's block with the paper's time embedding and adaptive double normalisation, and
neither attention nor resampling, which cost more than they bring at 4 × 4 positions.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe
from scm_core.nn.embedding import PositionalEmbedding
from scm_core.nn.layers import MPConv, MPLinear, adaptive_double_norm, mp_silu, random_dropout
from scm_core.nn.network import MPNetwork
from scm_core.nn.unet import check_dropout
from scm_core.validate import check_channels

RESIDUAL_BALANCE = 0.3  # weight of a block's branch in its sum (EDM2, config G)


class Block(nn.Module):
    """Residual block: norm → silu → conv → adaptive double norm → silu → dropout → conv, summed with balance 0.3."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.conv0 = MPConv(width, width, 3)
        self.conv1 = MPConv(width, width, 3)
        self.embed = MPLinear(embedding, 2 * width)

    def forward(self, x: Maybe, emb: Maybe, dropout: float) -> Maybe:
        x = dual.rms_normalize(x)
        y = self.conv0(mp_silu(x))
        y = mp_silu(adaptive_double_norm(y, self.embed(emb)))
        return dual.weighted_sum(x, self.conv1(random_dropout(y, dropout, self.training)), RESIDUAL_BALANCE)


class SmallNet(MPNetwork):
    """F(x_t/σ_d, t, labels, guidance) for x of shape (B, channels, resolution, resolution); inputs as in `Network`.

    Raises ValueError for arguments that do not fit together, and for calls as in `Network.check_call`.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        labels: int,
        width: int,
        blocks: int,
        patch: int = 2,
        guidance_input: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_channels("patch", patch, 1)
        if resolution < 1 or resolution % patch:
            raise ValueError(f"resolution: must be divisible by the patch size {patch}, got {resolution}")
        check_channels("width", width)
        if blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {blocks}")
        check_dropout(dropout, None)
        embedding = 2 * width
        super().__init__(channels, resolution, labels, PositionalEmbedding(width), width, embedding, guidance_input)
        self.patch, self.dropout = patch, dropout
        inner = channels * patch * patch
        self.conv_in = MPConv(inner + 1, width, 3)  # + 1: a channel of ones stands for the bias, as in EDM2
        self.blocks = nn.ModuleList(Block(width, embedding) for _ in range(blocks))
        self.conv_out = MPConv(width, inner, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Maybe, t: Maybe, labels: Tensor | None = None, guidance: Tensor | None = None) -> Maybe:
        self.check_call(x, t, labels, guidance)
        emb = self.embedding(t, labels, guidance)
        x = dual.rearrange(dual.cast(x, self.out_gain.dtype), nnf.pixel_unshuffle, self.patch)
        ones = torch.ones_like(dual.value_of(x)[:, :1])
        x = self.conv_in(dual.concat([x, ones]))
        for block in self.blocks:
            x = block(x, emb, self.dropout)
        return dual.rearrange(self.conv_out(x, gain=self.out_gain), nnf.pixel_shuffle, self.patch)
