# SPDX-License-Identifier: Apache-2.0
"""Embeddings of the time t and of the guidance scale s (paper §4.1, App. G)."""

import math

import torch
from torch import nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe


class PositionalEmbedding(nn.Module):
    """t (B,) → √2 (cos(ω_k t), sin(ω_k t)), shape (B, channels), with ω_k = (1/10000)^{k/(K−1)}, K = channels/2.

    All |ω_k| ≤ 1, so that ∂/∂t stays small where random Fourier features of scale 16 make it explode (§4.1). √2 gives unit
    variance, as EDM2's layers expect.
    """

    frequencies: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 2 or channels < 4:
            raise ValueError(f"channels: expected an even number >= 4, got {channels}")
        half = channels // 2
        self.register_buffer(
            "frequencies", (1 / 10000) ** (torch.arange(half, dtype=torch.float64) / (half - 1)), persistent=False
        )

    def forward(self, t: Maybe) -> Maybe:
        phase = dual.outer(t, self.frequencies.to(dual.value_of(t).dtype))
        return dual.scale(dual.concat([dual.cosine(phase), dual.sine(phase)]), math.sqrt(2))
