# SPDX-License-Identifier: Apache-2.0
"""The tangent of Algorithm 1 for arbitrary networks: its definition, warmup, normalisation, and the loss's gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from scm_core.engines import value_and_jvp
from scm_core.guidance import data_velocity, teacher_velocity
from scm_core.nn.embedding import LogVarHead
from scm_core.nn.small import SmallNet
from scm_core.objectives import Batch, adaptive_weighting, mean_square
from scm_core.objectives.consistency import ConsistencyObjective, scm_loss
from scm_core.objectives.diffusion import DiffusionObjective, diffusion_loss
from scm_core.tangent import normalize_tangent, scm_tangent, tangent
from scm_core.trigflow import diffuse, sample_times, velocity

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (2, 4, 4)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(guidance_input: bool = False, seed: int = 5, dropout: float = 0.0) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet(2, 4, labels=3, width=8, blocks=2, guidance_input=guidance_input, dropout=dropout)
    torch.nn.init.constant_(net.out_gain, 1.2)
    if guidance_input:
        torch.nn.init.constant_(net.guidance_gain, 0.7)
    return net.double()


def plain(net: SmallNet) -> Callable[[Tensor, Tensor], Tensor]:
    """The same function as a bare callable, without the network's own way to carry tangents."""
    return lambda x, t: net(x, t)


@pytest.fixture
def point() -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and dx_t/dt over the whole range of times."""
    t = torch.tensor([1e-3, 0.3, 0.8, 1.2, math.atan(160)], dtype=F64)
    x0, z = SIGMA_DATA * normal(5, *SHAPE, seed=0), SIGMA_DATA * normal(5, *SHAPE, seed=1)
    return diffuse(x0, z, t), t, velocity(x0, z, t)


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_tangent_is_algorithm_1(point: tuple[Tensor, Tensor, Tensor], warmup: float) -> None:
    """g = −cos²t (σ_d F − dx/dt) − r (cos t sin t x_t + σ_d cos t sin t dF/dt), dF/dt from an unscaled JVP."""
    net, (x_t, t, dxdt) = network(), point
    F, dFdt = torch.func.jvp(plain(net), (x_t / SIGMA_DATA, t), (dxdt / SIGMA_DATA, torch.ones_like(t)))
    cos, sin = torch.cos(t)[:, None, None, None], torch.sin(t)[:, None, None, None]
    expected = -(cos**2) * (SIGMA_DATA * F - dxdt) - warmup * cos * sin * (x_t + SIGMA_DATA * dFdt)
    F_minus, g = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, warmup=warmup, normalize="none")
    torch.testing.assert_close(F_minus, F, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-11)


def test_full_tangent_is_the_derivative_of_the_consistency_function(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """r = 1: g = cos(t) d/dh f(x_t + h dx/dt, t + h), f written out, by autograd."""
    net, (x_t, t, dxdt) = network(), point

    def f(h: Tensor) -> Tensor:
        s = (t + h)[:, None, None, None]
        x_s = x_t + h[:, None, None, None] * dxdt
        return torch.cos(s) * x_s - torch.sin(s) * SIGMA_DATA * net(x_s / SIGMA_DATA, t + h)

    _, dfdt = torch.func.jvp(f, (torch.zeros_like(t),), (torch.ones_like(t),))
    _, g = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, normalize="none")
    torch.testing.assert_close(g, torch.cos(t)[:, None, None, None] * dfdt, rtol=1e-9, atol=1e-10)


def test_no_warmup_leaves_the_difference_to_the_velocity(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """r = 0: g = −cos²(t) (σ_d F − dx/dt), the diffusion model's own residual."""
    net, (x_t, t, dxdt) = network(), point
    F, g = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, warmup=0.0, normalize="none")
    cos = torch.cos(t)[:, None, None, None]
    torch.testing.assert_close(g, -(cos**2) * (SIGMA_DATA * F - dxdt), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("normalize", ["none", "norm", "clip"])
def test_any_callable_gives_what_the_pairs_give(point: tuple[Tensor, Tensor, Tensor], normalize: str) -> None:
    """A bare callable goes through torch.func.jvp and gives the same F⁻ and g; so does a module without `supports_dual`."""
    net, (x_t, t, dxdt) = network(), point
    own = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, normalize=normalize)  # type: ignore[arg-type]
    other = scm_tangent(plain(net), x_t, t, dxdt, SIGMA_DATA, normalize=normalize)  # type: ignore[arg-type]
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
        assert a.dtype == b.dtype == F64


@pytest.mark.parametrize("pairs", [True, False])
def test_results_carry_no_graph(point: tuple[Tensor, Tensor, Tensor], pairs: bool) -> None:
    """F⁻ and g are constants of the regression, also when dx/dt comes from a teacher that tracks gradients; F keeps its graph."""
    net, (x_t, t, dxdt) = network(), point
    velocity_with_graph = dxdt.clone().requires_grad_()
    call = net if pairs else plain(net)
    F_minus, g = scm_tangent(call, x_t, t, velocity_with_graph, SIGMA_DATA)
    assert not F_minus.requires_grad
    assert not g.requires_grad
    result = tangent(call, x_t, t, velocity_with_graph, SIGMA_DATA)
    assert result.F.requires_grad
    assert not result.g.requires_grad
    assert not result.norm.requires_grad
    assert torch.equal(result.F, F_minus)


def test_normalisation() -> None:
    """g/(‖g‖ + c) over all elements of a sample, g clipped to [−1, 1], or g; the norm reported is the one before."""
    g = normal(4, *SHAPE, seed=0) * torch.tensor([1e-3, 0.1, 1.0, 1e4], dtype=F64)[:, None, None, None]
    norms = torch.stack([sample.square().sum().sqrt() for sample in g])
    for kind, expected in {
        "norm": torch.stack([sample / (norm + 0.1) for sample, norm in zip(g, norms, strict=True)]),
        "clip": g.clamp(-1, 1),
        "none": g,
    }.items():
        got, norm = normalize_tangent(g, kind, 0.1)  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(norm, norms, rtol=1e-13, atol=0)
    assert float(normalize_tangent(g, "norm", 0.1)[0][3].norm()) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="normalize: expected 'norm', 'clip' or 'none', got 'l2'"):
        normalize_tangent(g, "l2", 0.1)  # type: ignore[arg-type]


def test_normalisation_reaches_the_tangent(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """`scm_tangent` applies the normalisation and c it is asked for, by default 'norm' with c = 0.1."""
    net, (x_t, t, dxdt) = network(), point
    _, raw = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, normalize="none")
    _, default = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA)
    _, loose = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, c=3.0)
    norm = raw.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(default, raw / (norm + 0.1), rtol=1e-12, atol=0)
    torch.testing.assert_close(loose, raw / (norm + 3.0), rtol=1e-12, atol=0)
    _, clipped = scm_tangent(net, 100 * x_t, t, dxdt, SIGMA_DATA, normalize="clip")
    assert clipped.abs().max() == 1


def test_derivative_is_linear_in_the_direction(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """J(a d) = a J(d): the factor cos t sin t may be moved into the direction (§5.1)."""
    net, (x_t, t, dxdt) = network(), point
    _, J = value_and_jvp(net, x_t, t, dxdt, torch.ones_like(t))
    a = (torch.cos(t) * torch.sin(t))[:, None, None, None]
    _, scaled = value_and_jvp(net, x_t, t, a * dxdt, a.flatten())
    torch.testing.assert_close(scaled, a * J, rtol=1e-11, atol=1e-12)


def test_single_precision_is_finite_at_both_ends() -> None:
    """In float32, t = 0 and t = π/2 included, the rearranged tangent neither overflows nor divides by zero (§5.1)."""
    net = network().float()
    t = torch.tensor([0.0, 1e-4, math.atan(160), math.pi / 2])
    x_t, dxdt = (0.5 * normal(4, *SHAPE, seed=seed).float() for seed in (0, 1))
    for normalize in ("none", "norm"):
        F, g = scm_tangent(net, x_t, t, dxdt, SIGMA_DATA, normalize=normalize)  # type: ignore[arg-type]
        assert torch.isfinite(F).all()
        assert torch.isfinite(g).all()


# --- the losses ----------------------------------------------------------------------------------------------------------------------


def test_loss_gradient_moves_the_output_along_g(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """∇_θ (e^w/D ‖F − F⁻ − g‖² − w) = −2 e^w/D g·∂F/∂θ, averaged over the batch; for w itself it is e^w/D ‖g‖² − 1 (§4.2)."""
    net, (x_t, t, dxdt) = network(), point
    parameters = list(net.parameters())
    logvar = normal(5, seed=9).requires_grad_()
    F, g, _ = tangent(net, x_t, t, dxdt, SIGMA_DATA)
    *got, got_logvar = torch.autograd.grad(scm_loss(F, F.detach(), g, logvar), [*parameters, logvar])
    D, weight = g[0].numel(), logvar.detach().exp()[:, None, None, None]
    again = net(x_t / SIGMA_DATA, t)
    expected = torch.autograd.grad(again, parameters, grad_outputs=-2 * weight / D * g / len(t), allow_unused=True)
    for p, a, b in zip(parameters, got, expected, strict=True):
        torch.testing.assert_close(a, b if b is not None else torch.zeros_like(p), rtol=1e-10, atol=1e-14)
    error = g.square().flatten(1).sum(1) / D
    torch.testing.assert_close(got_logvar, (logvar.detach().exp() * error - 1) / len(t), rtol=1e-12, atol=0)


def test_loss_value_and_its_optimal_weight() -> None:
    """At F = F⁻ the loss is e^w ‖g‖²/D − w; its minimum over w is at e^{−w} = ‖g‖²/D."""
    F, g = normal(3, *SHAPE, seed=0), normal(3, *SHAPE, seed=1)
    error = g.square().flatten(1).mean(1)
    best = -error.log()
    torch.testing.assert_close(scm_loss(F, F, g, best), (1 - best).mean(), rtol=1e-12, atol=0)
    for other in (best + 0.1, best - 0.1):
        assert scm_loss(F, F, g, other) > scm_loss(F, F, g, best)


def test_mean_square_sums_in_single_precision_at_least() -> None:
    """Half-precision outputs are squared and summed in float32, float64 stays."""
    x = torch.full((1, 1000), 300.0, dtype=torch.float16)
    assert mean_square(x).dtype == torch.float32
    assert float(mean_square(x)) == 90_000  # beyond half precision's 65,504
    assert mean_square(x.double()).dtype == F64
    assert float(adaptive_weighting(torch.tensor([2.0, 4.0]), torch.zeros(2))) == 3


def test_diffusion_loss_is_its_formula(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """e^w/D ‖σ_d F − v_t‖² − w, averaged; zero error for the exact velocity (§3)."""
    _, _, v_t = point
    F, w = normal(5, *SHAPE, seed=3), normal(5, seed=4)
    expected = torch.stack(
        [w[i].exp() * (SIGMA_DATA * F[i] - v_t[i]).square().sum() / v_t[i].numel() - w[i] for i in range(5)]
    )
    torch.testing.assert_close(diffusion_loss(F, v_t, w, SIGMA_DATA).loss, expected.mean(), rtol=1e-12, atol=0)
    assert float(diffusion_loss(v_t / SIGMA_DATA, v_t, torch.zeros(5), SIGMA_DATA).loss) == pytest.approx(0, abs=1e-15)


# --- the objectives ------------------------------------------------------------------------------------------------------------------


def batch_of(count: int) -> Batch:
    x0 = SIGMA_DATA * normal(count, *SHAPE, seed=20).float()
    return Batch(x0, torch.arange(count) % 3, torch.arange(count))


@pytest.mark.parametrize("method", ["sct", "scd", "scd guided"])
@pytest.mark.parametrize("iteration", [0, 5, 50])
def test_consistency_objective_is_algorithm_1(method: str, iteration: int) -> None:
    """The objective draws z, t (and s), follows v_t or the teacher, warms up over H iterations: rebuilt from the pieces."""
    net, teacher = network(method == "scd guided").float(), network(seed=8).float()
    head, batch, H = LogVarHead(bias=2.0), batch_of(6), 10
    fn = data_velocity if method == "sct" else teacher_velocity(teacher, SIGMA_DATA)
    scales = (1.0, 2.0) if method == "scd guided" else None
    objective = ConsistencyObjective(net, head, fn, SIGMA_DATA, -1.0, 1.4, H, guidance=scales)
    terms = objective(batch, torch.Generator().manual_seed(3), iteration)

    generator = torch.Generator().manual_seed(3)
    z = SIGMA_DATA * torch.randn(batch.x0.shape, generator=generator)
    t = sample_times(6, -1.0, 1.4, SIGMA_DATA, generator)
    s = 1 + torch.rand(6, generator=generator) if scales else None
    x_t, labels = diffuse(batch.x0, z, t), batch.labels
    assert labels is not None
    with torch.no_grad():
        if method == "sct":
            dxdt = velocity(batch.x0, z, t)
        else:
            cond = teacher(x_t / SIGMA_DATA, t, labels)
            uncond = teacher(x_t / SIGMA_DATA, t, None)
            factor = 1.0 if s is None else s[:, None, None, None]
            dxdt = SIGMA_DATA * (uncond + factor * (cond - uncond))
    F, g = scm_tangent(lambda x, t: net(x, t, labels, s), x_t, t, dxdt, SIGMA_DATA, warmup=min(1, iteration / H))
    torch.testing.assert_close(terms.loss, scm_loss(F, F, g, head(t)), rtol=1e-4, atol=1e-5)
    assert terms.loss.requires_grad
    assert not any(scalar.requires_grad for scalar in terms.scalars.values())


def test_only_the_student_and_its_weighting_get_gradients() -> None:
    """Nothing but F_θ and w_φ receives gradients: not the teacher, even when its parameters ask for them."""
    net, teacher, head = network(True).float(), network(seed=8).float(), LogVarHead(bias=2.0)
    velocity_fn = teacher_velocity(teacher, SIGMA_DATA)
    objective = ConsistencyObjective(net, head, velocity_fn, SIGMA_DATA, -1.0, 1.4, 0, guidance=(1.0, 2.0))
    objective(batch_of(6), torch.Generator().manual_seed(3), 1).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in [*net.parameters(), head.weight, head.bias])


def test_label_dropout_of_the_teacher() -> None:
    """A fraction of the labels becomes −1, and the batch's own labels stay untouched."""
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels)
            return x

    batch = Batch(torch.zeros(4000, 1, 1, 1), torch.ones(4000, dtype=torch.long), torch.arange(4000))
    DiffusionObjective(Spy(), LogVarHead(0.0), SIGMA_DATA, -0.4, 1.2, label_dropout=0.1)(
        batch, torch.Generator().manual_seed(0), 0
    )
    dropped = float((seen[0] == -1).float().mean())
    assert dropped == pytest.approx(0.1, abs=0.02)
    assert set(seen[0].tolist()) == {-1, 1}
    assert batch.labels is not None
    assert (batch.labels == 1).all()
