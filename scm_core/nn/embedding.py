# SPDX-License-Identifier: Apache-2.0
"""Embeddings of the time t and of the guidance scale s, and the head of the adaptive weighting (paper §4.1, App. D, G)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe
from scm_core.validate import check_positive

Embedding = Literal["positional", "fourier"]
NoiseInput = Literal["t", "edm"]
Waves = Sequence[Sequence[float]]  # frequencies, phases


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


class FourierEmbedding(nn.Module):
    """c (B,) → √2 cos(2π scale·f_k c + φ_k), shape (B, channels), f_k ~ N(0, 1), φ_k ~ U[0, 2π] (EDM2, Eq. 75).

    Frequencies and phases are a function of `seed`, since model files hold parameters only, or `waves` gives them, in radians: 2π scale·f
    and φ of an imported network. With EDM's scale, 16, phases reach hundreds of radians: they are computed in float64, whatever the format
    of c, which the result has.

    Raises ValueError for channels < 1, a scale that is not positive, or waves of another number.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int, scale: float, seed: int = 0, waves: Waves | None = None) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected a positive number, got {channels}")
        check_positive("scale", scale)
        generator, f64 = torch.Generator("cpu").manual_seed(seed), torch.float64
        frequencies = torch.randn(channels, generator=generator, dtype=f64, device="cpu") * (2 * math.pi * scale)
        phases = torch.rand(channels, generator=generator, dtype=f64, device="cpu") * (2 * math.pi)
        if waves is not None:
            if len(waves) != 2 or any(len(part) != channels for part in waves):
                raise ValueError(f"waves: expected {channels} frequencies and as many phases")
            frequencies, phases = (torch.tensor(part, dtype=f64, device="cpu") for part in waves)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("phases", phases, persistent=False)

    def forward(self, c: Maybe) -> Maybe:
        dtype, f64 = dual.value_of(c).dtype, torch.float64
        phase = dual.add(dual.outer(dual.cast(c, f64), self.frequencies.to(f64)), self.phases.to(f64))
        return dual.cast(dual.scale(dual.cosine(phase), math.sqrt(2)), dtype)


class TimeEmbedding(nn.Module):
    """t (B,) in radians → embedding of c_noise(t), (B, channels), of unit mean square and in the format of t (§4.1).

    `c_noise` "t" is the identity; "edm" is ¼ ln(σ_d tan t) for t in (0, π/2), EDM's ¼ ln σ. `embedding` "positional" is the paper's,
    "fourier" EDM2's with frequencies of standard deviation `fourier_scale` (in periods) drawn from `fourier_seed`, or with `waves`;
    Figure 4 compares them. "edm" is computed in float64.

    Raises ValueError for another `embedding` or `c_noise`, waves for an embedding without any, and for what the embedding refuses.
    """

    def __init__(
        self,
        channels: int,
        embedding: Embedding = "positional",
        c_noise: NoiseInput = "t",
        fourier_scale: float = 1.0,
        fourier_seed: int = 0,
        sigma_data: float = 0.5,
        waves: Waves | None = None,
    ) -> None:
        super().__init__()
        if c_noise not in ("t", "edm"):
            raise ValueError(f"c_noise: expected 't' or 'edm', got {c_noise!r}")
        check_positive("sigma_data", sigma_data)
        if waves is not None and embedding != "fourier":
            raise ValueError(f"waves: expected None for embedding {embedding!r}, got some")
        if embedding == "positional":
            self.embed: nn.Module = PositionalEmbedding(channels)
        elif embedding == "fourier":
            self.embed = FourierEmbedding(channels, fourier_scale, fourier_seed, waves)
        else:
            raise ValueError(f"embedding: expected 'positional' or 'fourier', got {embedding!r}")
        self.log_sigma_data = math.log(sigma_data) if c_noise == "edm" else None

    def forward(self, t: Maybe) -> Maybe:
        if self.log_sigma_data is None:
            return self.embed(t)
        # in float64: a Fourier embedding of scale 16 multiplies c's rounding by hundreds
        log_tan = dual.log_tan(dual.cast(t, torch.float64))
        offset = torch.full_like(dual.value_of(log_tan), self.log_sigma_data)
        return dual.cast(self.embed(dual.scale(dual.add(log_tan, offset), 0.25)), dual.value_of(t).dtype)


class LogVarHead(nn.Module):
    """Adaptive weighting w_φ(t): positional embedding of t, one linear layer, a bias (App. D); (B,) → (B,), in the format of its weights.

    The bias starts at the optimum of an untrained network, so that the first steps are not spent on it: e^{w} D⁻¹ E‖·‖² = 1.
    """

    def __init__(self, bias: float, channels: int = 64) -> None:
        super().__init__()
        self.embed = PositionalEmbedding(channels)
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, t: Tensor) -> Tensor:
        return self.embed(t).to(self.weight.dtype) @ self.weight / self.weight.numel() ** 0.5 + self.bias
