# SPDX-License-Identifier: Apache-2.0
"""DDPM++ (Song et al. 2021, arXiv 2011.13456, App. C) as in EDM (Karras et al. 2022, arXiv 2206.00364, App. F), with the paper's changes.

The paper's CIFAR-10 network: c_noise(t) = t, a positional embedding, and adaptive double normalisation (§4.1, App. G).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe
from scm_core.nn.embedding import Embedding, NoiseInput, PositionalEmbedding, TimeEmbedding
from scm_core.nn.layers import adaptive_double_norm, positions, random_dropout, self_attention
from scm_core.nn.layout import Place, layout
from scm_core.nn.network import Network, Precision
from scm_core.nn.unet import block_dropout, check_dropout, through
from scm_core.validate import check_channels

SKIP_SCALE = math.sqrt(0.5)  # of every sum of two branches
LAST_GAIN = 1e-5  # initial size of the convolutions that end a branch or the network
ATTENTION_GAIN = math.sqrt(0.2)  # initial size of the queries', keys' and values' layer

Norm = Literal["double", "adagn", "shift"]


class Linear(nn.Module):
    """x Wᵀ + b; W uniform after Glorot & Bengio 2010, times `gain`, b = 0."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight, gain)

    def forward(self, x: Maybe) -> Maybe:
        dtype = dual.value_of(x).dtype
        return dual.linear(x, self.weight.to(dtype), self.bias.to(dtype))


class Conv(nn.Module):
    """(B, in, H, W) → (B, out, H, W), kernel × kernel, with a bias; initialised as `Linear`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight, gain)

    def forward(self, x: Maybe) -> Maybe:
        dtype = dual.value_of(x).dtype
        return dual.conv2d(x, self.weight.to(dtype), self.bias.to(dtype))


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) in 32 groups, or fewer so that each has at least 4 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        check_channels("channels of a group norm (width · multiplier, with skips)", channels, max(self.groups, 4))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Maybe) -> Maybe:
        dtype = dual.value_of(x).dtype
        return dual.group_norm(x, self.groups, self.weight.to(dtype), self.bias.to(dtype), eps=1e-6)


class Block(nn.Module):
    """norm → silu → resample → conv → conditioned norm → silu → dropout → conv, then self-attention; both are residual, times √½."""

    def __init__(self, place: Place, embedding: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        inputs, outputs = place.inputs, place.outputs
        self.place, self.norm, self.dropout = place, norm, dropout
        self.norm0 = GroupNorm(inputs)
        self.conv0 = Conv(inputs, outputs, 3)
        self.embed = Linear(embedding, outputs if norm == "shift" else 2 * outputs)
        self.norm1 = GroupNorm(outputs)
        self.conv1 = Conv(outputs, outputs, 3, LAST_GAIN)
        self.skip = Conv(inputs, outputs, 1) if inputs != outputs or place.resample else None
        if place.attention:
            self.norm2 = GroupNorm(outputs)
            self.qkv = Conv(outputs, 3 * outputs, 1, ATTENTION_GAIN)
            self.project = Conv(outputs, outputs, 1, LAST_GAIN)

    def resample(self, x: Maybe) -> Maybe:
        if self.place.resample is None:
            return x
        return dual.downsample(x) if self.place.resample == "down" else dual.upsample(x)

    def modulate(self, y: Maybe, emb: Maybe) -> Maybe:
        """norm(y) ⊙ pnorm(s) + pnorm(b), norm(y) ⊙ (1 + s) + b, or norm(y + b), with s and b from a linear layer of emb."""
        if self.norm == "double":
            return adaptive_double_norm(y, self.embed(emb), self.norm1)
        shift = dual.cast(positions(self.embed(emb)), dual.value_of(y).dtype)
        if self.norm == "shift":
            return self.norm1(dual.add(y, shift))
        s, b = dual.chunk(shift, 2)
        return dual.add(dual.multiply(self.norm1(y), dual.add(s, torch.ones_like(dual.value_of(s)))), b)

    def forward(self, x: Maybe, emb: Maybe, skip: Maybe | None = None) -> Maybe:
        if skip is not None:
            x = dual.concat([x, skip])
        y = self.conv0(self.resample(dual.silu(self.norm0(x))))
        y = dual.silu(self.modulate(y, emb))
        y = self.conv1(random_dropout(y, self.dropout, self.training))
        x = x if self.skip is None else self.skip(self.resample(x))
        x = dual.scale(dual.add(x, y), SKIP_SCALE)
        if self.place.attention:
            y = self.project(self_attention(self.qkv(self.norm2(x)), heads=1, cosine=False))
            x = dual.scale(dual.add(x, y), SKIP_SCALE)
        return x


class DDPMPP(Network):
    """F(x_t/σ_d, t, labels, guidance) for x of shape (B, channels, resolution, resolution); inputs and trunk as in `Network`.

    Level l has width · multipliers[l] channels and half the resolution of the one before; single-head attention at
    `attention_resolutions`. t is embedded in `noise_channels` numbers (None: 2 · width, hence 256; EDM has width, 128) and goes through
    two layers of 4 · width. `dropout` acts in blocks at resolution ≤ `dropout_resolution` (None: all).

    `norm` "double" is adaptive double normalisation; "adagn" is y = norm(x) ⊙ (1 + s) + b; "shift" adds b before the norm, as in the
    DDPM++ of Score SDE and EDM. `embedding`, `fourier_scale`, `fourier_seed`, `c_noise` and `sigma_data` as in `TimeEmbedding`.

    Parameters for CIFAR-10 (3 × 32 × 32, no labels) in millions: "double" and "adagn" 60.13, "shift" 55.80, and 55.73 with EDM's
    noise_channels=128, whose count is 55.7.

    Raises ValueError for arguments that do not fit together, and for calls as in `Network.check_call`.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        labels: int = 0,
        width: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        noise_channels: int | None = None,
        norm: Norm = "double",
        embedding: Embedding = "positional",
        fourier_scale: float = 1.0,
        fourier_seed: int = 0,
        c_noise: NoiseInput = "t",
        sigma_data: float = 0.5,
        guidance_input: bool = False,
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        checkpointing: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        plan = layout(resolution, width, multipliers, blocks, attention_resolutions, entry=width, last_only=True)
        check_dropout(dropout, dropout_resolution)
        if norm not in ("double", "adagn", "shift"):
            raise ValueError(f"norm: expected 'double', 'adagn' or 'shift', got {norm!r}")
        super().__init__(channels, resolution, labels, guidance_input, precision, checkpointing)
        self.plan = plan
        noise, emb = 2 * width if noise_channels is None else noise_channels, 4 * width
        self.time = TimeEmbedding(noise, embedding, c_noise, fourier_scale, fourier_seed, sigma_data)
        self.embed_label = Linear(labels, noise) if labels else None
        self.embed_guidance = Linear(noise, noise, gain=0.0) if guidance_input else None
        if guidance_input:
            self.scale = PositionalEmbedding(noise)
        self.embed0, self.embed1 = Linear(noise, emb), Linear(emb, emb)
        self.conv_in = Conv(channels, width, 3)

        def block(place: Place) -> Block:
            return Block(place, emb, norm, block_dropout(place, dropout, dropout_resolution))

        self.encoder = nn.ModuleList(map(block, plan.encoder))
        self.decoder = nn.ModuleList(map(block, plan.decoder))
        outputs = plan.decoder[-1].outputs
        self.norm_out, self.conv_out = GroupNorm(outputs), Conv(outputs, channels, 3, LAST_GAIN)

    def conditioning(self, t: Maybe, labels: Tensor | None, guidance: Tensor | None) -> Maybe:
        """The conditioning vector (B, 4 · width); only its time part has a tangent."""
        dtype = self.embed0.weight.dtype
        emb = dual.scale(
            dual.cast(self.time(t), dtype), math.sqrt(0.5)
        )  # plain cosines and sines here, without the √2 of unit variance
        if self.embed_label is not None:
            emb = dual.add(emb, self.embed_label(self.one_hot(labels, dual.value_of(emb))))
        if self.embed_guidance is not None and guidance is not None:
            emb = dual.add(emb, self.embed_guidance(dual.cast(self.scale(guidance), dtype)))
        return dual.silu(self.embed1(dual.silu(self.embed0(emb))))

    def forward(self, x: Maybe, t: Maybe, labels: Tensor | None = None, guidance: Tensor | None = None) -> Maybe:
        self.check_call(x, t, labels, guidance)
        dtype = self.conv_out.weight.dtype
        emb = self.conditioning(t, labels, guidance)
        x = self.conv_in(dual.cast(x, self.trunk or dtype))
        x = through(self.run, self.plan, self.encoder, self.decoder, x, emb)
        return dual.cast(self.conv_out(dual.silu(self.norm_out(x))), dtype)
