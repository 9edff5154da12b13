# SPDX-License-Identifier: Apache-2.0
"""Gaussian data, for which diffusion model, PF-ODE and consistency function are known in closed form.

For independent x0_i ~ N(m_i, λ_i²): x_t,i ~ N(cos t m_i, s_i²) with s_i² = cos²t λ_i² + sin²t σ_d². E[x0 | x_t] and E[z | x_t] make the
PF-ODE dx/dt = −sin t m + (s'/s) (x − cos t m), which carries (x − cos t m)/s along unchanged: f(x, t) = m + (λ/s(t)) (x − cos t m).
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (1, 2, 3)  # six dimensions, each with a variance of its own


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of that seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, diag(std²)), std unlike σ_d in all dimensions but one; times have shape (B,)."""

    mean: Tensor
    std: Tensor

    def sample(self, count: int, seed: int) -> Tensor:
        return self.mean + self.std * normal(count, *SHAPE, seed=seed)

    def s(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t."""
        return (torch.cos(t) ** 2 * self.std**2 + torch.sin(t) ** 2 * SIGMA_DATA**2).sqrt()

    def denoiser(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + σ ε = x], in EDM's variables."""
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)

    def ode(self, x: Tensor, t: Tensor) -> Tensor:
        """dx_t/dt = cos t E[z | x_t] − sin t E[x0 | x_t]."""
        t = t[:, None, None, None]
        residual = (x - torch.cos(t) * self.mean) / self.s(t) ** 2
        x0 = self.mean + torch.cos(t) * self.std**2 * residual
        z = torch.sin(t) * SIGMA_DATA**2 * residual
        return torch.cos(t) * z - torch.sin(t) * x0

    def consistency(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t), the end at t = 0 of the PF-ODE through (x, t)."""
        t = t[:, None, None, None]
        return self.mean + self.std / self.s(t) * (x - torch.cos(t) * self.mean)

    def along_the_ode(self, x: Tensor, t: float, s: float) -> Tensor:
        """Where the PF-ODE through (x, t) is at time s."""
        ends = torch.tensor([t, s], dtype=F64)
        at_t, at_s = self.s(ends[0]), self.s(ends[1])
        return torch.cos(ends[1]) * self.mean + at_s / at_t * (x - torch.cos(ends[0]) * self.mean)

    def start(self, count: int, t: float, seed: int) -> Tensor:
        """Samples of x_t."""
        tb = torch.tensor(t, dtype=F64)
        return torch.cos(tb) * self.mean + self.s(tb) * normal(count, *SHAPE, seed=seed)

    def diffusion_net(self, x: Tensor, t: Tensor) -> Tensor:
        """The optimal F of a diffusion model, E[v_t | x_t]/σ_d, of x = x_t/σ_d."""
        return self.ode(SIGMA_DATA * x, t) / SIGMA_DATA

    def consistency_net(self, x: Tensor, t: Tensor) -> Tensor:
        """The F of the true consistency function, (cos t x_t − f)/(σ_d sin t), of x = x_t/σ_d."""
        x_t, tb = SIGMA_DATA * x, t[:, None, None, None]
        return (torch.cos(tb) * x_t - self.consistency(x_t, t)) / (SIGMA_DATA * torch.sin(tb))


@pytest.fixture(scope="session")
def data() -> Gaussian:
    """Six dimensions, from narrow to wide."""
    return Gaussian(
        mean=torch.tensor([0.0, 0.3, -0.7, 0.1, 1.0, -0.2], dtype=F64).reshape(SHAPE),
        std=torch.tensor([0.05, 0.2, 0.4, 0.5, 0.9, 1.5], dtype=F64).reshape(SHAPE),
    )
