# SPDX-License-Identifier: Apache-2.0
"""Magnitude-preserving layers, adaptive double normalisation and embeddings against their formulas (§4.1, App. G)."""

import math

import pytest
import torch
from torch import Tensor, nn

from scm_core.nn.embedding import PositionalEmbedding
from scm_core.nn.layers import MPConv, MPLinear, MPWeight, adaptive_double_norm, mp_silu, normalize_weights
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
    layer.normalize_()
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


def test_positional_embedding_frequencies() -> None:
    """ω_k = (1/10000)^{k/(K−1)} falls from 1 to 1e-4; the embedding is √2 (cos ω t, sin ω t) of exactly unit mean square."""
    embedding = PositionalEmbedding(16)
    t = torch.linspace(0, math.pi / 2, 7, dtype=F64)
    y = embedding(t)
    assert y.shape == (7, 16)
    for k in range(8):
        omega = 10000 ** (-k / 7)
        torch.testing.assert_close(y[:, k], math.sqrt(2) * torch.cos(omega * t), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y[:, 8 + k], math.sqrt(2) * torch.sin(omega * t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.square().mean(1), torch.ones(7, dtype=F64))
    assert embedding.frequencies[0] == 1
    assert float(embedding.frequencies[-1]) == pytest.approx(1e-4)
    assert not list(embedding.state_dict())  # nothing to store


def test_time_derivative_of_the_embedding_is_at_most_root_two() -> None:
    """|∂_t emb_k| ≤ √2 ω_k ≤ √2: the reason for these frequencies (§4.1)."""
    embedding = PositionalEmbedding(64)
    t = torch.linspace(0, math.pi / 2, 50, dtype=F64)
    _, derivative = torch.func.jvp(embedding, (t,), (torch.ones_like(t),))
    assert derivative.abs().max() <= math.sqrt(2)


@pytest.mark.parametrize("channels", [0, 2, 7])
def test_embedding_of_a_wrong_width_is_named(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels: expected an even number >= 4, got {channels}"):
        PositionalEmbedding(channels)
