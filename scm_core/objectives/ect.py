# SPDX-License-Identifier: Apache-2.0
"""Easy Consistency Tuning (Geng et al. 2024, "Consistency Models Made Easy", arXiv 2406.14548), the baseline of Table E3.

Its times t > r ≥ 0 are EDM noise levels σ; x_t = x0 + t ε and x_r = x0 + r ε share x0 and ε. With θ = arctan(σ/σ_d) and z = σ_d ε,
TrigFlow's cos(θ) x0 + sin(θ) z is cos(θ) x_σ, and its consistency function is one of x_σ and σ with EDM's c_skip and c_out, so that the
network is that of every other method. The distance of t to r falls in stages from t (r = 0: a diffusion model, the start) towards 0.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scm_core.objectives import Batch, Method, Terms, check_positive
from scm_core.objectives.consistency import without_guidance
from scm_core.objectives.discrete import pass_before
from scm_core.seeds import normal
from scm_core.trigflow import consistency_function, diffuse, sigma_to_t


def ect_gap(t: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """t − r for r/t = max(0, 1 − n(t)/q^a), n(t) = 1 + k sigmoid(−b t), a the stage (its §3.3 and App. A, Eq. 18); t, r are EDM's σ."""
    return t * ((1 + k * torch.sigmoid(-b * t)) * q**-stage).clamp(max=1)


def ect_loss(f_t: Tensor, f_r: Tensor, gap: Tensor, c: float) -> Tensor:
    """(√(‖f_t − f_r‖² + c²) − c) / (t − r), averaged over the batch; f_r is a constant; f of shape (B, …), gap t − r of shape (B,).

    Pseudo-Huber is the squared distance with the adaptive weight 1/√(‖·‖² + c²) (its App. A); metric and weighting 1/(t − r) are those of
    Song and Dhariwal (2023), who take c = 0.00054 √D (0.03 for CIFAR-10). Which c the published run had we have not been able to verify.
    """
    distance = ((f_t - f_r.detach()).square().flatten(1).sum(1) + c**2).sqrt() - c
    return (distance / gap).mean()


class EctObjective:
    """ECT from the data: ln t ~ N(P_mean, P_std²); stage a = ⌈i/d⌉ at the i-th iteration, d = `stage_iterations`; q, k, b of `ect_gap`.

    Its CIFAR-10 run of 200k iterations is published with eight stages of q = 2, to t − r = n(t) t/256: d = 25k; that runs of another
    length keep eight is our reading. c is not certain either: see `ect_loss`. One dropout mask for both passes.

    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        sigma_data: float,
        P_mean: float,
        P_std: float,
        stage_iterations: int,
        c: float,
        q: float = 2.0,
        k: float = 8.0,
        b: float = 1.0,
    ) -> None:
        for name, value in {"P_std": P_std, "c": c, "b": b}.items():
            check_positive(name, value)
        if stage_iterations < 1:
            raise ValueError(f"stage_iterations: expected at least 1, got {stage_iterations}")
        if not q > 1:
            raise ValueError(f"q: expected a number > 1, by which t − r shrinks at each stage, got {q}")
        if not k >= 0:
            raise ValueError(f"k: expected a number >= 0, got {k}")
        self.net, self.sigma_data, self.P_mean, self.P_std = net, sigma_data, P_mean, P_std
        self.stage_iterations, self.c, self.q, self.k, self.b = stage_iterations, c, q, k, b

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        x0, net = batch.x0, partial(self.net, labels=batch.labels)
        z = normal(generator, *x0.shape) * self.sigma_data
        tau = normal(generator, len(x0))
        t = torch.exp(self.P_mean + self.P_std * tau)
        stage = iteration // self.stage_iterations + 1  # ⌈i/d⌉ of iterations counted from 1
        gap = ect_gap(t, stage, self.q, self.k, self.b)
        theta, theta_r = sigma_to_t(t, self.sigma_data), sigma_to_t(t - gap, self.sigma_data)
        x_t, x_r = diffuse(x0, z, theta), diffuse(x0, z, theta_r)
        F_r = pass_before(net, x_r / self.sigma_data, theta_r)
        F = net(x_t / self.sigma_data, theta)
        f_t = consistency_function(F, x_t, theta, self.sigma_data)
        f_r = consistency_function(F_r, x_r, theta_r, self.sigma_data)
        scalars = {"distance": (f_t - f_r).detach().flatten(1).norm(dim=1).mean(), "gap": (gap / t).mean()}
        return Terms(ect_loss(f_t, f_r, gap, self.c), scalars)


def ect(
    net: nn.Module,
    teacher: nn.Module | None,
    sigma_data: float,
    shape: tuple[int, ...],
    *,
    guidance: tuple[float, float] | None = None,
    **options: Any,
) -> Method:
    """Easy Consistency Tuning: no head (its weighting is fixed), no companion. `options` are those of `EctObjective`; P = (−1.0, 1.8) and
    dropout 0.20 for Table E3.

    Raises ValueError for options out of range, and for guidance.
    """
    without_guidance(guidance)
    return Method(EctObjective(net, sigma_data, **options), {}, {})
