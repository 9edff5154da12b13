# SPDX-License-Identifier: Apache-2.0
"""Embeddings of the time t and of the guidance scale s, and the head of the adaptive weighting (paper §4.1, App. D, G)."""

import math

import torch
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe


class PositionalEmbedding(nn.Module):
    """t (B,) → √2 (cos(ω_k t), sin(ω_k t)), shape (B, channels), with ω_k = (1/10000)^{k/(K−1)}, K = channels/2.

    All |ω_k| ≤ 1, so that ∂/∂t stays small where random Fourier features of scale 16 make it explode (§4.1). √2 gives unit
    variance, as EDM2's layers expect.
    """

    frequencies: Tensor

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


class LogVarHead(nn.Module):
    """Adaptive weighting w_φ(t): positional embedding of t, one linear layer, a bias (App. D); (B,) → (B,), float32.

    The bias starts at the optimum of an untrained network, so that the first steps are not spent on it: e^{w} D⁻¹ E‖·‖² = 1.
    """

    def __init__(self, bias: float, channels: int = 64) -> None:
        super().__init__()
        self.embed = PositionalEmbedding(channels)
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, t: Tensor) -> Tensor:
        return self.embed(t) @ self.weight / self.weight.numel() ** 0.5 + self.bias
