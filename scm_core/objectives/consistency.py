# SPDX-License-Identifier: Apache-2.0
"""Continuous-time consistency models, Algorithm 1: sCT and sCD differ only in the velocity they follow (paper §4, §5)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from scm_core.engines import Engine, Net
from scm_core.guidance import VelocityFn, data_velocity, sample_guidance, teacher_velocity
from scm_core.nn.dual import Dual, Maybe
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch, Method, Terms, check_proposal, mean_square, noise_like, weighted
from scm_core.tangent import Normalize, Tangent, tangent
from scm_core.trigflow import diffuse, sample_times, velocity
from scm_core.validate import check_like, check_positive


def scm_losses(F: Tensor, F_minus: Tensor, g: Tensor, logvar: Tensor | None) -> Tensor:
    """e^{w(t)}/D · ‖F − F⁻ − g‖² − w(t) of each sample, (B,) (§4.2, Algorithm 1); its gradient is −2 e^w/D · g ∂F/∂θ.

    F, F⁻ and g of shape (B, …), w of shape (B,) or None (no adaptive weighting). Raises ValueError for other shapes.
    """
    check_like("F_minus", F_minus, F, "F")
    check_like("g", g, F, "F")
    return weighted(mean_square(F - F_minus - g), logvar)


def scm_loss(F: Tensor, F_minus: Tensor, g: Tensor, logvar: Tensor | None) -> Tensor:
    """The mean of `scm_losses` over the batch, the loss of Algorithm 1."""
    return scm_losses(F, F_minus, g, logvar).mean()


class ConsistencyObjective:
    """Algorithm 1. `velocity_fn` is `data_velocity` (sCT) or `teacher_velocity(teacher)` (sCD).

    `logvar` is the head of the adaptive weighting, t (B,) → w (B,), or None. The proposal is ln(σ_d tan t) ~ N(P_mean, P_std²): both are in
    units of ln σ. `warmup` is H, in iterations (0: none). `normalize`: the tangent g becomes g/(‖g‖ + c) ("norm"), is clipped to [−1, 1]
    ("clip") or stays ("none"); c > 0 is in the units of g, those of the data. `guidance` is the range (low, high) of the scale
    s ~ U[low, high] for a student with a guidance input and a teacher, or None. `engine` computes the derivative: see
    `scm_core.engines.value_and_jvp`. Discrete-time and multistep methods override `times` and `tangent`.

    Called with x0 of shape (B, …) in float32 or float64, in which all of a step's numbers then are, labels (B,) or None.
    Raises ValueError for options out of range, guidance for the data's velocity or for a network that says it has no guidance input, and,
    when called, for x0 of another type.
    """

    def __init__(
        self,
        net: nn.Module,
        logvar: nn.Module | None,
        velocity_fn: VelocityFn,
        sigma_data: float,
        P_mean: float,
        P_std: float,
        warmup: int,
        normalize: Normalize = "norm",
        c: float = 0.1,
        guidance: tuple[float, float] | None = None,
        engine: Engine = "auto",
    ) -> None:
        check_positive("sigma_data", sigma_data)
        check_proposal(P_mean, P_std)
        check_positive("c", c)
        if warmup < 0:
            raise ValueError(f"warmup: expected a number of iterations >= 0, got {warmup}")
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize: expected 'norm', 'clip' or 'none', got {normalize!r}")
        if engine not in get_args(Engine):
            raise ValueError(f"engine: expected 'auto', 'dual', 'func' or 'finite_difference', got {engine!r}")
        check_guidance(guidance)
        check_guidance_input(net, guidance)
        if velocity_fn is data_velocity:
            without_guidance(guidance)
        self.net, self.logvar, self.velocity_fn, self.sigma_data = net, logvar, velocity_fn, sigma_data
        self.P_mean, self.P_std, self.warmup, self.normalize, self.c = P_mean, P_std, warmup, normalize, c
        self.guidance, self.engine = guidance, engine

    def times(self, batch: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """t of shape (batch,) from the proposal."""
        return sample_times(batch, self.P_mean, self.P_std, self.sigma_data, generator, dtype)

    def tangent(self, net: Net, x_t: Tensor, t: Tensor, dxdt: Tensor, r: float) -> Tangent:
        """F and the direction g that it is to move in."""
        return tangent(net, x_t, t, dxdt, self.sigma_data, r, self.normalize, self.c, self.engine)

    def __call__(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        x0, labels = batch.x0, batch.labels
        z = noise_like(x0, self.sigma_data, generator)
        t = self.times(len(x0), generator, x0.dtype)
        s = sample_guidance(len(x0), *self.guidance, generator, x0.dtype) if self.guidance else None
        x_t = diffuse(x0, z, t)
        dxdt = self.velocity_fn(x_t, t, velocity(x0, z, t), labels, s)
        r = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        F, g, norm = self.tangent(Conditioned(self.net, labels, s), x_t, t, dxdt, r)
        logvar = None if self.logvar is None else self.logvar(t)
        scalars = {"tangent_norm": norm.mean(), "tangent_norm_max": norm.max()}
        if logvar is not None:
            scalars["logvar"] = logvar.detach().mean()
        losses = scm_losses(F, F.detach(), g, logvar)
        return Terms(losses.mean(), scalars, t, losses.detach())


class Conditioned:
    """net(·, ·, labels, guidance) as a function of (x, t), with the network's own way to carry tangents and its trunk's format."""

    def __init__(self, net: nn.Module, labels: Tensor | None, guidance: Tensor | None) -> None:
        self.call = partial(net, labels=labels, guidance=guidance)
        self.supports_dual = getattr(net, "supports_dual", False)
        self.trunk = getattr(net, "trunk", None)

    def __call__(self, x: Maybe, t: Maybe) -> Tensor | Dual:
        return self.call(x, t)


def consistency_head(
    shape: tuple[int, ...], sigma_data: float, adaptive_weighting: bool, normalize: Normalize
) -> dict[str, nn.Module]:
    """The adaptive weighting's head by name, or nothing. Its bias is where e^w ‖g‖²/D = 1 for an untrained network.

    Normalised tangents have ‖g‖ ≈ 1 over all D elements: ln D. Others begin (r = 0) as the residual of a velocity, of RMS σ_d: −2 ln σ_d.
    """
    bias = math.log(math.prod(shape)) if normalize == "norm" else -2 * math.log(sigma_data)
    return {"logvar": LogVarHead(bias=bias)} if adaptive_weighting else {}


def consistency_method(
    objective: Callable[..., ConsistencyObjective],
    net: nn.Module,
    velocity_fn: VelocityFn,
    sigma_data: float,
    shape: tuple[int, ...],
    adaptive_weighting: bool = True,
    normalize: Normalize = "norm",
    **options: Any,
) -> Method:
    """The method of a consistency objective, with or without its weighting head (Figure 5b); further options are the objective's."""
    heads = consistency_head(shape, sigma_data, adaptive_weighting, normalize)
    made = objective(net, heads.get("logvar"), velocity_fn, sigma_data, normalize=normalize, **options)
    return Method(made, heads, {})


def sct(net: nn.Module, teacher: nn.Module | None, sigma_data: float, shape: tuple[int, ...], **options: Any) -> Method:
    """Consistency training: the velocity of the data. `options`: `adaptive_weighting` and those of `ConsistencyObjective` but `guidance`.

    `shape` is a sample's. Raises ValueError for options out of range, and for guidance.
    """
    without_guidance(options.get("guidance"))
    return consistency_method(ConsistencyObjective, net, data_velocity, sigma_data, shape, **options)


def scd(net: nn.Module, teacher: nn.Module | None, sigma_data: float, shape: tuple[int, ...], **options: Any) -> Method:
    """Consistency distillation: the velocity of the teacher, guided if the options have a range of guidance scales. Else as `sct`.

    Raises ValueError for options out of range, and without a teacher.
    """
    velocity_fn = teacher_velocity(required(teacher), sigma_data)
    return consistency_method(ConsistencyObjective, net, velocity_fn, sigma_data, shape, **options)


def required(teacher: nn.Module | None) -> nn.Module:
    """The teacher; ValueError if there is none."""
    if teacher is None:
        raise ValueError("teacher: this method distils a teacher, got None")
    return teacher


def without_guidance(guidance: tuple[float, float] | None) -> None:
    """ValueError for guidance scales where there is no teacher to guide."""
    if guidance is not None:
        raise ValueError(f"guidance: this method follows the data, not a teacher that could be guided, got {guidance}")


def check_guidance_input(net: nn.Module, guidance: tuple[float, float] | None) -> None:
    """ValueError for guidance scales where the student says (`guidance_input`) that it has no input for them."""
    if guidance is not None and not getattr(net, "guidance_input", True):
        raise ValueError(
            f"guidance: expected None, as the network was built without a guidance input, got {tuple(guidance)}"
        )


def check_guidance(guidance: tuple[float, float] | None) -> None:
    """ValueError unless a range of guidance scales is (low, high), low ≤ high, both finite."""
    if guidance is not None and not (
        len(guidance) == 2 and all(map(math.isfinite, guidance)) and guidance[0] <= guidance[1]
    ):
        raise ValueError(f"guidance: expected finite scales (low, high) with low <= high, got {guidance}")
