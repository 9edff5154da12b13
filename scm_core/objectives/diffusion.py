# SPDX-License-Identifier: Apache-2.0
"""The diffusion objective of TrigFlow: velocity prediction with adaptive weighting (paper §3, App. D)."""

import torch
from torch import Tensor, nn

from scm_core.objectives import Batch, Terms, check_proposal, mean_square, noise_like, weighted
from scm_core.seeds import uniform
from scm_core.trigflow import diffuse, sample_times, velocity
from scm_core.validate import check_fraction, check_like, check_positive


def diffusion_loss(F: Tensor, v_t: Tensor, logvar: Tensor, sigma_data: float) -> Terms:
    """e^{w(t)}/D · ‖σ_d F − v_t‖² − w(t), averaged over the batch (§3); F, v_t (B, …), logvar w(t) (B,), D elements a sample.

    Raises ValueError for other shapes.
    """
    check_like("F", F, v_t, "v_t")
    error = mean_square(sigma_data * F - v_t)
    losses = weighted(error, logvar)
    return Terms(losses.mean(), {"velocity_error": error.detach().mean()}, error=losses.detach())


class DiffusionObjective:
    """The teacher's: e^{w(t)}/D · ‖σ_d F(x_t/σ_d, t, labels) − v_t‖² − w(t), x_t = cos(t) x0 + sin(t) z, v_t = cos(t) z − sin(t) x0 (§3).

    ln(σ_d tan t) ~ N(P_mean, P_std²), both in units of ln σ; z ~ N(0, σ_d² I). `logvar` is the head w: t (B,) → (B,). Each label becomes
    −1 (none) with the probability `label_dropout`, in [0, 1], so that the network also learns the unconditional F that guidance needs.

    Called with x0 of shape (B, …) in float32 or float64, in which all of a step's numbers then are, and labels (B,) or None.
    Raises ValueError for options out of range, and, when called, for x0 of another type.
    """

    def __init__(
        self,
        net: nn.Module,
        logvar: nn.Module,
        sigma_data: float,
        P_mean: float,
        P_std: float,
        label_dropout: float = 0.0,
    ) -> None:
        check_positive("sigma_data", sigma_data)
        check_proposal(P_mean, P_std)
        check_fraction("label_dropout", label_dropout)
        self.net, self.logvar, self.sigma_data = net, logvar, sigma_data
        self.P_mean, self.P_std, self.label_dropout = P_mean, P_std, label_dropout

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        x0, labels = batch.x0, batch.labels
        z = noise_like(x0, self.sigma_data, generator)
        t = sample_times(len(x0), self.P_mean, self.P_std, self.sigma_data, generator, x0.dtype)
        if labels is not None and self.label_dropout:
            dropped = uniform(generator, len(x0)) < self.label_dropout
            labels = labels.masked_fill(dropped, -1)
        F = self.net(diffuse(x0, z, t) / self.sigma_data, t, labels)
        return diffusion_loss(F, velocity(x0, z, t), self.logvar(t), self.sigma_data)._replace(t=t)
