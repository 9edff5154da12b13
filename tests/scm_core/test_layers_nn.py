# SPDX-License-Identifier: Apache-2.0
"""Magnitude-preserving layers, adaptive double normalisation and embeddings against their formulas (§4.1, App. G)."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scm_core.nn import dual, layers
from scm_core.nn.attention import attention
from scm_core.nn.dual import Dual
from scm_core.nn.layers import (
    MPConv,
    MPLinear,
    MPWeight,
    adaptive_double_norm,
    mp_cat,
    mp_silu,
    normalize_weights,
    normalized,
    project_gradients,
    random_dropout,
    self_attention,
)
from scm_core.nn.small import SmallNet

F64 = torch.float64


def normal(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_adaptive_double_norm_is_its_formula() -> None:
    """y = norm(x) ⊙ pnorm(s) + pnorm(b), pnorm(a) = a/√(mean_c a² + ε), written out position by position."""
    x, conditioning = normal(2, 6, 3, 3, seed=0), normal(2, 12, seed=1)
    y = adaptive_double_norm(x, conditioning)
    s, b = conditioning[:, :6], conditioning[:, 6:]
    for n in range(2):
        for row in range(3):
            for column in range(3):
                pixel = x[n, :, row, column]
                expected = (pixel / math.sqrt(float(pixel @ pixel) / 6 + 1e-4)) * (
                    s[n] / math.sqrt(float(s[n] @ s[n]) / 6 + 1e-4)
                ) + b[n] / math.sqrt(float(b[n] @ b[n]) / 6 + 1e-4)
                torch.testing.assert_close(y[n, :, row, column], expected, rtol=1e-12, atol=1e-12)


def test_adaptive_double_norm_does_not_see_the_embeddings_size() -> None:
    """Scaling the conditioning changes nothing: this is what keeps ∂F/∂t bounded where AdaGN lets it grow (§4.1)."""
    x, conditioning = normal(2, 6, 3, 3, seed=0), normal(2, 12, seed=1)
    small, large = adaptive_double_norm(x, conditioning), adaptive_double_norm(x, 100 * conditioning)
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(small, adaptive_double_norm(x, -conditioning))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_forced_weight_normalisation_gives_unit_rows(order: torch.memory_format) -> None:
    """After `normalize_weights` every output's weights have RMS 1, keep their direction, in any memory order."""
    net = SmallNet(channels=2, resolution=4, labels=3, width=8, blocks=2, guidance_input=True)
    net = net.to(memory_format=order)  # type: ignore[call-overload]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)
            if p.ndim:
                p[0].mul_(0.01)
    normalize_weights(net)
    seen = 0
    for name, module in net.named_modules():
        if isinstance(module, MPWeight):
            seen += 1
            rows = module.weight.detach().flatten(1)
            torch.testing.assert_close(rows.square().mean(1), torch.ones(len(rows)), rtol=1e-5, atol=0)
            torch.testing.assert_close(module.weight.detach(), before[f"{name}.weight"], rtol=1e-5, atol=1e-6)
    assert seen == 5 + 3 * 2  # conv_in, conv_out, three embeddings; three layers in each block
    assert float(net.out_gain.detach()) == float(before["out_gain"]) * 3  # gains are free


def test_forced_weight_normalisation_survives_a_zero_row() -> None:
    """A row of zeros stays finite."""
    layer = MPLinear(4, 2)
    nn.init.zeros_(layer.weight)
    normalize_weights(layer)
    assert torch.equal(layer.weight.detach(), torch.zeros(2, 4))


def test_gradient_flows_to_the_weight_as_it_is_applied() -> None:
    """The layer is W/√fan_in · gain: value and gradient to weight and gain."""
    layer = MPLinear(16, 3).double()
    x, gain = normal(5, 16, seed=0), torch.tensor(0.7, dtype=F64, requires_grad=True)
    y = layer(x, gain)
    torch.testing.assert_close(y, 0.7 * x @ layer.weight.T / 4, rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert gain.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, (0.7 * x.sum(0) / 4).expand(3, 16), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gain.grad, (x @ layer.weight.T / 4).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer", [MPLinear(16, 3), MPConv(4, 5, 3), MPConv(6, 7, 3).to(memory_format=torch.channels_last)]
)  # type: ignore[call-overload]
def test_projected_gradient_is_that_of_a_normalisation_in_the_forward(layer: MPWeight) -> None:
    """EDM2's own way: normalise the weight in the forward and let autograd differentiate through it."""
    layer = copy.deepcopy(layer).double()
    normalize_weights(layer)
    x = normal(5, 16, seed=0) if isinstance(layer, MPLinear) else normal(5, layer.weight.shape[1], 4, 4, seed=0)
    layer(x).square().sum().backward()
    project_gradients(layer)

    weight = layer.weight.detach().clone().requires_grad_()
    rows = weight.flatten(1)
    applied = (rows / rows.norm(dim=1, keepdim=True)).view_as(weight)  # = w/√fan_in of a normalised weight
    y = x @ applied.T if isinstance(layer, MPLinear) else torch.nn.functional.conv2d(x, applied, padding=1)
    y.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-10, atol=1e-12)


def test_averages_are_normalised_when_taken_into_use() -> None:
    """The average of normalised weights is shorter; `normalized` gives what `normalize_weights` would, and leaves the rest alone."""
    net = nn.Sequential(MPLinear(16, 3), nn.Linear(3, 2))
    shorter = {name: 0.7 * p.detach() for name, p in net.named_parameters()}
    result = normalized(net, shorter)
    torch.testing.assert_close(result["0.weight"], net[0].weight.detach())
    assert all(torch.equal(result[key], shorter[key]) for key in ("1.weight", "1.bias"))


@pytest.mark.parametrize("layer", ["linear", "conv1", "conv3", "silu"])
def test_layers_keep_unit_variance(layer: str) -> None:
    """Unit Gaussian in, unit magnitude out (away from the zero padding)."""
    torch.manual_seed(1)
    if layer == "linear":
        y = MPLinear(64, 256)(normal(512, 64, seed=0, dtype=torch.float32))
    elif layer == "silu":
        y = mp_silu(normal(200_000, seed=0))
    else:
        kernel = int(layer[-1])
        y = MPConv(32, 128, kernel)(normal(16, 32, 8, 8, seed=0, dtype=torch.float32))[:, :, 1:-1, 1:-1]
    assert float(y.detach().square().mean().sqrt()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0])
def test_concatenation_weights_parts_by_magnitude_not_by_channels(weight: float) -> None:
    """Whatever the numbers of channels, b's share of the norm is w/√((1 − w)² + w²), and the whole keeps unit variance (EDM2, Eq. 103)."""
    a, b = normal(2, 6, 200, 100, seed=0), normal(2, 30, 200, 100, seed=1)
    y = mp_cat(a, b, weight)
    assert y.shape == (2, 36, 200, 100)
    assert float(y.square().mean()) == pytest.approx(1, abs=0.01)
    share = float(y[:, 6:].square().sum() / y.square().sum())
    assert share == pytest.approx(weight**2 / ((1 - weight) ** 2 + weight**2), abs=0.01)
    torch.testing.assert_close(y[:, 6:] / y[0, 6, 0, 0] * b[0, 0, 0, 0], b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cosine", [False, True])
def test_self_attention_is_its_formula(cosine: bool) -> None:
    """Position by position and head by head: y_i = Σ_j softmax_j(q_i·k_j/√d) v_j, with q, k, v of unit RMS if `cosine`."""
    heads, d = 2, 3
    qkv = normal(2, 3 * heads * d, 2, 4, seed=0)
    y = self_attention(qkv, heads, cosine)
    assert y.shape == (2, heads * d, 2, 4)
    for n in range(2):
        for h in range(heads):
            q, k, v = (qkv[n, (part * heads + h) * d :][:d].reshape(d, 8).T for part in range(3))
            if cosine:
                q, k, v = (u / ((u**2).mean(dim=1, keepdim=True) + 1e-4).sqrt() for u in (q, k, v))
            expected = torch.stack([torch.softmax(k @ q[i] / math.sqrt(d), 0) @ v for i in range(8)])
            torch.testing.assert_close(y[n, h * d : (h + 1) * d].reshape(d, 8).T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pairs", [False, True])
def test_attention_gets_what_fused_kernels_take(
    order: torch.memory_format, cosine: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v in one piece each, their d elements side by side, in either memory order; else torch falls back to the L×L matrix."""
    seen: list[Any] = []

    def look(*arguments: Any) -> Any:
        seen.extend(arguments)
        return attention(*arguments)

    monkeypatch.setattr(layers, "attention", look)
    qkv = normal(2, 24, 4, 6, seed=0).to(memory_format=order)
    self_attention(Dual(qkv, qkv) if pairs else qkv, 2, cosine)
    tensors = [t for x in seen for t in (x if pairs else [x])]
    assert len(tensors) == (6 if pairs else 3)
    for tensor in tensors:
        assert tensor.shape == (2, 2, 24, 4)
        assert tensor.stride(-1) == 1
        assert tensor.is_contiguous()


CONDITION, MOTION = normal(2, 12, seed=5), normal(2, 12, seed=6)
LAYERS: dict[str, tuple[Callable[[], nn.Module] | None, Callable[..., Any]]] = {
    "linear": (lambda: MPLinear(6, 4), lambda x, s, layer: layer(dual.rearrange(x, lambda v: v[:, :, 0, 0]))),
    "conv": (lambda: MPConv(6, 4, 3), lambda x, s, layer: layer(x)),
    "silu": (None, lambda x, s, layer: mp_silu(x)),
    "double norm": (None, lambda x, s, layer: adaptive_double_norm(x, s)),
    "cat": (None, lambda x, s, layer: mp_cat(x, dual.silu(x), 0.3)),
    "dropout": (None, lambda x, s, layer: random_dropout(x, 0.4, training=True)),
    "attention": (None, lambda x, s, layer: self_attention(x, 1, cosine=False)),
    "cosine attention": (None, lambda x, s, layer: self_attention(x, 2, cosine=True)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layers_tangent_is_the_jvp_and_a_finite_difference(name: str) -> None:
    """(value, tangent) through each layer: torch.func.jvp, and central differences with Richardson's extrapolation, to 1e-8."""
    make, call = LAYERS[name]
    layer = None if make is None else make().double()
    x, dx = normal(2, 6, 4, 4, seed=0), normal(2, 6, 4, 4, seed=1)

    def at(x: Any, s: Any) -> Any:
        torch.manual_seed(3)  # the mask
        return call(x, s, layer)

    value, tangent = at(Dual(x, dx), Dual(CONDITION, MOTION))
    with sdpa_kernel(SDPBackend.MATH):
        expected, jvp = torch.func.jvp(at, (x, CONDITION), (dx, MOTION))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, jvp, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        steps = [
            (at(x + h * dx, CONDITION + h * MOTION) - at(x - h * dx, CONDITION - h * MOTION)) / (2 * h)
            for h in (2e-5, 4e-5)
        ]
    torch.testing.assert_close(tangent, (4 * steps[0] - steps[1]) / 3, rtol=1e-8, atol=1e-8)
    assert tangent.abs().max() > 0.1
    assert not tangent.requires_grad


def test_weights_are_applied_in_the_format_of_what_they_meet() -> None:
    """float32 weights act on half-precision activations and float64 ones; the parameters stay what they are."""
    layer = MPConv(4, 4, 3)
    x = normal(2, 4, 4, 4, seed=0)
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)):
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), layer(x), rtol=0, atol=tolerance)
    assert layer.weight.dtype == torch.float32
