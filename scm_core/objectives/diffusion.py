# SPDX-License-Identifier: Apache-2.0
"""The diffusion objective of TrigFlow: velocity prediction with adaptive weighting (paper §3, App. D)."""

import torch
from torch import Tensor, nn

from scm_core.objectives import Batch, Terms, adaptive_weighting, mean_square
from scm_core.seeds import normal, uniform
from scm_core.trigflow import diffuse, sample_times, velocity


def diffusion_loss(F: Tensor, v_t: Tensor, logvar: Tensor, sigma_data: float) -> Terms:
    """e^{w(t)}/D · ‖σ_d F − v_t‖² − w(t), averaged over the batch; F, v_t (B, …), logvar w(t) (B,)."""
    error = mean_square(sigma_data * F - v_t)
    return Terms(adaptive_weighting(error, logvar), {"velocity_error": error.detach().mean()})


class DiffusionObjective:
    """Draws t and z, drops labels, and gives the loss of the teacher."""

    def __init__(
        self,
        net: nn.Module,
        logvar: nn.Module,
        sigma_data: float,
        P_mean: float,
        P_std: float,
        label_dropout: float = 0.0,
    ) -> None:
        self.net, self.logvar, self.sigma_data = net, logvar, sigma_data
        self.P_mean, self.P_std, self.label_dropout = P_mean, P_std, label_dropout

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        x0, labels = batch.x0, batch.labels
        z = normal(generator, *x0.shape) * self.sigma_data
        t = sample_times(len(x0), self.P_mean, self.P_std, self.sigma_data, generator)
        if labels is not None and self.label_dropout:
            dropped = uniform(generator, len(x0)) < self.label_dropout
            labels = labels.masked_fill(dropped, -1)
        F = self.net(diffuse(x0, z, t) / self.sigma_data, t, labels)
        return diffusion_loss(F, velocity(x0, z, t), self.logvar(t), self.sigma_data)
