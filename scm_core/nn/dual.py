# SPDX-License-Identifier: Apache-2.0
"""Operations on (value, tangent) pairs: one forward pass that gives F and dF together (paper §5.1).

Every function takes plain tensors or `Dual`s. On a `Dual` it applies its operation to the value and the exact linearisation
to the tangent. The value keeps its autograd graph, so that the same pass serves the training loss; the tangent never has one
(weights act on it as constants), which is what the stop-gradient θ⁻ of the paper asks for. By count of operations this costs one forward
pass more than a plain training step; benchmarks/results/step_cost.md has what it took, beside torch.func.jvp.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from scm_core.validate import HALF, check_like


class Dual(NamedTuple):
    """A tensor and its directional derivative, both of the same shape."""

    value: Tensor
    tangent: Tensor


Maybe = Tensor | Dual  # what a layer takes and gives


def value_of(x: Maybe) -> Tensor:
    """The value of a pair, or the tensor itself."""
    return x.value if isinstance(x, Dual) else x


def tangent_of(x: Maybe) -> Tensor:
    """The tangent of a pair; zeros for a plain tensor, which is a constant."""
    return x.tangent if isinstance(x, Dual) else torch.zeros_like(x)


def check_pair(name: str, x: Maybe) -> None:
    """ValueError, with the argument's `name`, unless a pair's tangent has the shape and the device of its value."""
    if isinstance(x, Dual):
        check_like(f"tangent of {name}", x.tangent, x.value, "its value")


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, for sums over many elements; others as they are."""
    return x.float() if x.dtype in HALF else x


def linear(x: Maybe, weight: Tensor, bias: Tensor | None = None) -> Maybe:
    """x Wᵀ + b; W of shape (out, in), b of shape (out,)."""
    if not isinstance(x, Dual):
        return nnf.linear(x, weight, bias)
    with torch.no_grad():
        tangent = nnf.linear(x.tangent, weight)
    return Dual(nnf.linear(x.value, weight, bias), tangent)


def conv2d(x: Maybe, weight: Tensor, bias: Tensor | None = None) -> Maybe:
    """Convolution with stride 1 and zero padding that keeps the resolution; W of shape (out, in, k, k), k odd, b of shape (out,)."""
    padding = weight.shape[-1] // 2
    if not isinstance(x, Dual):
        return nnf.conv2d(x, weight, bias, padding=padding)
    with torch.no_grad():
        tangent = nnf.conv2d(x.tangent, weight, padding=padding)
    return Dual(nnf.conv2d(x.value, weight, bias, padding=padding), tangent)


def scale(x: Maybe, factor: Tensor | float) -> Maybe:
    """x times a constant or a parameter."""
    if not isinstance(x, Dual):
        return x * factor
    with torch.no_grad():
        tangent = x.tangent * factor
    return Dual(x.value * factor, tangent)


def add(a: Maybe, b: Maybe) -> Maybe:
    """a + b, where either may be a constant (a plain tensor); shapes broadcast."""
    if isinstance(a, Dual) and isinstance(b, Dual):
        return Dual(a.value + b.value, a.tangent + b.tangent)
    value = value_of(a) + value_of(b)
    if not isinstance(a, Dual) and not isinstance(b, Dual):
        return value
    moving = a if isinstance(a, Dual) else b
    return Dual(value, tangent_of(moving).expand_as(value))


def multiply(a: Maybe, b: Maybe) -> Maybe:
    """a ⊙ b; shapes broadcast."""
    value = value_of(a) * value_of(b)
    if not isinstance(a, Dual) and not isinstance(b, Dual):
        return value
    with torch.no_grad():
        if isinstance(a, Dual) and isinstance(b, Dual):
            tangent = torch.addcmul(a.tangent * b.value, a.value, b.tangent)
        elif isinstance(a, Dual):
            tangent = a.tangent * value_of(b)
        else:
            tangent = value_of(a) * tangent_of(b)
    return Dual(value, tangent)


def silu(x: Maybe, gain: float = 1.0) -> Maybe:
    """gain · x σ(x)."""
    if not isinstance(x, Dual):
        y = nnf.silu(x)
        return y if gain == 1.0 else y * gain
    with torch.no_grad():
        s = torch.sigmoid(x.value)
        tangent = torch.addcmul(s, x.value * s, 1 - s).mul_(x.tangent)
        if gain != 1.0:
            tangent.mul_(gain)
    y = nnf.silu(x.value)
    return Dual(y if gain == 1.0 else y * gain, tangent)


def rms_normalize(x: Maybe, dim: int = 1, eps: float = 1e-4) -> Maybe:
    """x / √(mean_dim(x²) + ε): pixel normalisation over the channels (`pnorm` of App. G); means in float32 at least."""
    v = value_of(x)
    r = torch.rsqrt(_wide(v).square().mean(dim=dim, keepdim=True) + eps).to(v.dtype)
    y = v * r
    if not isinstance(x, Dual):
        return y
    with torch.no_grad():
        # d(x r) = r (dx − y · mean(y dx)), because dr = −r³ mean(x dx)
        tangent = (x.tangent - y * (_wide(y) * x.tangent).mean(dim=dim, keepdim=True).to(y.dtype)) * r
    return Dual(y, tangent)


def magnitude_normalize(x: Maybe, dim: int = 1, eps: float = 1e-4) -> Maybe:
    """x / (√mean_dim(x²) + ε), EDM2's own form of `rms_normalize` (its Algorithm 1); magnitudes in float32 at least."""
    v = value_of(x)
    magnitude = torch.linalg.vector_norm(_wide(v), dim=dim, keepdim=True) / math.sqrt(v.shape[dim])
    r = (1 / (magnitude + eps)).to(v.dtype)
    y = v * r
    if not isinstance(x, Dual):
        return y
    with torch.no_grad():
        # d(x r) = r (dx − y · mean(y dx) (m + ε)/m), because dr = −r² mean(x dx)/m; where x = 0 the magnitude moves nothing
        along = (_wide(y) * x.tangent).mean(dim=dim, keepdim=True) * torch.where(magnitude > 0, 1 + eps / magnitude, 0)
        tangent = (x.tangent - y * along.to(y.dtype)) * r
    return Dual(y, tangent)


def group_norm(x: Maybe, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Maybe:
    """γ (x − μ)/√(var + ε) + β for x of shape (B, C, …), μ and var over each group's channels and positions; γ, β of shape (C,)."""
    if not isinstance(x, Dual):
        return nnf.group_norm(x.contiguous(), groups, weight, bias, eps)  # what its forward-mode derivative needs
    with torch.no_grad():
        v, d = (_wide(part).reshape(part.shape[0], groups, -1) for part in x)
        variance, mean = torch.var_mean(v, dim=2, keepdim=True, correction=0)
        r = torch.rsqrt(variance + eps)
        y = (v - mean) * r
        tangent = (d - d.mean(dim=2, keepdim=True) - y * (y * d).mean(dim=2, keepdim=True)) * r
        tangent = tangent.view(x.tangent.shape).to(x.tangent.dtype) * weight.reshape(-1, *[1] * (x.value.ndim - 2))
    return Dual(nnf.group_norm(x.value, groups, weight, bias, eps), tangent)


def cosine(x: Maybe) -> Maybe:
    """cos x."""
    if not isinstance(x, Dual):
        return torch.cos(x)
    with torch.no_grad():
        tangent = -torch.sin(x.value) * x.tangent
    return Dual(torch.cos(x.value), tangent)


def sine(x: Maybe) -> Maybe:
    """sin x."""
    if not isinstance(x, Dual):
        return torch.sin(x)
    with torch.no_grad():
        tangent = torch.cos(x.value) * x.tangent
    return Dual(torch.sin(x.value), tangent)


def log_tan(x: Maybe) -> Maybe:
    """ln tan x for x in (0, π/2)."""
    if not isinstance(x, Dual):
        return torch.log(torch.tan(x))
    with torch.no_grad():
        tangent = x.tangent / (torch.sin(x.value) * torch.cos(x.value))
    return Dual(torch.log(torch.tan(x.value)), tangent)


def clamp(x: Maybe, limit: float) -> Maybe:
    """x clipped to [−limit, limit]; nothing moves beyond."""
    if not isinstance(x, Dual):
        return x.clamp(-limit, limit)
    return Dual(x.value.clamp(-limit, limit), x.tangent.masked_fill(x.value.detach().abs() > limit, 0))


def cast(x: Maybe, dtype: torch.dtype) -> Maybe:
    """x in another floating-point format."""
    return Dual(x.value.to(dtype), x.tangent.to(dtype)) if isinstance(x, Dual) else x.to(dtype)


def outer(t: Maybe, frequencies: Tensor) -> Maybe:
    """t ⊗ frequencies: shapes (B,) and (K,) to (B, K)."""
    if not isinstance(t, Dual):
        return t[:, None] * frequencies
    return Dual(t.value[:, None] * frequencies, t.tangent[:, None] * frequencies)


def concat(parts: Sequence[Maybe], dim: int = 1) -> Maybe:
    """Concatenation; constants get a zero tangent."""
    value = torch.cat([value_of(p) for p in parts], dim=dim)
    if not any(isinstance(p, Dual) for p in parts):
        return value
    return Dual(value, torch.cat([tangent_of(p) for p in parts], dim=dim))


def chunk(x: Maybe, parts: int, dim: int = 1) -> tuple[Maybe, ...]:
    """Split into equal parts."""
    if not isinstance(x, Dual):
        return x.chunk(parts, dim=dim)
    return tuple(
        Dual(v, d) for v, d in zip(x.value.chunk(parts, dim=dim), x.tangent.chunk(parts, dim=dim), strict=True)
    )


def rearrange(x: Maybe, function: Callable[..., Tensor], *args: Any) -> Maybe:
    """Apply a linear function without parameters (reshape, pixel shuffle, a mean, …) to value and tangent alike."""
    if not isinstance(x, Dual):
        return function(x, *args)
    return Dual(function(x.value, *args), function(x.tangent, *args))


def downsample(x: Maybe) -> Maybe:
    """(B, C, H, W) → (B, C, H/2, W/2): means over 2 × 2 boxes."""
    return rearrange(x, nnf.avg_pool2d, 2)


def upsample(x: Maybe) -> Maybe:
    """(B, C, H, W) → (B, C, 2H, 2W): each element four times."""
    return rearrange(x, nnf.interpolate, None, 2)  # the default mode, nearest


def dropout(x: Maybe, mask: Tensor) -> Maybe:
    """x ⊙ mask with one mask for value and tangent (§4.2); the mask already carries 1/(1 − p)."""
    return scale(x, mask)


def weighted_sum(a: Maybe, b: Maybe, weight: float) -> Maybe:
    """((1 − w) a + w b) / √((1 − w)² + w²): EDM2's magnitude-preserving sum of unit-variance parts (its Eq. 88)."""
    norm = math.hypot(1 - weight, weight)
    if not (isinstance(a, Dual) or isinstance(b, Dual) or torch.compiler.is_compiling()):
        # not when compiled: torch 2.13 makes addmm of it where b is a product of matrices, and loses alpha
        return torch.add(a * ((1 - weight) / norm), b, alpha=weight / norm)
    return add(scale(a, (1 - weight) / norm), scale(b, weight / norm))
