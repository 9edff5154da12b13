# SPDX-License-Identifier: Apache-2.0
"""Continuous-time consistency models, Algorithm 1: sCT and sCD differ only in the velocity they follow (paper §4, §5)."""

from functools import partial

import torch
from torch import Tensor, nn

from scm_core.guidance import VelocityFn, sample_guidance
from scm_core.nn.dual import Dual, Maybe
from scm_core.objectives import Batch, Terms, adaptive_weighting, mean_square
from scm_core.tangent import Normalize, tangent
from scm_core.trigflow import diffuse, sample_times, velocity


def scm_loss(F: Tensor, F_minus: Tensor, g: Tensor, logvar: Tensor) -> Tensor:
    """e^{w(t)}/D · ‖F − F⁻ − g‖² − w(t), averaged over the batch (Eq. 8 of the paper's §4.2); its gradient is −2 e^w/D · g ∂F/∂θ."""
    return adaptive_weighting(mean_square(F - F_minus - g), logvar)


class ConsistencyObjective:
    """Algorithm 1. `velocity_fn` is `data_velocity` (sCT) or `teacher_velocity(teacher)` (sCD).

    `guidance` is the range of the scale s ~ U[low, high] for a student with a guidance input, or None. `warmup` is H, in iterations.
    """

    def __init__(
        self,
        net: nn.Module,
        logvar: nn.Module,
        velocity_fn: VelocityFn,
        sigma_data: float,
        P_mean: float,
        P_std: float,
        warmup: int,
        normalize: Normalize = "norm",
        c: float = 0.1,
        guidance: tuple[float, float] | None = None,
    ) -> None:
        self.net, self.logvar, self.velocity_fn, self.sigma_data = net, logvar, velocity_fn, sigma_data
        self.P_mean, self.P_std, self.warmup, self.normalize, self.c = P_mean, P_std, warmup, normalize, c
        self.guidance = guidance

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        x0, labels = batch.x0, batch.labels
        z = torch.randn(x0.shape, generator=generator, device=x0.device) * self.sigma_data
        t = sample_times(len(x0), self.P_mean, self.P_std, self.sigma_data, generator)
        s = sample_guidance(len(x0), *self.guidance, generator) if self.guidance else None
        x_t = diffuse(x0, z, t)
        dxdt = self.velocity_fn(x_t, t, velocity(x0, z, t), labels, s)
        r = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        net = _Conditioned(self.net, labels, s)
        F, g, norm = tangent(net, x_t, t, dxdt, self.sigma_data, r, self.normalize, self.c)
        logvar = self.logvar(t)
        loss = scm_loss(F, F.detach(), g, logvar)
        return Terms(
            loss, {"tangent_norm": norm.mean(), "tangent_norm_max": norm.max(), "logvar": logvar.detach().mean()}
        )


class _Conditioned:
    """net(·, ·, labels, guidance) as a function of (x, t), with the network's own way to carry tangents."""

    def __init__(self, net: nn.Module, labels: Tensor | None, guidance: Tensor | None) -> None:
        self.call = partial(net, labels=labels, guidance=guidance)
        self.supports_dual = getattr(net, "supports_dual", False)

    def __call__(self, x: Maybe, t: Maybe) -> Tensor | Dual:
        return self.call(x, t)
