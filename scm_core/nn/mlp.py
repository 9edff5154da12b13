# SPDX-License-Identifier: Apache-2.0
"""A small magnitude-preserving network for points of a few dimensions: the toy of Figure 3."""

import math

import torch
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe, check_pair, value_of
from scm_core.nn.embedding import Embedding, NoiseInput, TimeEmbedding
from scm_core.nn.layers import MPLinear, mp_silu
from scm_core.nn.network import TRUNK, Precision
from scm_core.nn.small import RESIDUAL_BALANCE
from scm_core.validate import check_channels, check_time_dtype

# Angular frequencies of x, which has unit variance: a point's own coordinates vary too little for normalised weights to draw sharp borders.
FREQUENCIES = (1.0, 2.0, 4.0)


class PointBlock(nn.Module):
    """`SmallNet`'s block with linear layers: norm → silu → linear → adaptive double norm → silu → linear, balance 0.3."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.linear0 = MPLinear(width, width)
        self.linear1 = MPLinear(width, width)
        self.embed = MPLinear(embedding, 2 * width)

    def forward(self, x: Maybe, emb: Maybe) -> Maybe:
        x = dual.rms_normalize(x)
        y = dual.rms_normalize(self.linear0(mp_silu(x)))
        dtype = value_of(x).dtype
        s, b = (dual.cast(dual.rms_normalize(part), dtype) for part in dual.chunk(self.embed(emb), 2))
        y = mp_silu(dual.add(dual.multiply(y, s), b))
        return dual.weighted_sum(x, self.linear1(y), RESIDUAL_BALANCE)


class MLP(nn.Module):
    """F(x_t/σ_d, t) for points x of shape (B, dim), unconditional; on `Dual`s for x and t it returns the pair (F, dF).

    `precision` is the format of everything between the embeddings of x and t and the output, as in `Network`; what embeds the time is as in
    `TimeEmbedding`.
    Raises ValueError for arguments out of range; and, when called, for points of another dimension, t or tangents that do not fit them,
    half-precision t, and labels or guidance, for which it has no input.
    """

    supports_dual = True

    def __init__(
        self,
        dim: int,
        width: int,
        blocks: int,
        precision: Precision = "fp32",
        embedding: Embedding = "positional",
        c_noise: NoiseInput = "t",
        fourier_scale: float = 1.0,
        fourier_seed: int = 0,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        check_channels("dim", dim, 1)
        check_channels("width", width)
        if blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {blocks}")
        if precision not in TRUNK:
            raise ValueError(f"precision: expected one of {', '.join(TRUNK)}, got {precision!r}")
        self.dim, self.trunk = dim, TRUNK[precision]
        self.time = TimeEmbedding(width, embedding, c_noise, fourier_scale, fourier_seed, sigma_data)
        self.embed_time = MPLinear(width, 2 * width)
        self.linear_in = MPLinear(dim * (1 + 2 * len(FREQUENCIES)) + 1, width)  # + 1: a column of ones for the bias
        self.blocks = nn.ModuleList(PointBlock(width, 2 * width) for _ in range(blocks))
        self.linear_out = MPLinear(width, dim)
        self.out_gain = nn.Parameter(torch.zeros(()))

    def features(self, x: Maybe) -> Maybe:
        """(x, 1, √2 cos(ω x), √2 sin(ω x)), of unit variance like x: (B, dim·7 + 1)."""
        phase = dual.concat([dual.scale(x, frequency) for frequency in FREQUENCIES])
        waves = dual.scale(dual.concat([dual.cosine(phase), dual.sine(phase)]), math.sqrt(2))
        return dual.concat([x, torch.ones_like(value_of(x)[:, :1]), waves])

    def forward(self, x: Maybe, t: Maybe, labels: Tensor | None = None, guidance: Tensor | None = None) -> Maybe:
        value, time = value_of(x), value_of(t)
        check_pair("x", x)
        check_pair("t", t)
        if tuple(value.shape[1:]) != (self.dim,):
            raise ValueError(f"x: expected shape (B, {self.dim}), got {tuple(value.shape)}")
        check_time_dtype(time)
        if time.shape != value.shape[:1]:
            raise ValueError(f"t: expected shape ({len(value)},), one for each sample, got {tuple(time.shape)}")
        if labels is not None:
            raise ValueError("labels: a network of points has no label input, expected None")
        if guidance is not None:
            raise ValueError("guidance: a network of points has no guidance input, expected None")
        dtype = self.out_gain.dtype
        emb = mp_silu(self.embed_time(dual.cast(self.time(t), dtype)))
        x = self.linear_in(dual.cast(self.features(dual.cast(x, dtype)), self.trunk or dtype))
        for block in self.blocks:
            x = block(x, emb)
        return dual.cast(self.linear_out(x, gain=self.out_gain), dtype)
