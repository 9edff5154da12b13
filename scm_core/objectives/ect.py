# SPDX-License-Identifier: Apache-2.0
"""Easy Consistency Tuning (Geng et al. 2024, "Consistency Models Made Easy", arXiv 2406.14548), the baseline of Table E3.

Its times t > r ≥ 0 are EDM noise levels σ; x_t = x0 + t ε and x_r = x0 + r ε share x0 and ε. With θ = arctan(σ/σ_d) and z = σ_d ε,
TrigFlow's cos(θ) x0 + sin(θ) z is cos(θ) x_σ, and its consistency function is one of x_σ and σ with EDM's c_skip and c_out, so that the
network is that of every other method. The distance of t to r falls in stages from t (r = 0: a diffusion model, the start) towards 0.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scm_core.objectives import Batch, Method, Terms, check_proposal, noise_like
from scm_core.objectives.consistency import without_guidance
from scm_core.objectives.discrete import pass_before
from scm_core.seeds import normal
from scm_core.trigflow import consistency_function, diffuse, sigma_to_t
from scm_core.validate import check_like, check_positive


def ect_gap(t: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """t − r for r/t = max(0, 1 − n(t)/q^a), n(t) = 1 + k sigmoid(−b t), a the stage (its §3.3 and App. A, Eq. 18); t, r are EDM's σ."""
    return t * ((1 + k * torch.sigmoid(-b * t)) * q**-stage).clamp(max=1)


def ect_losses(f_t: Tensor, f_r: Tensor, gap: Tensor, c: float) -> Tensor:
    """(√(‖f_t − f_r‖² + c²) − c) / (t − r) of each sample, (B,); f_r is a constant; f of shape (B, …), gap t − r of shape (B,).

    Pseudo-Huber is the squared distance with the adaptive weight 1/√(‖·‖² + c²) (its App. A); metric and weighting 1/(t − r) are those of
    Song and Dhariwal (2023), who take c = 0.00054 √D (0.03 for CIFAR-10). Which c the published run had we have not been able to verify.
    Raises ValueError for other shapes.
    """
    check_like("f_r", f_r, f_t, "f_t")
    square = (f_t - f_r.detach()).square().flatten(1).sum(1)
    check_like("gap", gap, square, "the distances")
    # √(d² + c²) − c = d²/(√(d² + c²) + c), without the difference, which leaves nothing of d ≪ c in float32
    return square / ((square + c**2).sqrt() + c) / gap


def ect_loss(f_t: Tensor, f_r: Tensor, gap: Tensor, c: float) -> Tensor:
    """The mean of `ect_losses` over the batch."""
    return ect_losses(f_t, f_r, gap, c).mean()


class EctObjective:
    """ECT from the data: ln t ~ N(P_mean, P_std²), t an EDM σ; stage a = ⌈i/d⌉ at the i-th iteration, d = `stage_iterations`, up to
    `stages`, the last; q, k, b of `ect_gap`.

    Its CIFAR-10 run of 200k iterations is published with eight stages of q = 2, to t − r = n(t) t/256: d = 25k; that runs of another
    length keep eight is our reading. c is not certain either: see `ect_losses`. One dropout mask for both passes.

    Raises ValueError for options out of range, and for so many stages that float32 cannot tell t from r, and, when called, for x0 that is
    not in float32 or float64.
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
        stages: int = 8,
    ) -> None:
        check_proposal(P_mean, P_std)
        for name, value in {"sigma_data": sigma_data, "c": c, "b": b}.items():
            check_positive(name, value)
        if stage_iterations < 1:
            raise ValueError(f"stage_iterations: expected at least 1, got {stage_iterations}")
        if not 1 < q < math.inf:
            raise ValueError(f"q: expected a finite number > 1, by which t − r shrinks at each stage, got {q}")
        if not 0 <= k < math.inf:
            raise ValueError(f"k: expected a finite number >= 0, got {k}")
        if stages < 1 or stages * math.log(q) > -math.log(torch.finfo(torch.float32).eps):
            raise ValueError(
                f"stages: expected at least 1 and few enough that float32 holds 1 − q^−stages, got {stages}"
            )
        self.net, self.sigma_data, self.P_mean, self.P_std = net, sigma_data, P_mean, P_std
        self.stage_iterations, self.stages, self.c, self.q, self.k, self.b = stage_iterations, stages, c, q, k, b

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        x0, net = batch.x0, partial(self.net, labels=batch.labels)
        z = noise_like(x0, self.sigma_data, generator)
        tau = normal(generator, len(x0), dtype=x0.dtype)
        t = torch.exp(self.P_mean + self.P_std * tau)
        stage = min(iteration // self.stage_iterations + 1, self.stages)  # ⌈i/d⌉ of iterations counted from 1
        gap = ect_gap(t, stage, self.q, self.k, self.b)
        theta, theta_r = sigma_to_t(t, self.sigma_data), sigma_to_t(t - gap, self.sigma_data)
        x_t, x_r = diffuse(x0, z, theta), diffuse(x0, z, theta_r)
        # f(x, 0) = x whatever F is; a network of ln tan θ has none there, so that it is asked at another time
        F_r = pass_before(net, x_r / self.sigma_data, torch.where(theta_r > 0, theta_r, theta))
        F = net(x_t / self.sigma_data, theta)
        f_t = consistency_function(F, x_t, theta, self.sigma_data)
        f_r = consistency_function(F_r, x_r, theta_r, self.sigma_data)
        scalars = {"distance": (f_t - f_r).detach().flatten(1).norm(dim=1).mean(), "gap": (gap / t).mean()}
        losses = ect_losses(f_t, f_r, gap, self.c)
        return Terms(losses.mean(), scalars, theta, losses.detach())


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
