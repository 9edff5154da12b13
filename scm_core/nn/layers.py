# SPDX-License-Identifier: Apache-2.0
"""Magnitude-preserving layers of EDM2 (Karras et al. 2024, App. B) on tensors or (value, tangent) pairs.

Weights are kept at unit variance per element for each output and are scaled by 1/√fan_in in the forward, so that activations keep their
magnitude. EDM2 normalises them in the forward, and by force before each step (its App. B.4). The same comes about without a
division in the forward, of which the tangent engines would have to know: the gradient loses its part along the weight
(`project_gradients`, what the derivative of the normalisation does), the weights are normalised after the optimizer step
(`normalize_weights`), and averaged ones when they are taken into use (`normalized`).
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from scm_core.nn import dual
from scm_core.nn.attention import attention
from scm_core.nn.dual import Maybe

SILU_GAIN = 1 / 0.596  # silu of a unit Gaussian has RMS 0.596 (EDM2, Eq. 81)


class MPWeight(nn.Module):
    """A weight whose rows are kept at unit RMS, used as W / √fan_in · gain, in the format of what it is applied to."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.fan_in = math.prod(shape[1:])
        with torch.no_grad():
            self.normalize_()

    def normalize_(self) -> None:
        """Bring each output's weights back to unit RMS: w ← w √fan_in / ‖w‖ (EDM2, Eq. 47). Called without gradients."""
        w = self.weight  # looked up once: a module's attributes are slow
        w.div_(row_rms(w))

    def project_gradient_(self) -> None:
        """Take from the gradient its part along each output's weights: g ← g − w ⟨w, g⟩/‖w‖² (EDM2, App. B.4). Called without gradients."""
        w = self.weight
        if w.grad is not None:
            along = (w * w.grad).mean(dim=row_dims(w), keepdim=True)
            w.grad.addcmul_(w, along, value=-1)  # ‖w‖² = fan_in

    def scaled(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight as it is applied: gain · W / √fan_in."""
        return self.weight * (gain / math.sqrt(self.fan_in))


class MPLinear(MPWeight):
    """x (B, in) → (B, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs)

    def forward(self, x: Maybe, gain: Tensor | float = 1.0) -> Maybe:
        return dual.linear(x, self.scaled(gain).to(dual.value_of(x).dtype))


class MPConv(MPWeight):
    """x (B, in, H, W) → (B, out, H, W), kernel × kernel, the resolution kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(outputs, inputs, kernel, kernel)

    def forward(self, x: Maybe, gain: Tensor | float = 1.0) -> Maybe:
        return dual.conv2d(x, self.scaled(gain).to(dual.value_of(x).dtype))


def row_dims(weight: Tensor) -> tuple[int, ...]:
    """All dimensions but the outputs'. (No flatten(1): of channels-last weights it is a copy.)"""
    return tuple(range(1, weight.ndim))


def row_rms(weight: Tensor) -> Tensor:
    """The RMS of each output's weights, of shape (out, 1, …)."""
    norm = torch.linalg.vector_norm(weight, dim=row_dims(weight), keepdim=True)
    return norm.div_(math.sqrt(math.prod(weight.shape[1:]))).clamp_(min=1e-20)


def mp_weights(net: nn.Module) -> Iterator[tuple[str, MPWeight]]:
    """The layers of `net` whose weights are kept normalised, with their names."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, MPWeight))


@torch.no_grad()
def normalize_weights(net: nn.Module) -> None:
    """Forced weight normalisation of every layer of `net`; to be called once after each optimizer step."""
    for _, module in mp_weights(net):
        module.normalize_()


@torch.no_grad()
def project_gradients(net: nn.Module) -> None:
    """Leave of the gradients what is perpendicular to the normalised weights; to be called once before each optimizer step."""
    for _, module in mp_weights(net):
        module.project_gradient_()


@torch.no_grad()
def normalized(net: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `net` by parameter name with forced normalisation: an average of normalised weights is shorter than they are."""
    result = dict(weights)
    for name, _ in mp_weights(net):
        key = f"{name}.weight"
        result[key] = weights[key] / row_rms(weights[key])
    return result


def mp_silu(x: Maybe) -> Maybe:
    """SiLU scaled to keep unit variance (EDM2, Eq. 81)."""
    return dual.silu(x, SILU_GAIN)


def mp_cat(a: Maybe, b: Maybe, weight: float) -> Maybe:
    """Concatenation over the channels in which b has the share `weight` of the whole's magnitude, however many channels it has
    (EDM2, Eq. 103): √((N_a + N_b)/((1 − w)² + w²)) · ((1 − w) a/√N_a ⊕ w b/√N_b)."""
    channels = [dual.value_of(part).shape[1] for part in (a, b)]
    whole = math.sqrt(sum(channels)) / math.hypot(1 - weight, weight)
    shares = [whole * share / math.sqrt(n) for share, n in zip((1 - weight, weight), channels, strict=True)]
    return dual.concat([dual.scale(a, shares[0]), dual.scale(b, shares[1])])


def random_dropout(x: Maybe, p: float, training: bool) -> Maybe:
    """Dropout with a mask from torch's global generator, one for value and tangent; none in evaluation mode or for p = 0."""
    if not p or not training:
        return x
    return dual.dropout(x, nnf.dropout(torch.ones_like(dual.value_of(x)), p))


def positions(scale_shift: Maybe) -> Maybe:
    """(B, C) as (B, C, 1, 1), to act on every position of an image."""
    return dual.rearrange(scale_shift, lambda v: v[:, :, None, None])


def adaptive_double_norm(x: Maybe, scale_shift: Maybe, norm: Callable[[Maybe], Maybe] = dual.rms_normalize) -> Maybe:
    """y = norm(x) ⊙ pnorm(s) + pnorm(b), the paper's replacement of AdaGN (§4.1, Eq. 8).

    x is (B, C, H, W); `scale_shift` is (B, 2C) and holds s, then b. pnorm divides by the RMS over the channels, in the format of
    `scale_shift`; so does the default norm.
    """
    dtype = dual.value_of(x).dtype
    s, b = (dual.cast(dual.rms_normalize(part), dtype) for part in dual.chunk(positions(scale_shift), 2))
    return dual.add(dual.multiply(norm(x), s), b)


def self_attention(qkv: Maybe, heads: int, cosine: bool, norm: Callable[..., Maybe] = dual.rms_normalize) -> Maybe:
    """Attention between the positions of an image: (B, 3C, H, W) → (B, C, H, W), scale 1/√d, d = C/heads.

    The 3C channels are ordered by (q, k, v), head, element. `cosine`: q, k and v are normalised over the d elements by `norm` (EDM2,
    App. B).
    """
    b, channels, h, w = dual.value_of(qkv).shape
    parts = (b, 3, heads, channels // (3 * heads), h * w)
    # (3, B, heads, HW, d): torch's fused kernels want the d elements side by side, the Triton kernel each of q, k and v in one piece
    qkv = dual.rearrange(qkv, lambda u: u.reshape(parts).permute(1, 0, 2, 4, 3).contiguous())
    if cosine:
        qkv = norm(qkv, dim=4)
    q, k, v = (dual.rearrange(part, torch.Tensor.squeeze, 0) for part in dual.chunk(qkv, 3, dim=0))
    return dual.rearrange(attention(q, k, v), lambda y: y.mT.reshape(b, channels // 3, h, w))
