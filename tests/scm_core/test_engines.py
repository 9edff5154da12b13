# SPDX-License-Identifier: Apache-2.0
"""Half precision and the ends of time: what the tangent's arithmetic and the central differences do with them."""

import math

import pytest
import torch
from torch import Tensor

from scm_core.engines import central_step, value_and_jvp
from scm_core.nn.mlp import MLP
from scm_core.nn.network import Precision
from scm_core.nn.unet_edm2 import EDM2UNet
from scm_core.objectives.consistency import Conditioned
from scm_core.tangent import tangent
from scm_core.trigflow import diffuse, velocity

SIGMA_DATA = 0.5
F64 = torch.float64


def point(count: int = 32, low: float = 1e-2) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t, dx_t/dt of points of two dimensions, float64, t dense at both ends."""
    generator = torch.Generator().manual_seed(1)
    x0, z = (SIGMA_DATA * torch.randn(count, 2, generator=generator, dtype=F64) for _ in range(2))
    t = torch.atan(torch.logspace(math.log10(low), -math.log10(low), count, dtype=F64))
    return diffuse(x0, z, t), t, velocity(x0, z, t)


def network(precision: Precision) -> MLP:
    torch.manual_seed(0)
    net = MLP(2, 32, 2, precision)
    torch.nn.init.ones_(net.out_gain)
    return net


def test_central_step_is_the_cube_root_of_the_rounding() -> None:
    """As its docstring says: 5e-3, 0.1, 0.2."""
    steps = [central_step(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert steps == pytest.approx([5e-3, 0.1, 0.2], rel=0.05)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("fp16", 0.07), ("bf16", 0.26)])
def test_central_differences_fit_the_trunk(precision: Precision, bound: float) -> None:
    """The derivative of a half-precision network by central differences, against float64; with float32's step it would be noise.

    Also where the objective has bound labels and guidance.
    """
    x_t, t, dxdt = point()
    dt = SIGMA_DATA * torch.cos(t) * torch.sin(t)
    x, dx = x_t / SIGMA_DATA, (torch.cos(t) * torch.sin(t))[:, None] * dxdt
    _, exact = value_and_jvp(network("fp32").double(), x, t, dx, dt, "dual")
    net, inputs = network(precision), [v.float() for v in (x, t, dx, dt)]
    for own in (net, Conditioned(net, None, None)):
        _, J = value_and_jvp(own, *inputs, "finite_difference")
        assert float((J - exact).norm() / exact.norm()) < bound
    h = central_step(torch.float32)
    with torch.no_grad():
        noise = (net(x + h * dx, t + h * dt) - net(x - h * dx, t - h * dt)) / (2 * h) if precision != "fp32" else exact
    assert precision == "fp32" or float((noise - exact).norm() / exact.norm()) > bound


def test_central_differences_stay_within_the_times() -> None:
    """t ± h dt of Algorithm 1 is in (0, π/2) where t is: a network of ln tan t has a value there, at any step h < 1/σ_d."""
    torch.manual_seed(0)
    net = EDM2UNet(
        2, 4, 0, width=8, multipliers=(1,), blocks=1, attention_resolutions=(), head_channels=4, c_noise="edm"
    )
    torch.nn.init.ones_(net.out_gain)
    t = torch.tensor([1e-6, 1e-3, 0.7, math.atan(160), math.pi / 2 - 1e-4])
    generator = torch.Generator().manual_seed(2)
    x_t, dxdt = (SIGMA_DATA * torch.randn(5, 2, 4, 4, generator=generator) for _ in range(2))
    result = tangent(net, x_t, t, dxdt, SIGMA_DATA, normalize="none", engine="finite_difference")
    assert torch.isfinite(result.g).all()
    for h in (central_step(torch.float32), central_step(torch.bfloat16), 1.0):
        step = h * SIGMA_DATA * torch.cos(t.double()) * torch.sin(t.double())
        assert ((t - step > 0) & (t + step < math.pi / 2)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("engine", ["func", "finite_difference"])
def test_the_arithmetic_is_never_in_half_precision(dtype: torch.dtype, engine: str) -> None:
    """A network that returns F in half precision: g is what float32 makes of its F and J; σ_d F is not rounded to half again."""
    x_t, t, dxdt = (v.float() for v in point())
    sigma_data = 0.3  # a product with 0.5 would not round
    inner = network("fp32")

    def half(x: Tensor, t: Tensor) -> Tensor:
        return inner(x, t).to(dtype)

    result = tangent(half, x_t, t, dxdt, sigma_data, normalize="none", engine=engine)  # type: ignore[arg-type]
    assert result.F.dtype == dtype
    assert result.g.dtype == result.norm.dtype == torch.float32
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    F, J = value_and_jvp(half, x_t / sigma_data, t, cos * sin * dxdt, (cos * sin * sigma_data).flatten(), engine)  # type: ignore[arg-type]
    expected = -(cos**2) * (sigma_data * F.float() - dxdt) - (cos * sin * x_t + J.float())
    torch.testing.assert_close(result.g, expected.detach(), rtol=1e-6, atol=1e-7)
