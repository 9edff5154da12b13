# SPDX-License-Identifier: Apache-2.0
"""EDM2's U-Net, config G (Karras et al. 2024, arXiv 2312.02696, App. B), with the paper's changes (§4.1, App. G).

The changes: c_noise(t) = t, a positional embedding, and adaptive double normalisation. Forced weight normalisation is no part of the
forward: `layers.normalize_weights` does it after each optimizer step.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe
from scm_core.nn.embedding import Embedding, NoiseInput, TimeEmbedding, Waves
from scm_core.nn.layers import (
    MPConv,
    MPLinear,
    adaptive_double_norm,
    mp_cat,
    mp_silu,
    positions,
    random_dropout,
    self_attention,
)
from scm_core.nn.layout import Place, layout
from scm_core.nn.network import MPNetwork, Precision
from scm_core.nn.unet import block_dropout, check_dropout, through
from scm_core.validate import check_channels

# EDM2's Table 6: the width of each size (sizes S … XXL also in the paper's Tables 3 and 4, "channel multiplier")
WIDTHS = {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}

RESIDUAL_BALANCE = 0.3  # weight of a block's branch in its sum (EDM2, config G, with the three below)
ATTENTION_BALANCE = 0.3  # weight of the attention in its sum
CONCAT_BALANCE = 0.5  # weight of the encoder's part in a decoder's input
ACTIVATION_LIMIT = 256.0  # a block's output is clipped here, for half precision

Norm = Literal["double", "adagn"]


class Block(nn.Module):
    """EDM2's residual block, in the flavour of the encoder (pixel normalisation first) or of the decoder.

    resample → (encoder: 1×1 conv if the width changes → norm) → [silu → conv → modulate → silu → dropout → conv] summed with weight 0.3 to
    (decoder: a 1×1 conv of) its input → self-attention summed with weight 0.3 → clip. The decoder's input may be joined by a skip.
    """

    def __init__(
        self, place: Place, encoder: bool, embedding: int, norm: Norm, head_channels: int, dropout: float
    ) -> None:
        super().__init__()
        inputs, outputs = place.inputs, place.outputs
        self.place, self.encoder, self.norm, self.dropout = place, encoder, norm, dropout
        self.normalize = dual.magnitude_normalize if norm == "adagn" else dual.rms_normalize
        self.conv0 = MPConv(outputs if encoder else inputs, outputs, 3)
        self.conv1 = MPConv(outputs, outputs, 3)
        self.skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.embed = MPLinear(embedding, 2 * outputs if norm == "double" else outputs)
        if norm == "adagn":
            self.embed_gain = nn.Parameter(torch.zeros(()))
        if place.attention:
            check_channels(
                f"width · multiplier at resolution {place.resolution}, with attention", outputs, head_channels
            )
            self.heads = outputs // head_channels
            self.qkv = MPConv(outputs, 3 * outputs, 1)
            self.project = MPConv(outputs, outputs, 1)

    def modulate(self, y: Maybe, emb: Maybe) -> Maybe:
        """The conditioning: norm(y) ⊙ pnorm(s) + pnorm(b), or, as in EDM2, y ⊙ (1 + gain · c), from linear layers of emb."""
        if self.norm == "double":
            return adaptive_double_norm(y, self.embed(emb))
        c = dual.cast(positions(self.embed(emb, gain=self.embed_gain)), dual.value_of(y).dtype)
        return dual.multiply(y, dual.add(c, torch.ones_like(dual.value_of(c))))

    def forward(self, x: Maybe, emb: Maybe, skip: Maybe | None = None) -> Maybe:
        if skip is not None:
            x = mp_cat(x, skip, CONCAT_BALANCE)
        if self.place.resample is not None:
            x = dual.downsample(x) if self.place.resample == "down" else dual.upsample(x)
        if self.encoder:
            x = x if self.skip is None else self.skip(x)
            x = self.normalize(x)
        y = self.conv0(mp_silu(x))
        y = mp_silu(self.modulate(y, emb))
        y = self.conv1(random_dropout(y, self.dropout, self.training))
        if not self.encoder and self.skip is not None:
            x = self.skip(x)
        x = dual.weighted_sum(x, y, RESIDUAL_BALANCE)
        if self.place.attention:
            y = self.project(self_attention(self.qkv(x), self.heads, cosine=True, norm=self.normalize))
            x = dual.weighted_sum(x, y, ATTENTION_BALANCE)
        return dual.clamp(x, ACTIVATION_LIMIT)


class EDM2UNet(MPNetwork):
    """F(x_t/σ_d, t, labels, guidance) for x of shape (B, channels, resolution, resolution); inputs and trunk as in `Network`.

    `width` is the paper's channel multiplier (`WIDTHS`); level l has width · multipliers[l] channels and half the resolution of the one
    before. Attention has `head_channels` channels per head. `dropout` acts in blocks at resolution ≤ `dropout_resolution` (None: all).

    `norm` "double" is adaptive double normalisation. "adagn" is EDM2's own conditioning, which stands where others have AdaGN and which
    the paper's text calls so: a gain 1 + c per channel, without group normalisation or shift, and ε beside the RMS instead of beside its
    square where it normalises. `embedding`, `fourier_scale`, `fourier_seed`, `waves`, `c_noise` and `sigma_data` as in `TimeEmbedding`.
    EDM2 itself is norm="adagn", embedding="fourier", c_noise="edm".

    Parameters for ImageNet 512 (4 × 64 × 64, 1000 labels) of XS, S, M, L, XL, XXL in millions: "double" 130.8, 293.9, 522.2, 815.6,
    1174.1, 1597.8; "adagn" 124.7, 280.2, 497.8, 777.5, 1119.3, 1523.2, the counts that the paper's Tables 3 and 4 have (from S on).

    Raises ValueError for arguments that do not fit together, and for calls as in `Network.check_call`.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        labels: int,
        width: int,
        multipliers: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        head_channels: int = 64,
        norm: Norm = "double",
        embedding: Embedding = "positional",
        fourier_scale: float = 1.0,
        fourier_seed: int = 0,
        waves: Waves | None = None,
        c_noise: NoiseInput = "t",
        sigma_data: float = 0.5,
        guidance_input: bool = False,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        checkpointing: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        plan = layout(resolution, width, multipliers, blocks, attention_resolutions)
        check_dropout(dropout, dropout_resolution)
        check_channels("head_channels", head_channels, 1)
        if norm not in ("double", "adagn"):
            raise ValueError(f"norm: expected 'double' or 'adagn', got {norm!r}")
        first, emb = width * multipliers[0], width * max(multipliers)
        time = TimeEmbedding(first, embedding, c_noise, fourier_scale, fourier_seed, sigma_data, waves)
        super().__init__(channels, resolution, labels, time, first, emb, guidance_input, precision, checkpointing)
        self.plan = plan

        def block(place: Place, encoder: bool) -> Block:
            return Block(place, encoder, emb, norm, head_channels, block_dropout(place, dropout, dropout_resolution))

        self.conv_in = MPConv(channels + 1, first, 3)  # + 1: a channel of ones stands for the bias
        self.encoder = nn.ModuleList(block(place, True) for place in plan.encoder)
        self.decoder = nn.ModuleList(block(place, False) for place in plan.decoder)
        self.conv_out = MPConv(first, channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Maybe, t: Maybe, labels: Tensor | None = None, guidance: Tensor | None = None) -> Maybe:
        self.check_call(x, t, labels, guidance)
        emb = self.embedding(t, labels, guidance)
        x = dual.cast(x, self.trunk or self.out_gain.dtype)
        x = self.conv_in(dual.concat([x, torch.ones_like(dual.value_of(x)[:, :1])]))
        x = through(self.run, self.plan, self.encoder, self.decoder, x, emb)
        return dual.cast(self.conv_out(x, gain=self.out_gain), self.out_gain.dtype)
