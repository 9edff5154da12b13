# SPDX-License-Identifier: Apache-2.0
"""Easy Consistency Tuning: its schedule of r, its correspondence with EDM's variables, its limits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scm_core.nn.small import SmallNet
from scm_core.objectives import Batch
from scm_core.objectives.ect import EctObjective, ect_gap, ect_loss
from scm_core.tangent import scm_tangent
from scm_core.trigflow import consistency_function, diffuse, sigma_to_t, velocity

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (2, 4, 4)
OPTIONS = {"P_mean": -1.0, "P_std": 1.8, "stage_iterations": 10, "c": 0.03}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def small_net(dropout: float = 0.0) -> SmallNet:
    torch.manual_seed(5)
    net = SmallNet(2, 4, labels=3, width=8, blocks=2, dropout=dropout)
    torch.nn.init.constant_(net.out_gain, 1.2)
    return net


def test_gap_is_its_formula() -> None:
    """t − r with r = t max(0, 1 − (1 + k sigmoid(−b t))/q^a), number by number."""
    t = torch.logspace(-4, 3, 40, dtype=F64)
    for stage, q, k, b in ((1, 2.0, 8.0, 1.0), (4, 2.0, 8.0, 1.0), (1, 256.0, 8.0, 1.0), (3, 4.0, 2.0, 0.5)):
        for x, gap in zip(t.tolist(), ect_gap(t, stage, q, k, b).tolist(), strict=True):
            n = 1 + k * math.exp(-b * x) / (1 + math.exp(-b * x))
            r = max(0.0, x * (1 - n / q**stage))
            assert x - gap == pytest.approx(r, abs=1e-12 * x)


def test_gap_begins_as_diffusion_and_halves_with_each_stage() -> None:
    """Stage 1, q = 2: r = 0 below σ = ln 7 (k = 8), r → t/2 for large σ. Once r > 0 at a time, t − r falls by q at each stage."""
    t = torch.tensor([1e-3, 0.5, math.log(7) - 1e-6, math.log(7) + 0.1, 500.0], dtype=F64)
    gap = ect_gap(t, 1, 2.0, 8.0, 1.0)
    assert torch.equal(gap[:3], t[:3])
    assert gap[3] < t[3]
    assert float(gap[4] / t[4]) == pytest.approx(0.5)
    gaps = torch.stack([ect_gap(t, stage, 2.0, 8.0, 1.0) for stage in range(4, 9)])
    torch.testing.assert_close(gaps[1:], gaps[:-1] / 2, rtol=1e-12, atol=0)
    # eight stages of 2 are one of 256
    torch.testing.assert_close(gaps[-1], ect_gap(t, 1, 256.0, 8.0, 1.0), rtol=1e-12, atol=0)


def test_consistency_function_is_edms_parametrisation() -> None:
    """cos θ x_θ − sin θ σ_d F = c_skip(σ) x_σ − c_out(σ) F with EDM's c_skip and c_out, and x_θ/σ_d = c_in(σ) x_σ: exact for every F."""
    sigma = torch.logspace(-3, 2, 50, dtype=F64)
    x0, eps, F = (randn(50, *SHAPE, seed=seed) for seed in (0, 1, 2))
    theta = sigma_to_t(sigma, SIGMA_DATA)
    x_theta = diffuse(x0, SIGMA_DATA * eps, theta)
    s = sigma[:, None, None, None]
    x_sigma = x0 + s * eps
    total = (s**2 + SIGMA_DATA**2).sqrt()
    torch.testing.assert_close(x_theta / SIGMA_DATA, x_sigma / total, rtol=1e-12, atol=1e-12)
    edm = SIGMA_DATA**2 / total**2 * x_sigma - s * SIGMA_DATA / total * F
    torch.testing.assert_close(consistency_function(F, x_theta, theta, SIGMA_DATA), edm, rtol=1e-12, atol=1e-12)


def test_difference_tends_to_the_continuous_tangent_at_first_order() -> None:
    """(f(x_t) − f(x_r))/(t − r) → df/dθ · dθ/dσ along the sample's own x0, ε, order 1.0 ± 0.1 in t − r: ECT's limit is sCT's tangent."""
    net = small_net().double()
    sigma = torch.tensor([0.05, 0.3, 1.0, 10.0], dtype=F64)
    theta = sigma_to_t(sigma, SIGMA_DATA)
    x0, z = SIGMA_DATA * randn(4, *SHAPE, seed=0), SIGMA_DATA * randn(4, *SHAPE, seed=1)
    cos = torch.cos(theta)[:, None, None, None]
    x_t = diffuse(x0, z, theta)
    _, g = scm_tangent(net, x_t, theta, velocity(x0, z, theta), SIGMA_DATA, normalize="none")
    limit = g / cos * cos**2 / SIGMA_DATA  # dθ/dσ = cos²θ/σ_d

    def f(sigma: Tensor) -> Tensor:
        angle = sigma_to_t(sigma, SIGMA_DATA)
        x = diffuse(x0, z, angle)
        return consistency_function(net(x / SIGMA_DATA, angle), x, angle, SIGMA_DATA)

    stages, errors = range(10, 16), []
    for stage in stages:
        gap = ect_gap(sigma, stage, 2.0, 8.0, 1.0)
        error = (f(sigma) - f(sigma - gap)) / gap[:, None, None, None] - limit
        errors.append(error.detach().flatten(1).norm(dim=1).numpy())
    slope = np.polyfit(-np.log(2.0) * np.array(stages), np.log(errors), 1)[0]
    np.testing.assert_allclose(slope, 1.0, atol=0.1)


def test_loss_is_its_formula_and_its_gradient_the_adaptive_weight() -> None:
    """(√(‖Δ‖² + c²) − c)/(t − r); the gradient in f_t is Δ/√(‖Δ‖² + c²)/(t − r), none in f_r."""
    f_t, f_r = randn(3, *SHAPE, seed=0).requires_grad_(), randn(3, *SHAPE, seed=1).requires_grad_()
    gap, c = torch.tensor([0.1, 1.0, 7.0], dtype=F64), 0.3
    loss = ect_loss(f_t, f_r, gap, c)
    norms = [float((f_t[i] - f_r[i]).detach().norm()) for i in range(3)]
    expected = sum((math.sqrt(n**2 + c**2) - c) / float(g) for n, g in zip(norms, gap, strict=True)) / 3
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    loss.backward()
    scale = 1 / (3 * gap * (torch.tensor(norms, dtype=F64) ** 2 + c**2).sqrt())
    torch.testing.assert_close(f_t.grad, scale[:, None, None, None] * (f_t - f_r).detach(), rtol=1e-10, atol=0)
    assert f_r.grad is None


def test_loss_keeps_small_distances_in_single_precision() -> None:
    """‖Δ‖ = 1e-4 beside c = 0.3: √(‖Δ‖² + c²) − c, taken as it stands, is 0 in float32; value and gradient are those of float64."""
    delta, gap = 1e-4 * torch.nn.functional.normalize(randn(1, 32, seed=0)), torch.ones(1, dtype=F64)
    results = []
    for dtype in (torch.float32, F64):
        f_t = delta.to(dtype).requires_grad_()
        loss = ect_loss(f_t, torch.zeros_like(f_t), gap.to(dtype), 0.3)
        results.append((loss.detach().double(), torch.autograd.grad(loss, f_t)[0].double()))
    (loss, grad), (exact, exact_grad) = results
    assert float(exact) == pytest.approx(1e-8 / 0.6, rel=1e-6)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-5, atol=1e-12)
    none = ect_loss(f_t, f_t.detach(), gap, 0.3)
    assert float(none.detach()) == 0
    assert torch.equal(torch.autograd.grad(none, f_t)[0], torch.zeros_like(f_t))


def test_the_last_stage_stays() -> None:
    """Beyond `stages` · d iterations t − r is that of the last stage, by default n(t) t/256: the loss is finite however long the run."""
    net, x0 = small_net(), SIGMA_DATA * randn(6, *SHAPE, seed=20).float()
    own = EctObjective(net, SIGMA_DATA, **OPTIONS)  # type: ignore[arg-type]
    gaps = {}
    for iteration in (60, 70, 80, 10_000):
        terms = own(Batch(x0, None, torch.arange(6)), torch.Generator().manual_seed(3), iteration)
        assert torch.isfinite(terms.loss.detach())
        gaps[iteration] = float(terms.scalars["gap"])
    assert gaps[70] == pytest.approx(gaps[60] / 2)
    assert gaps[80] == gaps[10_000] == gaps[70]
    sigma = torch.exp(-1.0 + 1.8 * torch.randn(6, generator=after_noise()))
    expected = ((1 + 8 * torch.sigmoid(-sigma)) / 256).mean()
    assert gaps[10_000] == pytest.approx(float(expected), rel=1e-5)


def after_noise() -> torch.Generator:
    """The generator of a step once z is drawn."""
    generator = torch.Generator().manual_seed(3)
    torch.randn(6, *SHAPE, generator=generator)
    return generator


@pytest.mark.parametrize(("iteration", "stage"), [(0, 1), (9, 1), (10, 2), (75, 8), (500, 8)])
def test_objective_is_its_formula(iteration: int, stage: int) -> None:
    """The objective rebuilt in EDM's variables: ln σ ~ N(P_mean, P_std²), a = ⌈i/d⌉ with i from 1, x_t and x_r of one x0 and ε."""
    net, labels = small_net(), torch.arange(6) % 3
    x0 = SIGMA_DATA * randn(6, *SHAPE, seed=20).float()
    own = EctObjective(net, SIGMA_DATA, **OPTIONS)  # type: ignore[arg-type]
    terms = own(Batch(x0, labels, torch.arange(6)), torch.Generator().manual_seed(3), iteration)
    generator = torch.Generator().manual_seed(3)
    eps = torch.randn(x0.shape, generator=generator)
    sigma = torch.exp(-1.0 + 1.8 * torch.randn(6, generator=generator))
    r = sigma * (1 - (1 + 8 * torch.sigmoid(-sigma)) / 2**stage).clamp(min=0)

    def denoise(sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        total = (s**2 + SIGMA_DATA**2).sqrt()
        x = x0 + s * eps
        F = net(x / total, torch.atan(sigma / SIGMA_DATA), labels)
        return SIGMA_DATA**2 / total**2 * x - s * SIGMA_DATA / total * F

    distance = (denoise(sigma) - denoise(r)).flatten(1).norm(dim=1)
    expected = (((distance**2 + 0.03**2).sqrt() - 0.03) / (sigma - r)).mean()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-3, atol=1e-5)


def test_r_of_zero_asks_for_the_data() -> None:
    """At the first stage small σ are regressed on x0 itself: r = 0, and f(x, 0) = x."""
    net, x0 = small_net(), SIGMA_DATA * randn(6, *SHAPE, seed=20).float()
    own = EctObjective(net, SIGMA_DATA, P_mean=-3.0, P_std=0.5, stage_iterations=10, c=0.03)
    terms = own(Batch(x0, None, torch.arange(6)), torch.Generator().manual_seed(3), 0)
    generator = torch.Generator().manual_seed(3)
    z = SIGMA_DATA * torch.randn(x0.shape, generator=generator)
    sigma = torch.exp(-3.0 + 0.5 * torch.randn(6, generator=generator))
    theta = sigma_to_t(sigma, SIGMA_DATA)
    x_t = diffuse(x0, z, theta)
    f_t = consistency_function(net(x_t / SIGMA_DATA, theta), x_t, theta, SIGMA_DATA)
    torch.testing.assert_close(terms.loss, ect_loss(f_t, x0, sigma, 0.03), rtol=1e-5, atol=1e-6)
    assert float(terms.scalars["gap"]) == 1


def test_one_dropout_mask_for_both_passes() -> None:
    """With dropout and t − r small the distance is small; it is not with two masks."""
    net, x0 = small_net(dropout=0.5).train(), SIGMA_DATA * randn(6, *SHAPE, seed=20).float()
    masks: list[Tensor] = []
    net.blocks[0].conv1.register_forward_pre_hook(lambda _, args: masks.append(args[0] == 0))
    own = EctObjective(net, SIGMA_DATA, **OPTIONS)  # type: ignore[arg-type]
    terms = own(Batch(x0, None, torch.arange(6)), torch.Generator().manual_seed(3), 120)
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])
    assert 0.3 < masks[0].float().mean() < 0.7
    assert float(terms.scalars["distance"]) < 0.05


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("P_std", 0.0), ("c", 0.0), ("b", -1.0), ("q", 1.0), ("k", -1.0), ("stage_iterations", 0), ("c", math.nan)],
        *[("P_mean", math.inf), ("q", math.inf), ("k", math.nan), ("stages", 0), ("stages", 24), ("stages", 1000)],
    ],
)
def test_bad_options(name: str, value: float) -> None:
    """ValueError with name and value."""
    with pytest.raises(ValueError, match=f"{name}: expected .*got {value}"):
        EctObjective(small_net(), SIGMA_DATA, **{**OPTIONS, name: value})  # type: ignore[arg-type]
