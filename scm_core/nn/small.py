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
from scm_core.nn.layers import MPConv, MPLinear, adaptive_double_norm, mp_silu

RESIDUAL_BALANCE = 0.3  # weight of a block's branch in its sum (EDM2, config G)
LABEL_BALANCE = 0.5  # weight of the label embedding (EDM2, config G)


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
        if dropout and self.training:
            y = dual.dropout(y, nnf.dropout(torch.ones_like(dual.value_of(y)), dropout))
        return dual.weighted_sum(x, self.conv1(y), RESIDUAL_BALANCE)


class SmallNet(nn.Module):
    """F(x_t/σ_d, t, labels, guidance) for x of shape (B, channels, resolution, resolution).

    Called with `Dual`s for x and t it returns the pair (F, dF) of value and directional derivative. Labels are int64 of shape (B,) with −1
    for "no label" (a dropped one); `labels=None` means −1 for all. The guidance scale (B,) enters through a zero-initialised layer, so
    that a student starts equal to its teacher.

    Raises ValueError for shapes the architecture does not fit, labels without a label input, and guidance without a guidance input.
    """

    supports_dual = True

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
        super().__init__()
        if resolution % patch:
            raise ValueError(f"resolution: must be divisible by the patch size {patch}, got {resolution}")
        self.shape = (channels, resolution, resolution)
        self.patch, self.labels, self.dropout = patch, labels, dropout
        inner = channels * patch * patch
        embedding = 2 * width
        self.time = PositionalEmbedding(width)
        self.embed_time = MPLinear(width, embedding)
        self.embed_label = MPLinear(labels, embedding) if labels else None
        self.embed_guidance = MPLinear(width, embedding) if guidance_input else None
        if guidance_input:
            self.guidance_gain = nn.Parameter(torch.zeros(()))
        self.conv_in = MPConv(inner + 1, width, 3)  # + 1: a channel of ones stands for the bias, as in EDM2
        self.blocks = nn.ModuleList(Block(width, embedding) for _ in range(blocks))
        self.conv_out = MPConv(width, inner, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def embedding(self, t: Maybe, labels: Tensor | None, guidance: Tensor | None) -> Maybe:
        """The conditioning vector (B, 2·width); only its time part has a tangent."""
        emb = self.embed_time(self.time(t))
        if self.embed_label is not None:
            reference = dual.value_of(emb)
            if labels is None:
                onehot = reference.new_zeros(reference.shape[0], self.labels)
            else:
                onehot = (labels[:, None] == torch.arange(self.labels, device=labels.device)).to(reference.dtype)
            emb = dual.weighted_sum(emb, self.embed_label(onehot * self.labels**0.5), LABEL_BALANCE)
        if self.embed_guidance is not None and guidance is not None:
            emb = dual.add(emb, self.embed_guidance(self.time(guidance), gain=self.guidance_gain))
        return mp_silu(emb)

    def forward(self, x: Maybe, t: Maybe, labels: Tensor | None = None, guidance: Tensor | None = None) -> Maybe:
        value = dual.value_of(x)
        if tuple(value.shape[1:]) != self.shape:
            raise ValueError(f"x: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(value.shape)}")
        if labels is not None and self.embed_label is None:
            raise ValueError("labels: the network was built without a label input (labels=0)")
        if guidance is not None and self.embed_guidance is None:
            raise ValueError("guidance: the network was built without a guidance input (guidance_input=False)")
        emb = self.embedding(t, labels, guidance)
        x = dual.rearrange(x, nnf.pixel_unshuffle, self.patch)
        ones = torch.ones_like(dual.value_of(x)[:, :1])
        x = self.conv_in(dual.concat([x, ones]))
        for block in self.blocks:
            x = block(x, emb, self.dropout)
        return dual.rearrange(self.conv_out(x, gain=self.out_gain), nnf.pixel_shuffle, self.patch)
