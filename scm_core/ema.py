# SPDX-License-Identifier: Apache-2.0
"""Averages of weights: EDM2's power-function EMA (paper App. G; Karras et al. 2024, §3)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent γ of the average whose relative width is σ_rel = √((γ+1) / ((γ+2)² (γ+3))) (EDM2, Eq. 123).

    γ is the largest real root of γ³ + 7 γ² + (16 − σ⁻²) γ + (12 − σ⁻²) = 0. σ_rel = 0.01, 0.05, 0.10 give 96.99, 16.97, 6.94.
    """
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"sigma_rel: expected a relative width in (0, 0.28), got {sigma_rel}")
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def power_beta(n: int, dn: int, gamma: float) -> float:
    """The factor β(n) = (1 − Δn/n)^{γ+1} that the old average keeps when n images have been seen, Δn of them since the last update."""
    return (1 - dn / n) ** (gamma + 1)


class PowerEma:
    """θ̂ ← β θ̂ + (1 − β) θ over the parameters of a network, with β = (1 − Δn/n)^{γ+1}."""

    def __init__(self, net: nn.Module, sigma_rel: float) -> None:
        self.sigma_rel = sigma_rel
        self.gamma = sigma_rel_to_gamma(sigma_rel)
        self.source = dict(net.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.source.items()}

    @torch.no_grad()
    def update(self, nimg: int, batch: int) -> None:
        """After a step that brought the number of images seen to `nimg`, `batch` of them new."""
        beta = power_beta(nimg, batch, self.gamma)
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.source.values()], 1 - beta)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""
        return self.average

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the averaged weights from `state`."""
        for name, average in self.average.items():
            average.copy_(state[name])
