# SPDX-License-Identifier: Apache-2.0
"""Wrapped networks as modules: parameters, labels, guidance, samplers, what they refuse. (The maths: tests/theory/test_conversions.py.)"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scm_core.conversions import (
    CosineSchedule,
    EDMNetwork,
    EDMSchedule,
    FlowSchedule,
    LinearVPSchedule,
    TrigFlowNet,
    edm_denoiser,
    flow_velocity,
    from_trigflow,
    to_trigflow,
)
from scm_core.engines import value_and_jvp
from scm_core.guidance import guided
from scm_core.nn.small import SmallNet
from scm_core.sampling import Guided, sample_consistency, sample_diffusion

SIGMA_DATA = 0.5
SHAPE = (2, 4, 4)
WRAPPERS: dict[str, Callable[[Callable[..., Tensor]], nn.Module]] = {
    "edm": lambda net: edm_denoiser(net, SIGMA_DATA),
    "raw edm": lambda net: EDMNetwork(net, SIGMA_DATA),
    "flow": lambda net: flow_velocity(net, SIGMA_DATA),
    "cosine v": lambda net: TrigFlowNet(net, CosineSchedule(), "velocity", SIGMA_DATA),
    "vp epsilon": lambda net: TrigFlowNet(net, LinearVPSchedule(), "epsilon", SIGMA_DATA),
}


def network(guidance_input: bool = True) -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet(*SHAPE[:2], labels=3, width=8, blocks=1, guidance_input=guidance_input, dropout=0.5)
    nn.init.ones_(net.out_gain)
    if guidance_input:
        nn.init.ones_(net.guidance_gain)
    return net


@pytest.fixture
def point() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, *SHAPE, generator=generator), torch.tensor([0.01, 0.4, 1.0, 1.5])


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_is_a_module(name: str, point: tuple[Tensor, Tensor]) -> None:
    """Parameters, modes and types of the network inside are reached through the wrapper, and so are gradients."""
    net = network()
    wrapped = WRAPPERS[name](net)
    assert list(wrapped.parameters()) == list(net.parameters())
    assert net.training
    wrapped.eval()
    assert not net.training
    x, t = point
    wrapped(x, t, torch.tensor([0, 1, 2, -1])).square().sum().backward()
    assert net.conv_in.weight.grad is not None
    assert net.conv_in.weight.grad.any()
    assert wrapped.double()(x.double(), t.double()).dtype == torch.float64


@pytest.mark.parametrize("name", WRAPPERS)
def test_labels_and_guidance_are_passed_on(name: str, point: tuple[Tensor, Tensor]) -> None:
    """What is given arrives, what is None is left out: a foreign network need not have the argument."""
    seen: list[tuple[Any, ...]] = []

    def spy(x: Tensor, s: Tensor, *rest: Any) -> Tensor:
        assert s.shape == (4,)
        seen.append(rest)
        return x

    (x, t), labels, scale = point, torch.tensor([0, 1, 2, -1]), torch.full((4,), 1.5)
    wrapped = WRAPPERS[name](spy)
    for given in ((), (None, None), (labels,), (labels, None), (labels, scale), (None, scale)):
        wrapped(x, t, *given)
    assert seen == [(), (), (labels,), (labels,), (labels, scale), (None, scale)]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_networks_are_sampled_and_guided(name: str) -> None:
    """Samplers, classifier-free guidance, NFE and the check of labels work as with a network of our own."""
    wrapped = WRAPPERS[name](network(guidance_input=False)).eval()
    z = SIGMA_DATA * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    bound = Guided(wrapped, torch.tensor([0, 2]), 1.5)
    for solver in ("ddim", "heun", "dpm2m", "dpmpp2m"):
        assert torch.isfinite(sample_diffusion(bound, z, 3, SIGMA_DATA, solver)).all()
    assert bound.nfe == 2 * (3 + 5 + 3 + 3)
    student = Guided(wrapped, torch.tensor([0, 2]), student=True)
    assert torch.isfinite(sample_consistency(student, z, (1.5,), SIGMA_DATA)).all()
    with pytest.raises(ValueError, match=r"labels: expected -1 \(none\) to 2, got 3"):
        Guided(wrapped, torch.tensor([0, 3]))


@pytest.mark.parametrize("name", WRAPPERS)
def test_guidance_commutes_with_wrapping(name: str, point: tuple[Tensor, Tensor]) -> None:
    """The wrapper is affine in the network's output: guiding F is guiding what the network predicts."""
    net = network(guidance_input=False).double().eval()
    (x, t), labels = (point[0].double(), point[1].double()), torch.tensor([0, 1, 2, 0])

    def guided_inside(x: Tensor, s: Tensor) -> Tensor:
        uncond, cond = net(x, s), net(x, s, labels)
        return uncond + 1.7 * (cond - uncond)

    got = guided(WRAPPERS[name](net), x, t, labels, 1.7)
    torch.testing.assert_close(got, WRAPPERS[name](guided_inside)(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WRAPPERS)
def test_forward_derivative_is_that_of_finite_differences(name: str, point: tuple[Tensor, Tensor]) -> None:
    """func.jvp goes through wrapper and network, for the sCM tangent."""
    wrapped = WRAPPERS[name](network().double()).eval()
    x, t = point[0].double(), point[1].double()
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dt = (torch.cos(t) * torch.sin(t)) * 0.5
    F, dF = value_and_jvp(wrapped, x, t, dx, dt, "auto")
    _, expected = value_and_jvp(wrapped, x, t, dx, dt, "finite_difference")
    assert F.requires_grad
    torch.testing.assert_close(dF, expected, rtol=1e-6, atol=1e-6)


def test_known_points() -> None:
    """Half-way in flow matching (σ/α = 1) is t = arctan 2; EDM's σ = 0.5 is π/4; the cosine schedule's s for σ_d = 1 is 2t/π."""
    t = torch.tensor([math.atan(2)], dtype=torch.float64)
    assert float(FlowSchedule().at(t, 0.5).s) == pytest.approx(0.5)
    assert float(FlowSchedule(reverse=True).at(t, 0.5).s) == pytest.approx(0.5)
    assert float(EDMSchedule().at(torch.tensor([math.pi / 4], dtype=torch.float64), 0.5).s) == pytest.approx(0.5)
    assert float(CosineSchedule().at(t, 1.0).s) == pytest.approx(math.atan(2) / (math.pi / 2))
    s = LinearVPSchedule().at(t, 0.5).s  # σ/α = 1: q = ln 2 = 0.1 s + 19.9 s²/2
    assert float(0.1 * s + 19.9 * s**2 / 2) == pytest.approx(math.log(2))
    start = torch.tensor([math.pi / 2], dtype=torch.float64)
    assert float(FlowSchedule().at(start, 0.5).s) == pytest.approx(1, abs=1e-15)
    assert float(CosineSchedule().at(start, 0.5).s) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.zeros(3), r"t: expected shape \(4,\)"),
        (torch.zeros(4, dtype=torch.bfloat16), "t: expected float32 or float64, got torch.bfloat16"),
        (torch.zeros(4, device="meta"), "t: expected the device cpu of x, got meta"),
    ],
)
def test_times_that_do_not_fit_are_named(name: str, t: Tensor, message: str) -> None:
    """As everywhere, before the network is called."""
    with pytest.raises(ValueError, match=message):
        WRAPPERS[name](network())(torch.zeros(4, *SHAPE), t)


def test_misuse_is_named() -> None:
    """Unknown predictions, impossible schedules, σ_d ≤ 0."""
    with pytest.raises(ValueError, match="prediction: expected 'x0', 'epsilon', 'velocity' or 'flow', got 'v'"):
        TrigFlowNet(network(), FlowSchedule(), "v", SIGMA_DATA)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"beta_max: expected a number above beta_min = 0\.1, got 0\.1"):
        LinearVPSchedule(0.1, 0.1)
    with pytest.raises(ValueError, match="beta_min: expected a positive number, got 0"):
        LinearVPSchedule(0, 1)
    x, t = torch.zeros(4, *SHAPE), torch.zeros(4)
    for call in (
        lambda: edm_denoiser(network(), 0.0),
        lambda: EDMNetwork(network(), 0.0),
        lambda: to_trigflow(x, t, EDMSchedule(), 0.0),
        lambda: from_trigflow(x, t, EDMSchedule(), 0.0),
    ):
        with pytest.raises(ValueError, match=r"sigma_data: expected a positive number, got 0\.0"):
            call()
    for convert, name in ((to_trigflow, "s"), (from_trigflow, "t")):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(4,\)"):
            convert(x, t[:3], EDMSchedule(), SIGMA_DATA)


@pytest.mark.parametrize("t", [-0.1, 1.6, math.nan])
def test_times_out_of_range_are_named(t: float) -> None:
    """TrigFlow's times are in [0, π/2], whatever the schedule."""
    for schedule in (EDMSchedule(), FlowSchedule(), CosineSchedule(), LinearVPSchedule()):
        with pytest.raises(ValueError, match=rf"t: expected times in \[0, π/2\] radians, got {t:g}"):
            from_trigflow(torch.zeros(2, 3), torch.tensor([0.5, t]), schedule, SIGMA_DATA)


def test_times_outside_a_schedule_are_named() -> None:
    """A time at which signal or noise would be negative, or no number; the ends of each schedule pass."""
    for schedule, inside, outside in (
        (EDMSchedule(), [0.0, 80.0], [-0.1, math.nan]),
        (FlowSchedule(), [0.0, 1.0], [-0.1, 1.1, math.nan]),
        (FlowSchedule(reverse=True), [0.0, 1.0], [-0.1, 1.1]),
        (CosineSchedule(), [0.0, 1.0], [-0.1, 1.1]),
        (LinearVPSchedule(), [0.0, 1.0], [-0.005, math.nan]),
    ):
        x, t = to_trigflow(torch.ones(2, 3), torch.tensor(inside), schedule, SIGMA_DATA)
        assert torch.isfinite(x).all()
        assert ((t >= 0) & (t < 1.5708)).all()
        for s in outside:
            with pytest.raises(ValueError, match=f"s: expected times of the schedule, .*got {s:g}"):
                to_trigflow(torch.ones(2, 3), torch.tensor([inside[0], s]), schedule, SIGMA_DATA)
