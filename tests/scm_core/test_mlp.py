# SPDX-License-Identifier: Apache-2.0
"""The network for points: its tangents against autograd and finite differences, its precision, what it refuses."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scm_core.nn.build import build_network, load_model, save_model
from scm_core.nn.dual import Dual
from scm_core.nn.layers import normalize_weights
from scm_core.nn.mlp import MLP
from scm_core.nn.network import Precision

F64 = torch.float64
CONFIG = {"architecture": "mlp", "dim": 2, "width": 16, "blocks": 2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(precision: Precision = "fp32") -> MLP:
    """A network whose output gain is not zero, as if trained: at initialisation every tangent would be 0."""
    torch.manual_seed(5)
    net = MLP(2, width=16, blocks=2, precision=precision)
    torch.nn.init.constant_(net.out_gain, 1.3)
    return net


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t and a direction (dx, dt)."""
    t = torch.tensor([0.01, 0.5, 1.1, math.atan(160), 1.4], dtype=F64)
    return normal(5, 2, seed=0), t, normal(5, 2, seed=1), normal(5, seed=2)


def test_tangent_is_torch_func_jvp() -> None:
    net, (x, t, dx, dt) = network().double(), inputs()
    F, dF = net(Dual(x, dx), Dual(t, dt))
    expected, jvp = torch.func.jvp(lambda x, t: net(x, t), (x, t), (dx, dt))
    torch.testing.assert_close(F, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dF, jvp, rtol=1e-11, atol=1e-12)
    assert jvp.square().mean() > 1e-2
    for part in (0, 1):  # both inputs matter
        moved = [dx * (part == 0), dt * (part == 1)]
        assert torch.func.jvp(lambda x, t: net(x, t), (x, t), tuple(moved))[1].abs().max() > 1e-2


def test_tangent_is_a_finite_difference() -> None:
    net, (x, t, dx, dt) = network().double(), inputs()
    _, dF = net(Dual(x, dx), Dual(t, dt))
    h = 1e-5
    difference = (net(x + h * dx, t + h * dt) - net(x - h * dx, t - h * dt)) / (2 * h)
    torch.testing.assert_close(dF, difference.detach(), rtol=1e-6, atol=1e-8)


def test_gradients_of_the_pair_pass_are_the_plain_ones() -> None:
    net, (x, t, dx, dt) = network().double(), inputs()
    direction = normal(5, 2, seed=7)
    F, dF = net(Dual(x, dx), Dual(t, dt))
    assert not dF.requires_grad
    parameters = list(net.parameters())
    pairs = torch.autograd.grad((F * direction).sum(), parameters)
    plain = torch.autograd.grad((net(x, t) * direction).sum(), parameters)
    for got, expected in zip(pairs, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
        assert expected.abs().max() > 0


@pytest.mark.parametrize(("precision", "eps"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_a_half_precision_trunk_errs_by_its_rounding(precision: Precision, eps: float) -> None:
    """Value and tangent are those of float32 up to a few roundings of the format, and no better; F itself is float32."""
    exact, half = network(), network(precision)
    x, t, dx, dt = (v.float() for v in inputs())
    for got, expected in zip(half(Dual(x, dx), Dual(t, dt)), exact(Dual(x, dx), Dual(t, dt)), strict=True):
        assert got.dtype == torch.float32
        error = float((got - expected).detach().norm() / expected.detach().norm())
        assert eps / 4 < error < 10 * eps


def test_weights_keep_their_norm_and_the_output_starts_at_zero() -> None:
    net = build_network(CONFIG)
    x, t, *_ = (v.float() for v in inputs())
    assert not net(x, t).any()
    for parameter in net.parameters():
        parameter.data.add_(1.0)
    normalize_weights(net)
    for name, parameter in net.named_parameters():
        if parameter.ndim:
            torch.testing.assert_close(parameter.square().mean(1), torch.ones(len(parameter)), msg=name)


def test_a_model_file_gives_the_same_network(tmp_path: Path) -> None:
    net = network()
    x, t, *_ = (v.float() for v in inputs())
    save_model(tmp_path / "m.safetensors", dict(net.named_parameters()), CONFIG)
    assert torch.equal(load_model(tmp_path / "m.safetensors").net(x, t), net(x, t))


def test_misuse_is_named() -> None:
    net, (x, t, *_) = network().double(), inputs()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 2\), got \(5, 3\)"):
        net(normal(5, 3, seed=0), t)
    with pytest.raises(ValueError, match=r"labels: .* no label input"):
        net(x, t, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"guidance: .* no guidance input"):
        net(x, t, None, torch.ones(5))
    with pytest.raises(ValueError, match=r"t: expected float32 or float64, got torch\.bfloat16"):
        net(x, t.bfloat16())
    with pytest.raises(ValueError, match="precision: expected one of fp32, fp16, bf16, got 'fp8'"):
        build_network({**CONFIG, "precision": "fp8"})
    with pytest.raises(ValueError, match="width: expected a positive multiple of 2, got 7"):
        build_network({**CONFIG, "width": 7})
    with pytest.raises(ValueError, match="blocks: expected at least 1, got 0"):
        build_network({**CONFIG, "blocks": 0})
    with pytest.raises(ValueError, match=r"t: expected shape \(5,\), one for each sample, got \(1,\)"):
        net(x, t[:1])
    for pair, name in (((Dual(x, x[:1]), t), "x"), ((x, Dual(t, t[:1])), "t")):
        with pytest.raises(ValueError, match=f"tangent of {name}: expected the shape"):
            net(*pair)


def test_everything_with_parameters_works_in_their_format() -> None:
    """Whatever the format of x and t: a float32 network gives float32, and a float64 one what it gives for float64 inputs."""
    net, (x, t, dx, dt) = network(), inputs()
    F, dF = net(Dual(x, dx), Dual(t, dt))
    assert (F.dtype, dF.dtype) == (torch.float32, torch.float32)
    exact = net.double()(x.float(), t)
    assert exact.dtype == F64
    torch.testing.assert_close(exact, net(x.float().double(), t), rtol=0, atol=0)
