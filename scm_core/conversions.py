# SPDX-License-Identifier: Apache-2.0
"""Networks trained under another schedule as a TrigFlow F: EDM, EDM2, flow matching, variance-preserving diffusion (paper App. B).

A schedule is x_s = α_s x0 + σ_s ε, ε ~ N(0, I), in its own time s. Up to a factor it is TrigFlow at the time of equal signal-to-noise:

    t = arctan(σ_s / (σ_d α_s)),   x_t = x_s σ_d / R,   R = √(α_s² σ_d² + σ_s²),   cos t = α_s σ_d / R,   sin t = σ_s / R.

Whatever a network predicts is p = a x0 + b ε for some numbers a, b. Together with x_s this gives x0 and ε, and with them

    F = (R/σ_d) (p − (a cos t + b sin t / σ_d) x_t) / (α_s b − σ_s a),

which divides by sin t when p = x0, by cos t when p = ε, and by neither for velocities. A rounding error δ of p becomes δ/(σ_d sin t) in F
for a denoiser (large at small t: in float32 about 1e-4 at t = 1e-3), δ/cos t for a noise predictor (large near π/2), and stays of the order
of δ for velocities. Nothing is clamped: F is as good as p.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from scm_core.trigflow import broadcast_time
from scm_core.validate import EDGE, check_positive, check_times

Prediction = Literal["x0", "epsilon", "velocity", "flow"]


class Point(NamedTuple):
    """A schedule's own time s and its coefficients there, each of shape (B,)."""

    s: Tensor
    alpha: Tensor
    sigma: Tensor


class Schedule(Protocol):
    """x_s = α_s x0 + σ_s ε, with σ_s/α_s monotonic in s."""

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(α_s, σ_s) at the schedule's own time s, (B,)."""

    def at(self, t: Tensor, sigma_data: float) -> Point:
        """The point of TrigFlow time t (B,), in radians, where σ_s/α_s = σ_d tan t."""


class EDMSchedule:
    """x_σ = x0 + σ ε with s = σ ≥ 0 (EDM, EDM2). t must be below π/2, where σ is infinite."""

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(s), s

    def at(self, t: Tensor, sigma_data: float) -> Point:
        sigma = sigma_data * torch.tan(t)
        return Point(sigma, torch.ones_like(t), sigma)


class FlowSchedule:
    """x_s = (1 − s) x0 + s ε, s in [0, 1] (rectified flow); `reverse`: x_s = s x0 + (1 − s) ε, with the data at s = 1."""

    def __init__(self, reverse: bool = False) -> None:
        self.reverse = reverse

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return (s, 1 - s) if self.reverse else (1 - s, s)

    def at(self, t: Tensor, sigma_data: float) -> Point:
        # σ/α = σ_d tan t and α + σ = 1, without the difference 1 − s
        total = torch.cos(t) + sigma_data * torch.sin(t)
        alpha, sigma = torch.cos(t) / total, sigma_data * torch.sin(t) / total
        return Point(alpha if self.reverse else sigma, alpha, sigma)


class CosineSchedule:
    """α_s = cos(π s/2), σ_s = sin(π s/2), s in [0, 1] (variance preserving; Nichol & Dhariwal 2021 without their offset)."""

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(math.pi / 2 * s), torch.sin(math.pi / 2 * s)

    def at(self, t: Tensor, sigma_data: float) -> Point:
        angle = torch.atan2(sigma_data * torch.sin(t), torch.cos(t))
        return Point(angle / (math.pi / 2), torch.cos(angle), torch.sin(angle))


class LinearVPSchedule:
    """α_s = exp(−q(s)/2), σ_s² = 1 − α_s², q(s) = β_min s + (β_max − β_min) s²/2, s in [0, 1] (VP SDE, Song et al. 2021; DDPM).

    t near π/2 maps to s > 1, beyond the network's training; start below arctan(σ_1/(σ_d α_1)). Raises ValueError unless 0 < β_min < β_max.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        check_positive("beta_min", beta_min)
        if not (math.isfinite(beta_max) and beta_max > beta_min):
            raise ValueError(f"beta_max: expected a number above beta_min = {beta_min}, got {beta_max}")
        self.beta_min, self.slope = beta_min, beta_max - beta_min

    def coefficients(self, s: Tensor) -> tuple[Tensor, Tensor]:
        q = self.beta_min * s + self.slope * s**2 / 2
        return torch.exp(-q / 2), torch.sqrt(-torch.expm1(-q))

    def at(self, t: Tensor, sigma_data: float) -> Point:
        norm = torch.sqrt(torch.cos(t) ** 2 + (sigma_data * torch.sin(t)) ** 2)
        alpha, sigma = torch.cos(t) / norm, sigma_data * torch.sin(t) / norm
        q = torch.log1p((sigma_data * torch.tan(t)) ** 2)  # σ²/α² = e^q − 1
        # the positive root of slope s²/2 + β_min s = q, in the form without cancellation
        s = 2 * q / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * self.slope * q))
        return Point(s, alpha, sigma)


def to_trigflow(x_s: Tensor, s: Tensor, schedule: Schedule, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(x_t, t) of TrigFlow for x_s (B, …) at the schedule's time s (B,): t = arctan(σ_s/(σ_d α_s)), x_t = x_s σ_d/√(α_s² σ_d² + σ_s²).

    Raises ValueError for sigma_data ≤ 0, for shapes, devices or types of time that do not fit, and for s at which α_s or σ_s is negative or
    no number.
    """
    check_positive("sigma_data", sigma_data)
    broadcast_time(s, x_s, "s")
    alpha, sigma = schedule.coefficients(s)
    t = torch.atan2(sigma, sigma_data * alpha)
    wrong = ~((t >= 0) & (t <= math.pi / 2 + EDGE))
    if bool(wrong.any()):
        raise ValueError(f"s: expected times of the schedule, where α_s, σ_s >= 0, got {s[wrong][0].item():g}")
    factor = sigma_data / torch.hypot(alpha * sigma_data, sigma)
    return x_s * broadcast_time(factor, x_s), t


def from_trigflow(x_t: Tensor, t: Tensor, schedule: Schedule, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(x_s, s) of the schedule for x_t (B, …) at t (B,) in radians: the inverse of `to_trigflow`.

    Raises ValueError for sigma_data ≤ 0, for shapes, devices or types of time that do not fit, and for t outside [0, π/2].
    """
    check_positive("sigma_data", sigma_data)
    broadcast_time(t, x_t)
    check_times(t)
    s, alpha, sigma = schedule.at(t, sigma_data)
    factor = torch.hypot(alpha * sigma_data, sigma) / sigma_data
    return x_t * broadcast_time(factor, x_t), s


def _weights(prediction: Prediction, schedule: Schedule, point: Point) -> tuple[Tensor, Tensor]:
    """(a, b) of the prediction p = a x0 + b ε."""
    zero, one = torch.zeros_like(point.s), torch.ones_like(point.s)
    if prediction == "x0":
        return one, zero
    if prediction == "epsilon":
        return zero, one
    if prediction == "velocity":
        return -point.sigma, point.alpha
    # flow: dx_s/ds = α'_s x0 + σ'_s ε
    a, b = torch.func.jvp(schedule.coefficients, (point.s,), (one,))[1]
    return a, b


class TrigFlowNet(nn.Module):
    """F(x_t/σ_d, t, labels, guidance) of TrigFlow from a network p(x_s, s[, labels[, guidance]]) of another schedule.

    `prediction` is what the network estimates: "x0", "epsilon" (ε), "velocity" (α_s ε − σ_s x0, Salimans & Ho 2022), or "flow"
    (dx_s/ds = α'_s x0 + σ'_s ε, flow matching; ε − x0 for `FlowSchedule`). The network gets x_s (B, …) and s (B,) in the schedule's own
    units; labels and guidance are passed on as they are (−1: no label), left out where they are None. x is x_t/σ_d (B, …), t (B,) in
    radians, and the result is differentiable in both. Where t must not go, and how rounding errors grow near there: see the schedules
    and the top of this module.

    Raises ValueError for an unknown prediction or sigma_data ≤ 0, and when called for shapes, devices or types of time that do not fit.
    """

    def __init__(
        self, net: Callable[..., Tensor], schedule: Schedule, prediction: Prediction, sigma_data: float
    ) -> None:
        super().__init__()
        check_positive("sigma_data", sigma_data)
        if prediction not in ("x0", "epsilon", "velocity", "flow"):
            raise ValueError(f"prediction: expected 'x0', 'epsilon', 'velocity' or 'flow', got {prediction!r}")
        self.net, self.schedule, self.prediction, self.sigma_data = net, schedule, prediction, sigma_data

    @property
    def labels(self) -> int | None:
        """Number of classes, if the network says it."""
        return getattr(self.net, "labels", None)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        broadcast_time(t, x)
        point = self.schedule.at(t, self.sigma_data)
        a, b = _weights(self.prediction, self.schedule, point)
        x_t = self.sigma_data * x
        scale = torch.hypot(point.alpha * self.sigma_data, point.sigma) / self.sigma_data
        p = self.net(x_t * broadcast_time(scale, x), point.s, *_given(labels, guidance))
        share = a * torch.cos(t) + b * torch.sin(t) / self.sigma_data
        factor = scale / (point.alpha * b - point.sigma * a)
        return broadcast_time(factor, x) * (p - broadcast_time(share, x) * x_t)


class EDMNetwork(nn.Module):
    """F of TrigFlow from the raw network inside EDM's preconditioning, raw(c_in x_σ, ¼ ln σ[, labels[, guidance]]).

    With the same σ_d, c_in x_σ = x_t/σ_d, c_skip x_σ = cos(t) x_t and c_out = σ_d sin t, so that D = cos(t) x_t + sin(t) σ_d raw: F = −raw,
    without the division by sin t that a denoiser as such costs. t in (0, π/2), in radians: the logarithm has no value at the ends. Shapes
    as in `TrigFlowNet`; raises ValueError for sigma_data ≤ 0.
    """

    def __init__(self, raw: Callable[..., Tensor], sigma_data: float) -> None:
        super().__init__()
        check_positive("sigma_data", sigma_data)
        self.raw, self.sigma_data = raw, sigma_data

    @property
    def labels(self) -> int | None:
        """Number of classes, if the network says it."""
        return getattr(self.raw, "labels", None)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        broadcast_time(t, x)
        c_noise = torch.log(self.sigma_data * torch.tan(t)) / 4
        return -self.raw(x, c_noise, *_given(labels, guidance))


def _given(labels: Tensor | None, guidance: Tensor | None) -> tuple[Any, ...]:
    """The arguments that were given: foreign networks need not know of the others."""
    if guidance is not None:
        return labels, guidance
    return () if labels is None else (labels,)


def edm_denoiser(denoiser: Callable[..., Tensor], sigma_data: float) -> TrigFlowNet:
    """F = (cos(t) x_t − D)/(σ_d sin t) from EDM's or EDM2's denoiser D(x_σ, σ[, labels]), t in (0, π/2). Compare `EDMNetwork`."""
    return TrigFlowNet(denoiser, EDMSchedule(), "x0", sigma_data)


def flow_velocity(velocity: Callable[..., Tensor], sigma_data: float, reverse: bool = False) -> TrigFlowNet:
    """F = c (u + (cos t − sin t/σ_d) x_t), c = 1/(cos t + σ_d sin t), from the u(x_s, s[, labels]) of rectified flow.

    u ≈ ε − x0 on x_s = (1 − s) x0 + s ε; `reverse`: u ≈ x0 − ε on x_s = s x0 + (1 − s) ε. Without loss for all t in [0, π/2].
    """
    return TrigFlowNet(velocity, FlowSchedule(reverse), "flow", sigma_data)
