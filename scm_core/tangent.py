# SPDX-License-Identifier: Apache-2.0
"""The tangent of continuous-time consistency models: the rearranged JVP, its warmup and its normalisation (paper §4.2, §5.1).

    df/dt = −cos(t) (σ_d F⁻ − dx_t/dt) − sin(t) (x_t + σ_d dF⁻/dt)

Multiplied by cos(t) (the prior weighting), with r on the part that is unstable early in training, this is
g = −cos²(t) (σ_d F⁻ − dx_t/dt) − r (cos(t) sin(t) x_t + J), J = σ_d cos(t) sin(t) dF⁻/dt (Algorithm 1).

A multistep model ends at a time s > 0 instead of 0: t − s then stands in every cosine and sine (Heek et al. 2024).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from scm_core.engines import Engine, Net, value_and_jvp
from scm_core.trigflow import broadcast_time
from scm_core.validate import check_dtype, check_fraction, check_like, check_positive, check_sample, check_times

Normalize = Literal["norm", "clip", "none"]


class Tangent(NamedTuple):
    """What one pass gives: F with its autograd graph, the regression direction g, and ‖g‖ before normalisation, (B,)."""

    F: Tensor
    g: Tensor
    norm: Tensor


def normalize_tangent(g: Tensor, normalize: Normalize, c: float) -> tuple[Tensor, Tensor]:
    """g / (‖g‖ + c) per sample, or g clipped to [−1, 1], or g itself (§4.2); returns (g, ‖g‖ before, shape (B,)).

    g of shape (B, …), the norm over all elements of a sample. Raises ValueError for another `normalize` and for g that is not a batch in
    float32 or float64.
    """
    check_sample("g", g)
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
    if normalize == "norm":
        return g / (norm + c).reshape(-1, *[1] * (g.ndim - 1)), norm
    if normalize == "clip":
        return g.clamp(-1, 1), norm
    if normalize == "none":
        return g, norm
    raise ValueError(f"normalize: expected 'norm', 'clip' or 'none', got {normalize!r}")


def tangent(
    net: Net,
    x_t: Tensor,
    t: Tensor,
    dxdt: Tensor,
    sigma_data: float,
    warmup: float = 1.0,
    normalize: Normalize = "norm",
    c: float = 0.1,
    engine: Engine = "auto",
    end: Tensor | None = None,
) -> Tangent:
    """Steps 3–5 of Algorithm 1 for x_t, dxdt of shape (B, …), t of shape (B,) in radians, r = `warmup` in [0, 1].

    F keeps its graph, so that the pass that gives the tangent also serves the training loss. `end` (B,) holds the time s that each
    sample's consistency function leads to; None: 0. A network of half precision may return F in its own: the arithmetic here is in the
    type of x_t.

    Looks at no values. Raises ValueError for shapes or devices that do not match, t in half precision, an unknown engine or `normalize`.
    """
    check_like("dxdt", dxdt, x_t, "x_t")
    tb = broadcast_time(t if end is None else t - end, x_t)
    cos, sin = torch.cos(tb), torch.sin(tb)
    # d(x_t/σ_d)/dt and dt/dt, both times σ_d cos(t) sin(t): J never holds the 1/cos that overflows half precision (§5.1)
    dx, dt = cos * sin * dxdt.detach(), (cos * sin * sigma_data).flatten()
    F, J = value_and_jvp(net, x_t / sigma_data, t, dx, dt, engine)
    check_like("F", F, x_t, "x_t")
    with torch.no_grad():  # g is a constant of the regression, whatever dx_t/dt was made by
        F_minus, J = F.to(x_t.dtype), J.to(x_t.dtype)
        g = -(cos**2) * (sigma_data * F_minus - dxdt) - warmup * (cos * sin * x_t + J)
        g, norm = normalize_tangent(g, normalize, c)
    return Tangent(F, g, norm)


def check_arguments(x_t: Tensor, t: Tensor, dxdt: Tensor, sigma_data: float, warmup: float, c: float) -> None:
    """ValueError for what `scm_tangent` does not take; looks at the values of t."""
    check_positive("sigma_data", sigma_data)
    check_positive("c", c)
    check_fraction("warmup", warmup)
    check_sample("x_t", x_t)
    check_like("dxdt", dxdt, x_t, "x_t")
    check_dtype("dxdt", dxdt, x_t, "x_t")
    broadcast_time(t, x_t)
    check_dtype("t", t, x_t, "x_t")
    check_times(t)


def scm_tangent(
    net: Net,
    x_t: Tensor,
    t: Tensor,
    dxdt: Tensor,
    sigma_data: float,
    warmup: float = 1.0,
    normalize: Normalize = "norm",
    c: float = 0.1,
    engine: Engine = "auto",
) -> tuple[Tensor, Tensor]:
    """(F⁻, g) of Algorithm 1: the network's value without gradient and the direction its output is to move in.

    With `normalize="none"` and `warmup=1`, g = cos(t) df/dt, which vanishes for the true consistency function. Shapes and units as in
    `tangent`; `net(x_t/σ_d, t)` may be any differentiable callable.

    Raises ValueError for times outside [0, π/2], for shapes, devices or types that do not match, for half precision, sigma_data ≤ 0, c ≤ 0,
    a warmup outside [0, 1], and an unknown engine or `normalize`.
    """
    check_arguments(x_t, t, dxdt, sigma_data, warmup, c)
    F, g, _ = tangent(net, x_t, t, dxdt, sigma_data, warmup, normalize, c, engine)
    return F.detach(), g
