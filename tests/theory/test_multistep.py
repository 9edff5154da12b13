# SPDX-License-Identifier: Apache-2.0
"""Multistep distillation: one segment is sCD bit for bit; the true segment functions of Gaussian data have no tangent."""

import math

import pytest
import torch
from torch import Tensor

from scm_core.guidance import teacher_velocity
from scm_core.nn.small import SmallNet
from scm_core.objectives import Batch
from scm_core.objectives.methods import METHODS
from scm_core.objectives.multistep import MultistepObjective
from scm_core.sampling import segment_times
from scm_core.tangent import tangent
from scm_core.trigflow import diffuse, t_max

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (1, 2, 3)
MEAN = torch.tensor([0.0, 0.3, -0.7, 0.1, 1.0, -0.2], dtype=F64).reshape(SHAPE)
STD = torch.tensor([0.05, 0.2, 0.4, 0.5, 0.9, 1.5], dtype=F64).reshape(SHAPE)


def wide(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def deviation(t: Tensor) -> Tensor:
    """Standard deviation of x_t for data N(MEAN, diag STD²)."""
    return (torch.cos(t) ** 2 * STD**2 + torch.sin(t) ** 2 * SIGMA_DATA**2).sqrt()


def gaussian_ode(x: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt = cos t E[z | x_t] − sin t E[x0 | x_t]."""
    cos, sin = torch.cos(wide(t)), torch.sin(wide(t))
    residual = (x - cos * MEAN) / deviation(wide(t)) ** 2
    return cos * sin * SIGMA_DATA**2 * residual - sin * (MEAN + cos * STD**2 * residual)


def along_the_ode(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the PF-ODE through (x, t) is at s: (x − cos t m)/deviation is constant along it."""
    return torch.cos(wide(s)) * MEAN + deviation(wide(s)) / deviation(wide(t)) * (x - torch.cos(wide(t)) * MEAN)


def objective(segments: int, **options: object) -> MultistepObjective:
    return MultistepObjective(
        lambda x, t: x, None, lambda *_: None, SIGMA_DATA, -1.0, 1.4, 0, segments=segments, **options
    )


def times() -> Tensor:
    """From 1e-3 to arctan(160), and beyond it."""
    inner = torch.atan(torch.logspace(-3, math.log10(160), 200, dtype=F64))
    return torch.cat([inner, torch.tensor([t_max(SIGMA_DATA), 1.567, 1.57], dtype=F64)])


@pytest.mark.parametrize("segments", [1, 2, 4, 8, 16])
def test_ends(segments: int) -> None:
    """s is the boundary below t: at a boundary the next lower one, beyond t_max that of the last segment; times are cut uniformly."""
    own, width = objective(segments), t_max(SIGMA_DATA) / segments
    t = times()
    expected = torch.tensor([min(math.ceil(float(x) / width - 1e-12) - 1, segments - 1) * width for x in t], dtype=F64)
    torch.testing.assert_close(own.end(t), expected, rtol=0, atol=1e-12)
    for dtype in (torch.float32, F64):  # the sampler evaluates at the boundaries, rounded to its dtype
        boundaries = torch.tensor(segment_times(segments, SIGMA_DATA), dtype=dtype)
        assert torch.equal(own.end(boundaries[:-1]), boundaries[1:])
    assert float(own.end(torch.tensor([1e-9]))) == 0


@pytest.mark.parametrize("segments", [2, 4, 8, 16])
def test_tangent_of_the_true_segment_function_vanishes(segments: int) -> None:
    """F with f_s(x_t, t) = (the PF-ODE's x_s) has g = 0, for every t that is not within 1e-3 of the end s; the whole function's has not."""
    own, t = objective(segments, normalize="none"), times()
    t = t[t - own.end(t) > 1e-3]
    end = own.end(t)
    x_t = diffuse(MEAN + STD * torch.randn(len(t), *SHAPE, dtype=F64), torch.randn(len(t), *SHAPE, dtype=F64) / 2, t)

    def truth(end: Tensor):  # type: ignore[no-untyped-def]
        def net(x: Tensor, t: Tensor) -> Tensor:
            x_t, h = SIGMA_DATA * x, wide(t - end)
            return (torch.cos(h) * x_t - along_the_ode(x_t, t, end)) / (SIGMA_DATA * torch.sin(h))

        return net

    result = own.tangent(truth(end), x_t, t, gaussian_ode(x_t, t), 1.0)
    assert result.g.abs().max() < 1e-9
    whole = own.tangent(truth(torch.zeros_like(t)), x_t, t, gaussian_ode(x_t, t), 1.0)
    assert (whole.g.abs().flatten(1).amax(1)[end > 0] > 1e-6).all()


def test_tangent_is_the_derivative_of_the_segment_function() -> None:
    """g = cos(t − s) d/dt [cos(t − s) x_t − sin(t − s) σ_d F(x_t/σ_d, t)] along the ODE at fixed s, by autograd, for any F."""
    own = objective(4, normalize="none")
    t = times()[::5].contiguous()
    end = own.end(t)
    x_t = diffuse(MEAN + STD * torch.randn(len(t), *SHAPE, dtype=F64), torch.randn(len(t), *SHAPE, dtype=F64) / 2, t)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(1.5 * x + wide(t)) * torch.cos(3 * wide(t)) + 0.2 * x.flip(-1) ** 2

    def f(u: Tensor) -> Tensor:
        x_u, h = along_the_ode(x_t, t, u), wide(u - end)
        return torch.cos(h) * x_u - torch.sin(h) * SIGMA_DATA * net(x_u / SIGMA_DATA, u)

    _, total = torch.func.jvp(f, (t,), (torch.ones_like(t),))
    g = own.tangent(net, x_t, t, gaussian_ode(x_t, t), 1.0).g
    torch.testing.assert_close(g, torch.cos(wide(t - end)) * total, rtol=1e-9, atol=1e-9)


def test_no_warmup_leaves_the_difference_to_the_velocity() -> None:
    """r = 0: g = −cos²(t − s) (σ_d F − dx_t/dt)."""
    own, t = objective(4, normalize="none"), times()
    x_t, dxdt = torch.randn(len(t), *SHAPE, dtype=F64), torch.randn(len(t), *SHAPE, dtype=F64)
    g = own.tangent(lambda x, t: torch.tanh(x), x_t, t, dxdt, 0.0).g
    cos = torch.cos(wide(t - own.end(t)))
    torch.testing.assert_close(
        g, -(cos**2) * (SIGMA_DATA * torch.tanh(x_t / SIGMA_DATA) - dxdt), rtol=1e-12, atol=1e-13
    )


def small_net(guidance_input: bool, seed: int, dropout: float = 0.0) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet(2, 4, labels=3, width=8, blocks=2, guidance_input=guidance_input, dropout=dropout)
    for name, parameter in net.named_parameters():
        if "gain" in name:
            torch.nn.init.constant_(parameter, 0.9)
    return net


@pytest.mark.parametrize("normalize", ["norm", "none"])
def test_one_segment_is_scd_bit_for_bit(normalize: str) -> None:
    """Loss, gradients of network and head, and what is logged: equal in float32, with guidance, dropout and warm-up; M = 2 differs."""
    results = {}
    for name, options in {"scd": {}, "one": {"segments": 1}, "two": {"segments": 2}}.items():
        net, teacher = small_net(True, 5, dropout=0.3).train(), small_net(False, 8).eval()
        method = METHODS["scd" if name == "scd" else "multistep"](
            net, teacher, SIGMA_DATA, (2, 4, 4),
            P_mean=-1.0, P_std=1.4, warmup=10, normalize=normalize, guidance=(1.0, 2.0), **options,
        )  # fmt: skip
        x0 = SIGMA_DATA * torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(4)
        terms = method.objective(Batch(x0, torch.arange(16) % 3, torch.arange(16)), torch.Generator().manual_seed(2), 7)
        terms.loss.backward()
        modules = {"net": net, **method.heads}
        grads = {f"{m}.{n}": p.grad for m, module in modules.items() for n, p in module.named_parameters()}
        results[name] = {"loss": terms.loss.detach(), **terms.scalars, **grads}
    scd, one, two = results["scd"], results["one"], results["two"]
    assert scd.keys() == one.keys()
    for key, value in scd.items():
        assert value is not None, key
        assert torch.equal(value, one[key]), key
    assert not torch.equal(scd["net.conv_in.weight"], two["net.conv_in.weight"])


def test_the_objective_uses_its_ends() -> None:
    """The whole objective's logged tangent is the one towards the segment's end, from pieces."""
    net, teacher = small_net(False, 5), small_net(False, 8).eval()
    own = MultistepObjective(net, None, teacher_velocity(teacher, SIGMA_DATA), SIGMA_DATA, -1.0, 1.4, 0, segments=4)
    x0 = SIGMA_DATA * torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    terms = own(Batch(x0, None, torch.arange(16)), torch.Generator().manual_seed(2), 7)
    generator = torch.Generator().manual_seed(2)
    z = SIGMA_DATA * torch.randn(x0.shape, generator=generator)
    t = own.times(16, generator)
    x_t = diffuse(x0, z, t)
    dxdt = (SIGMA_DATA * teacher(x_t / SIGMA_DATA, t)).detach()
    expected = tangent(net, x_t, t, dxdt, SIGMA_DATA, end=own.end(t)).norm.mean()
    torch.testing.assert_close(terms.scalars["tangent_norm"], expected, rtol=1e-6, atol=0)
    assert len(own.end(t).unique()) > 1


@pytest.mark.parametrize("segments", [0, -1])
def test_bad_options(segments: int) -> None:
    """Fewer than one segment: ValueError with name and value."""
    with pytest.raises(ValueError, match=f"segments: expected at least 1, got {segments}"):
        objective(segments)
