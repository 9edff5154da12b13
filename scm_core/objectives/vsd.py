# SPDX-License-Identifier: Apache-2.0
"""Variational score distillation with adaptive weighting, alone and beside sCD (paper App. C; Wang et al. 2023, Yin et al. 2024).

Let q_t be the law of x_t = cos(t) x0 + sin(t) z for samples x0 = g_θ(z') of the generator, p_t that of the data. Then
∇_θ KL(q_t ‖ p_t) = E[(∇log q_t − ∇log p_t)(x_t) · cos(t) ∂x0/∂θ]. The scores come from two diffusion models, F_φ of the samples and
F_teacher of the data, by ∇log p_t = −(cos(t) σ_d F + sin(t) x_t)/(σ_d² sin(t)) (App. B). F has a minus sign there: the difference turns
round,

    ∇log q_t − ∇log p_t = cos(t)/(σ_d sin(t)) · (F_teacher − F_φ).

The loss e^{w(t)}/D ‖x0 − sg(x0) + F_teacher − F_φ‖² − w(t) has the gradient 2 e^w/D (F_teacher − F_φ) · ∂x0/∂θ, hence

    ∇_θ L_VSD = E_t[ 2 e^{w(t)}/D · σ_d sin(t)/cos²(t) · ∇_θ KL(q_t ‖ p_t) ]:

its descent is a descent of the divergences, each with a positive weight.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scm_core.guidance import evaluating, guided, sample_guidance
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import (
    Batch,
    Companion,
    Method,
    Objective,
    Terms,
    check_proposal,
    mean_square,
    noise_like,
    weighted,
)
from scm_core.objectives.consistency import check_guidance, check_guidance_input, required, scd
from scm_core.objectives.diffusion import diffusion_loss
from scm_core.trigflow import consistency_function, diffuse, sample_times, t_max, velocity
from scm_core.validate import check_like, check_positive

Range = tuple[float, float]


def generate(
    net: Callable[..., Tensor],
    z: Tensor,
    sigma_data: float,
    labels: Tensor | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """g_θ(z) = f_θ(sin(t_max) z, t_max), the one-step sample of noise z ~ N(0, σ_d² I) of shape (B, …), with its autograd graph.

    labels, guidance of shape (B,), or None. Raises ValueError for sigma_data ≤ 0 and for an F that is not of the shape of z.
    """
    x, t = math.sin(t_max(sigma_data)) * z, z.new_full(z.shape[:1], t_max(sigma_data))
    return consistency_function(net(x / sigma_data, t, labels, guidance), x, t, sigma_data)


def vsd_losses(x0: Tensor, F_teacher: Tensor, F_fake: Tensor, logvar: Tensor | None) -> Tensor:
    """e^{w(t)}/D ‖x0 − sg(x0) + F_teacher − F_φ‖² − w(t) of each sample, (B,) (App. C).

    x0 = g_θ(z') of shape (B, …) alone has a gradient; F_teacher and F_φ (same shape) are at (x_t/σ_d, t), x_t = cos(t) x0 + sin(t) z;
    w of shape (B,) or None (no adaptive weighting). Raises ValueError for other shapes.
    """
    check_like("F_teacher", F_teacher, x0, "x0")
    check_like("F_fake", F_fake, x0, "x0")
    return weighted(mean_square(x0 - x0.detach() + (F_teacher - F_fake).detach()), logvar)


def vsd_loss(x0: Tensor, F_teacher: Tensor, F_fake: Tensor, logvar: Tensor | None) -> Tensor:
    """The mean of `vsd_losses` over the batch, L_VSD."""
    return vsd_losses(x0, F_teacher, F_fake, logvar).mean()


class OneStepSampler:
    """What both steps of VSD draw: samples x0 = g_θ(z') for the batch's labels and, with a range of scales, for s ~ U[low, high].

    Raises ValueError for sigma_data ≤ 0, scales out of order, and scales for a network that says it has no guidance input; when called,
    for scales without labels and for a batch that is not in float32 or float64.
    """

    def __init__(self, net: nn.Module, sigma_data: float, guidance: Range | None) -> None:
        check_positive("sigma_data", sigma_data)
        check_guidance(guidance)
        check_guidance_input(net, guidance)
        self.net, self.sigma_data, self.guidance = net, sigma_data, guidance

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """(x0 (B, …), s (B,) or None); the batch's own x0 gives no more than its shape and type."""
        if self.guidance and batch.labels is None:
            raise ValueError("guidance: classifier-free guidance needs labels, got labels=None")
        z = noise_like(batch.x0, self.sigma_data, generator)
        s = sample_guidance(len(z), *self.guidance, generator, z.dtype) if self.guidance else None
        return generate(self.net, z, self.sigma_data, batch.labels, s), s


class FakeObjective:
    """F_φ's own: the diffusion loss e^{w(t)}/D ‖σ_d F_φ − v_t‖² − w(t) on samples x0 of the generator, detached (App. C).

    ln(σ_d tan t) ~ N(P_mean, P_std²); `logvar` is F_φ's head. With `fake_guidance` F_φ is told the scale that made the samples.
    Raises ValueError for a proposal out of range, and when called as `OneStepSampler` does.
    """

    def __init__(
        self, make: OneStepSampler, fake: nn.Module, logvar: nn.Module, P_mean: float, P_std: float, fake_guidance: bool
    ) -> None:
        check_proposal(P_mean, P_std, "fake_")
        self.make, self.fake, self.logvar, self.fake_guidance = make, fake, logvar, fake_guidance
        self.P_mean, self.P_std = P_mean, P_std

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        sigma_data = self.make.sigma_data
        with torch.no_grad():
            x0, s = self.make(batch, generator)
        z = noise_like(x0, sigma_data, generator)
        t = sample_times(len(x0), self.P_mean, self.P_std, sigma_data, generator, x0.dtype)
        told = s if self.fake_guidance else None
        F = self.fake(diffuse(x0, z, t) / sigma_data, t, batch.labels, told)
        return diffusion_loss(F, velocity(x0, z, t), self.logvar(t), sigma_data)._replace(t=t)


class VsdObjective:
    """L_VSD of the generator (`vsd_losses`): F_teacher, guided by s where there is a range, against F_φ, neither with dropout (App. C).

    ln(σ_d tan t) ~ N(P_mean, P_std²); `logvar` is the head w of L_VSD or None (no adaptive weighting). With `fake_guidance` F_φ is told s.
    In the first `delay` iterations F_φ learns alone: the loss moves w, and no weight of the generator.
    Raises ValueError for a proposal out of range and a negative delay, and when called as `OneStepSampler` does.
    """

    def __init__(
        self,
        make: OneStepSampler,
        teacher: nn.Module,
        fake: nn.Module,
        logvar: nn.Module | None,
        P_mean: float,
        P_std: float,
        fake_guidance: bool,
        delay: int = 0,
    ) -> None:
        check_proposal(P_mean, P_std, "vsd_")
        if delay < 0:
            raise ValueError(f"vsd_delay: expected a number of iterations >= 0, got {delay}")
        self.delay = delay
        self.make, self.teacher, self.fake, self.logvar = make, teacher, fake, logvar
        self.P_mean, self.P_std, self.fake_guidance = P_mean, P_std, fake_guidance

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        sigma_data, labels = self.make.sigma_data, batch.labels
        x0, s = self.make(batch, generator)
        z = noise_like(x0, sigma_data, generator)
        t = sample_times(len(x0), self.P_mean, self.P_std, sigma_data, generator, x0.dtype)
        x = diffuse(x0.detach(), z, t) / sigma_data
        with evaluating(self.teacher) as teacher, evaluating(self.fake) as fake:
            if s is None or labels is None:  # without labels there is no s
                F_teacher = teacher(x, t, labels)
            else:
                F_teacher = guided(teacher, x, t, labels, s)
            F_fake = fake(x, t, labels, s if self.fake_guidance else None)
        logvar = None if self.logvar is None else self.logvar(t)
        scalars = {"vsd_error": mean_square(F_teacher - F_fake).mean()}
        if logvar is not None:
            scalars["vsd_logvar"] = logvar.detach().mean()
        if iteration < self.delay:
            x0 = x0.detach() + 0 * x0  # with a gradient, which is zero
        losses = vsd_losses(x0, F_teacher, F_fake, logvar)
        return Terms(losses.mean(), scalars, t, losses.detach())


class SumObjective:
    """first + weight · second, each with draws of its own, also of t (L_sCD + λ L_VSD, App. C)."""

    def __init__(self, first: Objective, second: Objective, weight: float) -> None:
        self.first, self.second, self.weight = first, second, weight

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        a, b = self.first(batch, generator, iteration), self.second(batch, generator, iteration)
        return Terms(a.loss + self.weight * b.loss, {**a.scalars, **b.scalars})


def fake_network(net: nn.Module, teacher: nn.Module, guidance_input: bool) -> nn.Module:
    """F_φ at its start, trainable: a copy of the teacher; with `guidance_input` one of the student's form (and dropout), with the teacher's
    weights and a guidance input that is zero again, which is the teacher's function at every scale.

    Raises ValueError if the student has no guidance input or is not of the teacher's architecture and size.
    """
    if not guidance_input:
        return copy.deepcopy(teacher).requires_grad_(True)
    fake = copy.deepcopy(net).requires_grad_(True)
    student, given = fake.state_dict(), teacher.state_dict()
    own = [key for key in student if key not in given]
    unknown = [key for key in own if "guidance" not in key] + [key for key in given if key not in student]
    sizes = {key: (tuple(student[key].shape), tuple(given[key].shape)) for key in student if key in given}
    other = [key for key, (mine, its) in sizes.items() if mine != its]
    if unknown or other or not own:
        why = "the student has no guidance input of its own"
        if unknown:
            why = f"{unknown[0]} is not in both"
        elif other:
            why = "{} has shape {}, the teacher's {}".format(other[0], *sizes[other[0]])
        raise ValueError(f"fake_guidance: expected a student that is the teacher and a guidance input; {why}")
    fake.load_state_dict(given, strict=False)
    with torch.no_grad():  # zero the gain alone, where there is one: gain and weight both at zero would never leave it
        for key in [key for key in own if key.endswith("guidance_gain")] or own:
            fake.get_parameter(key).zero_()
    return fake


def vsd(
    net: nn.Module,
    teacher: nn.Module | None,
    sigma_data: float,
    shape: tuple[int, ...],
    *,
    guidance: Range | None = None,
    adaptive_weighting: bool = True,
    vsd_P_mean: float = 0.4,
    vsd_P_std: float = 2.0,
    fake_P_mean: float = -0.8,
    fake_P_std: float = 1.6,
    fake_guidance: bool = True,
    fake_lr: float | None = None,
    vsd_delay: int = 0,
) -> Method:
    """Adaptive VSD (App. C, whose proposals are the defaults): the student is the generator, F_φ the companion `fake`.

    `guidance` is the range of s ~ U[low, high] for teacher and student; `fake_guidance`: F_φ is told s as well, for it has to model the
    samples *given* s (the mixture over s is another distribution, of another score). `fake_lr` is F_φ's learning rate, None the student's;
    in the first `vsd_delay` iterations it learns alone.

    Raises ValueError for options out of range, without a teacher, and for `fake_guidance` where the student has no guidance input.
    """
    teacher, told = required(teacher), guidance is not None and fake_guidance
    make, fake = OneStepSampler(net, sigma_data, guidance), fake_network(net, teacher, told)
    # Both F are of unit variance: two that know nothing of each other differ by 2 at most, F_φ and the teacher at the start (one network
    # on samples that are near the mean) by less than 1. Bias 0 never overrates the first steps' difference; w follows as it shrinks.
    heads: dict[str, nn.Module] = {"vsd_logvar": LogVarHead(bias=0.0)} if adaptive_weighting else {}
    # the diffusion loss of v_t, whose elements have the variance σ_d²: e^{w} σ_d² = 1
    own = LogVarHead(bias=-2 * math.log(sigma_data))
    companion = Companion(fake, {"logvar": own}, FakeObjective(make, fake, own, fake_P_mean, fake_P_std, told), fake_lr)
    objective = VsdObjective(make, teacher, fake, heads.get("vsd_logvar"), vsd_P_mean, vsd_P_std, told, vsd_delay)
    return Method(objective, heads, {"fake": companion})


def scd_vsd(
    net: nn.Module,
    teacher: nn.Module | None,
    sigma_data: float,
    shape: tuple[int, ...],
    *,
    guidance: Range | None = None,
    adaptive_weighting: bool = True,
    vsd_weight: float = 1.0,
    vsd_P_mean: float = 0.4,
    vsd_P_std: float = 2.0,
    fake_P_mean: float = -0.8,
    fake_P_std: float = 1.6,
    fake_guidance: bool = True,
    fake_lr: float | None = None,
    vsd_delay: int = 0,
    **options: Any,
) -> Method:
    """sCD + VSD: L_sCD + λ L_VSD, λ = `vsd_weight` (App. C: 1); `options` are those of `scd`, the others those of `vsd`.

    Raises ValueError for options out of range, and without a teacher.
    """
    check_positive("vsd_weight", vsd_weight)
    shared: dict[str, Any] = {"guidance": guidance, "adaptive_weighting": adaptive_weighting}
    first = scd(net, teacher, sigma_data, shape, **shared, **options)
    second = vsd(
        net,
        teacher,
        sigma_data,
        shape,
        **shared,
        vsd_P_mean=vsd_P_mean,
        vsd_P_std=vsd_P_std,
        fake_P_mean=fake_P_mean,
        fake_P_std=fake_P_std,
        fake_guidance=fake_guidance,
        fake_lr=fake_lr,
        vsd_delay=vsd_delay,
    )
    objective = SumObjective(first.objective, second.objective, vsd_weight)
    return Method(objective, {**first.heads, **second.heads}, second.companions)
