# SPDX-License-Identifier: Apache-2.0
"""t' = 0, where f(x, 0) = x whatever the network says: networks of EDM's ln tan t, which have no value there, learn the same."""

import pytest
import torch
from torch import Tensor

from scm_core.nn.embedding import NoiseInput
from scm_core.nn.unet_edm2 import EDM2UNet
from scm_core.objectives import Batch
from scm_core.objectives.discrete import discrete_tangent, interval_times
from scm_core.objectives.ect import EctObjective
from scm_core.objectives.methods import METHODS
from scm_core.trigflow import consistency_function, diffuse, sigma_to_t, velocity

SIGMA_DATA = 0.5
SHAPE = (2, 4, 4)
C_NOISE: tuple[NoiseInput, ...] = ("edm", "t")


def network(c_noise: NoiseInput, seed: int = 0) -> EDM2UNet:
    torch.manual_seed(seed)
    net = EDM2UNet(
        2, 4, 0, width=8, multipliers=(1,), blocks=1, attention_resolutions=(), head_channels=4, c_noise=c_noise
    )
    torch.nn.init.constant_(net.out_gain, 0.9)
    return net


def batch(count: int = 6) -> Batch:
    x0 = SIGMA_DATA * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    return Batch(x0, None, torch.arange(count))


@pytest.mark.parametrize("c_noise", C_NOISE)
@pytest.mark.parametrize("method", ["dsct", "dscd"])
def test_discrete_time_in_its_first_interval(c_noise: NoiseInput, method: str) -> None:
    """Every t is t_1: the loss is finite, its tangent −cos(t) (σ_d F − dx_t/dt), which F' and the warm-up have no part in."""
    net, teacher = network(c_noise), network(c_noise, 1).eval()
    options = {"P_mean": -30.0, "P_std": 0.1, "warmup": 0, "normalize": "none", "adaptive_weighting": False}
    made = METHODS[method](net, teacher, SIGMA_DATA, SHAPE, intervals=8, **options)
    terms = made.objective(batch(), torch.Generator().manual_seed(3), 0)
    z = SIGMA_DATA * torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(3))
    t = interval_times(8, SIGMA_DATA)[1].float().expand(6)
    x_t = diffuse(batch().x0, z, t)
    with torch.no_grad():
        dxdt = velocity(batch().x0, z, t) if method == "dsct" else SIGMA_DATA * teacher(x_t / SIGMA_DATA, t)
        g = -torch.cos(t)[:, None, None, None] * (SIGMA_DATA * net(x_t / SIGMA_DATA, t) - dxdt)
    assert torch.equal(terms.t, t)
    torch.testing.assert_close(terms.loss.detach(), g.square().mean(), rtol=1e-5, atol=1e-7)
    terms.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("c_noise", C_NOISE)
def test_only_the_samples_at_zero_are_asked_elsewhere(c_noise: NoiseInput) -> None:
    """In a batch where some t' are 0 the others' g is the difference quotient with F' at their own t'."""
    net, t = network(c_noise).double(), torch.tensor([0.004, 0.3, 0.004, 1.2], dtype=torch.float64)
    t_prev = torch.tensor([0.0, 0.2, 0.0, 1.0], dtype=torch.float64)
    x_t, dxdt = (
        SIGMA_DATA * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(s)).double() for s in (1, 2)
    )
    g = discrete_tangent(net, x_t, t, t_prev, dxdt, SIGMA_DATA, normalize="none").g
    wide = [v[:, None, None, None] for v in (t, t - t_prev)]
    x_prev = torch.cos(wide[1]) * x_t - torch.sin(wide[1]) * dxdt

    def f(x: Tensor, t: Tensor) -> Tensor:
        at = t.clamp(min=1e-300)  # 0 · F, with a finite F
        return consistency_function(net(x / SIGMA_DATA, at), x, t, SIGMA_DATA)

    expected = torch.cos(wide[0]) * (f(x_t, t) - f(x_prev, t_prev)) / torch.sin(wide[1])
    torch.testing.assert_close(g, expected.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("c_noise", C_NOISE)
def test_ect_in_its_first_stage(c_noise: NoiseInput) -> None:
    """r = 0: the target is x0 itself; the loss is finite and so are its gradients."""
    net = network(c_noise)
    own = EctObjective(net, SIGMA_DATA, P_mean=-3.0, P_std=0.5, stage_iterations=10, c=0.03)
    terms = own(batch(), torch.Generator().manual_seed(3), 0)
    assert float(terms.scalars["gap"]) == 1
    generator = torch.Generator().manual_seed(3)
    z = SIGMA_DATA * torch.randn(6, *SHAPE, generator=generator)
    sigma = torch.exp(-3.0 + 0.5 * torch.randn(6, generator=generator))
    theta = sigma_to_t(sigma, SIGMA_DATA)
    x_t = diffuse(batch().x0, z, theta)
    with torch.no_grad():
        f_t = consistency_function(net(x_t / SIGMA_DATA, theta), x_t, theta, SIGMA_DATA)
        distance = (f_t - batch().x0).flatten(1).norm(dim=1)
    expected = (((distance.double() ** 2 + 0.03**2).sqrt() - 0.03) / sigma).mean().float()
    torch.testing.assert_close(terms.loss.detach(), expected, rtol=1e-5, atol=1e-6)
    terms.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())
