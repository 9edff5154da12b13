# SPDX-License-Identifier: Apache-2.0
"""Magnitude-preserving layers of EDM2 (Karras et al. 2024, App. B) on tensors or (value, tangent) pairs.

Weights are kept at unit variance per element for each output (`normalize_weights`, once after each optimizer step: EDM2's forced
weight normalisation) and are scaled by 1/√fan_in in the forward, so that activations keep their magnitude.
"""

import math

import torch
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.dual import Maybe

SILU_GAIN = 1 / 0.596  # silu of a unit Gaussian has RMS 0.596 (EDM2, Eq. 81)


class MPWeight(nn.Module):
    """A weight whose rows are kept at unit RMS, used as W / √fan_in · gain."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.fan_in = math.prod(shape[1:])
        self.normalize_()

    @torch.no_grad()
    def normalize_(self) -> None:
        """Bring each output's weights back to unit RMS: w ← w √fan_in / ‖w‖ (EDM2, Eq. 47)."""
        dims = tuple(range(1, self.weight.ndim))  # no flatten(1): of channels-last weights it is a copy
        rms = torch.linalg.vector_norm(self.weight, dim=dims, keepdim=True).div_(math.sqrt(self.fan_in))
        self.weight.div_(rms.clamp_(min=1e-20))

    def scaled(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight as it is applied: gain · W / √fan_in."""
        return self.weight * (gain / math.sqrt(self.fan_in))


class MPLinear(MPWeight):
    """x (B, in) → (B, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs)

    def forward(self, x: Maybe, gain: Tensor | float = 1.0) -> Maybe:
        return dual.linear(x, self.scaled(gain))


class MPConv(MPWeight):
    """x (B, in, H, W) → (B, out, H, W), kernel × kernel, the resolution kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(outputs, inputs, kernel, kernel)

    def forward(self, x: Maybe, gain: Tensor | float = 1.0) -> Maybe:
        return dual.conv2d(x, self.scaled(gain))


def normalize_weights(net: nn.Module) -> None:
    """Forced weight normalisation of every layer of `net`; to be called once after each optimizer step."""
    for module in net.modules():
        if isinstance(module, MPWeight):
            module.normalize_()


def mp_silu(x: Maybe) -> Maybe:
    """SiLU scaled to keep unit variance (EDM2, Eq. 81)."""
    return dual.silu(x, SILU_GAIN)


def adaptive_double_norm(x: Maybe, scale_shift: Maybe) -> Maybe:
    """y = norm(x) ⊙ pnorm(s) + pnorm(b), the paper's replacement of AdaGN (§4.1, Eq. 8).

    x is (B, C, H, W); `scale_shift` is (B, 2C) and holds s, then b. norm and pnorm both divide by the RMS over the channels.
    """
    s, b = dual.chunk(dual.rearrange(scale_shift, lambda v: v[:, :, None, None]), 2)
    y = dual.multiply(dual.rms_normalize(x), dual.rms_normalize(s))
    return dual.add(y, dual.rms_normalize(b))
