# SPDX-License-Identifier: Apache-2.0
"""The tangent of continuous-time consistency models: the rearranged JVP, its warmup and its normalisation (paper §4.2, §5.1).

    df/dt = −cos(t) (σ_d F⁻ − dx_t/dt) − sin(t) (x_t + σ_d dF⁻/dt)

Multiplied by cos(t) (the prior weighting), with r on the part that is unstable early in training, this is
g = −cos²(t) (σ_d F⁻ − dx_t/dt) − r (cos(t) sin(t) x_t + J), J = σ_d cos(t) sin(t) dF⁻/dt (Algorithm 1).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scm_core.nn.dual import Dual
from scm_core.trigflow import broadcast_time

Normalize = Literal["norm", "clip", "none"]
Net = Callable[..., Any]  # (x, t) -> F; on pairs a pair, if it has `supports_dual`


class Tangent(NamedTuple):
    """What one pass gives: F with its autograd graph, the regression direction g, and ‖g‖ before normalisation, (B,)."""

    F: Tensor
    g: Tensor
    norm: Tensor


def value_and_jvp(net: Net, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """F(x, t) and its derivative along (dx, dt), in one pass.

    A network with `supports_dual` carries (value, tangent) pairs through its own layers; any other callable goes through
    `torch.func.jvp`. F keeps the autograd graph of the parameters, the derivative has none.
    """
    if getattr(net, "supports_dual", False):
        F, dF = net(Dual(x, dx), Dual(t, dt))
    else:
        F, dF = torch.func.jvp(net, (x, t), (dx, dt))[:2]
    return F, dF.detach()


def normalize_tangent(g: Tensor, normalize: Normalize, c: float) -> tuple[Tensor, Tensor]:
    """g / (‖g‖ + c) per sample, or g clipped to [−1, 1], or g itself (§4.2); returns (g, ‖g‖ before, shape (B,))."""
    norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
    if normalize == "norm":
        return g / broadcast_time(norm + c, g), norm
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
) -> Tangent:
    """Steps 3–5 of Algorithm 1 for x_t, dxdt of shape (B, …), t of shape (B,) in radians, r = `warmup` in [0, 1].

    F keeps its graph, so that the pass that gives the tangent also serves the training loss.
    """
    tb = broadcast_time(t, x_t)
    cos, sin = torch.cos(tb), torch.sin(tb)
    # d(x_t/σ_d)/dt and dt/dt, both times σ_d cos(t) sin(t): J never holds the 1/cos that overflows half precision (§5.1)
    F, J = value_and_jvp(net, x_t / sigma_data, t, cos * sin * dxdt.detach(), (cos * sin * sigma_data).flatten())
    with torch.no_grad():  # g is a constant of the regression, whatever dx_t/dt was made by
        g = -(cos**2) * (sigma_data * F - dxdt) - warmup * (cos * sin * x_t + J)
        g, norm = normalize_tangent(g, normalize, c)
    return Tangent(F, g, norm)


def scm_tangent(
    net: Net,
    x_t: Tensor,
    t: Tensor,
    dxdt: Tensor,
    sigma_data: float,
    warmup: float = 1.0,
    normalize: Normalize = "norm",
    c: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """(F⁻, g) of Algorithm 1: the network's value without gradient and the direction its output is to move in.

    With `normalize="none"` and `warmup=1`, g = cos(t) df/dt, which vanishes for the true consistency function. Shapes and units as in
    `tangent`; `net(x_t/σ_d, t)` may be any differentiable callable.
    """
    F, g, _ = tangent(net, x_t, t, dxdt, sigma_data, warmup, normalize, c)
    return F.detach(), g
