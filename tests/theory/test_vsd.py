# SPDX-License-Identifier: Apache-2.0
"""Variational score distillation on Gaussians, where generator, teacher, F_φ and the divergence are known in closed form."""

import math

import pytest
import torch
from torch import Tensor, nn

from scm_core.nn.build import build_network
from scm_core.nn.embedding import LogVarHead
from scm_core.nn.small import SmallNet
from scm_core.objectives import Batch
from scm_core.objectives.diffusion import diffusion_loss
from scm_core.objectives.methods import METHODS
from scm_core.objectives.vsd import FakeObjective, OneStepSampler, VsdObjective, fake_network, generate, vsd_loss
from scm_core.train.loop import train
from scm_core.train.schedule import Schedule
from scm_core.train.state import TrainSettings, TrainState
from scm_core.trigflow import consistency_function, diffuse, sample_times, t_max, velocity

SIGMA_DATA = 0.5
F64 = torch.float64
SHAPE = (1, 1, 2)
D = 2
START = t_max(SIGMA_DATA)


def gaussian_F(x: Tensor, t: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """(cos t E[z | x_t] − sin t E[x0 | x_t])/σ_d for data N(mean, cov), of x = x_t/σ_d (B, 1, 1, D)."""
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    S = cos[..., None] ** 2 * cov + sin[..., None] ** 2 * SIGMA_DATA**2 * torch.eye(D, dtype=x.dtype)
    residual = torch.linalg.solve(S, SIGMA_DATA * x.flatten(1) - cos * mean)
    x0, z = mean + cos * (residual @ cov), sin * SIGMA_DATA**2 * residual
    return ((cos * z - sin * x0) / SIGMA_DATA).reshape(x.shape)


class GaussianModel(nn.Module):
    """The optimal diffusion model of N(mean, root rootᵀ); trained by the diffusion loss, it fits mean and covariance."""

    def __init__(self, mean: list[float], root: list[list[float]], dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=dtype))
        self.root = nn.Parameter(torch.tensor(root, dtype=dtype))

    def cov(self) -> Tensor:
        return self.root @ self.root.T

    def forward(self, x: Tensor, t: Tensor, labels: object = None, guidance: object = None) -> Tensor:
        return gaussian_F(x, t, self.mean, self.cov())


class AffineGenerator(nn.Module):
    """F with f(x, t) = A x + b at every t, so that g(z') = sin(t_max) A z' + b."""

    def __init__(self, A: list[list[float]], b: list[float], dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.A, self.b = nn.Parameter(torch.tensor(A, dtype=dtype)), nn.Parameter(torch.tensor(b, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor, labels: object = None, guidance: object = None) -> Tensor:
        x_t, tb = SIGMA_DATA * x, t[:, None, None, None]
        return (torch.cos(tb) * x_t - (x_t @ self.A.T + self.b)) / (SIGMA_DATA * torch.sin(tb))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the samples."""
        return self.b, (SIGMA_DATA * math.sin(START)) ** 2 * self.A @ self.A.T


class ModelOf(nn.Module):
    """The optimal F_φ at every moment: the diffusion model of what the generator now makes."""

    def __init__(self, generator: AffineGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor, t: Tensor, labels: object = None, guidance: object = None) -> Tensor:
        return gaussian_F(x, t, *self.generator.moments())


def teacher(dtype: torch.dtype = F64) -> GaussianModel:
    return GaussianModel([0.3, -0.6], [[0.6, 0.0], [0.35, 0.25]], dtype).requires_grad_(False)


def wrong_generator(dtype: torch.dtype = F64) -> AffineGenerator:
    return AffineGenerator([[0.3, 0.5], [-0.4, 1.2]], [-0.5, 0.4], dtype)


def divergence(q: tuple[Tensor, Tensor], p: tuple[Tensor, Tensor], t: float) -> Tensor:
    """KL(q_t ‖ p_t) of the Gaussians of mean and covariance q and p, diffused to t."""
    eye = math.sin(t) ** 2 * SIGMA_DATA**2 * torch.eye(D, dtype=F64)
    Q, P = (math.cos(t) ** 2 * cov + eye for _, cov in (q, p))
    shift = math.cos(t) * (p[0] - q[0])
    trace = torch.trace(torch.linalg.solve(P, Q)) + shift @ torch.linalg.solve(P, shift) - D
    return (trace + torch.logdet(P) - torch.logdet(Q)) / 2


def test_the_model_is_the_score() -> None:
    """The oracle: −(cos t σ_d F + sin t x_t)/(σ_d² sin t) is the gradient of the density's logarithm, by autograd."""
    model, t = teacher(), torch.tensor([0.1, 0.7, 1.4], dtype=F64)
    x_t = torch.randn(3, *SHAPE, dtype=F64).requires_grad_()
    tb = t[:, None, None, None]
    S = tb.squeeze(1).cos() ** 2 * model.cov() + tb.squeeze(1).sin() ** 2 * SIGMA_DATA**2 * torch.eye(D, dtype=F64)
    law = torch.distributions.MultivariateNormal(t.cos()[:, None] * model.mean, S)
    (score,) = torch.autograd.grad(law.log_prob(x_t.flatten(1)).sum(), x_t)
    F = model(x_t / SIGMA_DATA, t)
    expected = -(tb.cos() * SIGMA_DATA * F + tb.sin() * x_t) / (SIGMA_DATA**2 * tb.sin())
    torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [0.01, 0.3, 1.0, 1.4, START])
def test_gradient_is_that_of_the_divergence(t: float) -> None:
    """∇_θ L_VSD = 2 e^w/D · σ_d sin t/cos² t · ∇_θ KL(q_t ‖ p_t), exactly.

    The integrand is quadratic in the Gaussians (z', z): the 4D points ±√(2D) e_i, equally weighted, integrate it without error.
    """
    net, p, w = wrong_generator(), teacher(), 0.7
    points = torch.cat([torch.eye(2 * D, dtype=F64), -torch.eye(2 * D, dtype=F64)]) * math.sqrt(2 * D) * SIGMA_DATA
    start, z = (part.reshape(-1, *SHAPE) for part in points.split(D, dim=1))
    tb = torch.full((4 * D,), t, dtype=F64)
    x0 = generate(net, start, SIGMA_DATA)
    x = diffuse(x0, z, tb) / SIGMA_DATA  # with its graph: the loss must cut it
    loss = vsd_loss(x0, p(x, tb), ModelOf(net)(x, tb), torch.full((4 * D,), w, dtype=F64))
    got = torch.autograd.grad(loss, [net.A, net.b])
    divergence_t = divergence(net.moments(), (p.mean, p.cov()), t)
    expected = torch.autograd.grad(divergence_t, [net.A, net.b])
    factor = 2 * math.exp(w) / D * SIGMA_DATA * math.sin(t) / math.cos(t) ** 2
    for a, b in zip(got, expected, strict=True):
        assert a.abs().max() > 1e-5
        torch.testing.assert_close(a, factor * b, rtol=1e-6, atol=1e-11)


def test_one_step_of_descent_lowers_the_divergence() -> None:
    """The sign, seen from outside: a small step against the gradient lowers KL(q_t ‖ p_t) at every t; a step along it raises it."""
    p = teacher()
    for t in (0.2, 0.8, 1.3):
        values = []
        for direction in (-1, 0, 1):
            torch.manual_seed(1)
            net = wrong_generator()
            tb = torch.full((4096,), t, dtype=F64)
            x0 = generate(net, SIGMA_DATA * torch.randn(4096, *SHAPE, dtype=F64), SIGMA_DATA)
            x = diffuse(x0, SIGMA_DATA * torch.randn(4096, *SHAPE, dtype=F64), tb) / SIGMA_DATA
            vsd_loss(x0, p(x, tb), ModelOf(net)(x, tb), None).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    assert parameter.grad is not None
                    parameter += direction * 1e-3 * parameter.grad / parameter.grad.norm()
            values.append(float(divergence(net.moments(), (p.mean, p.cov()), t).detach()))
        assert values[0] < values[1] < values[2]


def test_generator_is_the_one_step_sampler() -> None:
    """g_θ(z) = f_θ(sin(t_max) z, t_max) = sin(t_max) A z + b here, with a graph to the parameters."""
    net, z = wrong_generator(), SIGMA_DATA * torch.randn(5, *SHAPE, dtype=F64)
    x0 = generate(net, z, SIGMA_DATA)
    torch.testing.assert_close(x0, math.sin(START) * z @ net.A.T + net.b, rtol=1e-12, atol=1e-12)
    assert x0.requires_grad


@pytest.mark.parametrize("weighted", [False, True])
def test_a_wrong_generator_recovers_mean_and_covariance(weighted: bool) -> None:
    """With the optimal F_φ at every step, Adam on L_VSD brings mean and covariance to the data's, with and without e^{w(t)}."""
    net, p = wrong_generator(torch.float32), teacher(torch.float32)
    head = LogVarHead(bias=0.0) if weighted else None
    make = OneStepSampler(net, SIGMA_DATA, None)
    objective = VsdObjective(make, p, ModelOf(net), head, 0.4, 2.0, fake_guidance=False)
    parameters = [*net.parameters(), *(head.parameters() if head else ())]
    optimizer = torch.optim.Adam(parameters, lr=2e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 300)
    batch, generator = Batch(torch.zeros(128, *SHAPE), None, torch.arange(128)), torch.Generator().manual_seed(0)
    for i in range(300):
        optimizer.zero_grad()
        objective(batch, generator, i).loss.backward()
        optimizer.step()
        schedule.step()
    mean, cov = net.moments()
    torch.testing.assert_close(mean.detach(), p.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(cov.detach(), p.cov(), rtol=0, atol=0.01)


@pytest.mark.slow
def test_generator_and_fake_trained_together_recover_mean_and_covariance() -> None:
    """The whole method: F_φ, a copy of the teacher's Gaussian, follows the samples by its own loss, one step to one of the generator's.

    F_φ is eight times as fast: at equal rates, with momentum, the two circle around the solution for long (off by 0.1 after 1000 steps).
    """
    torch.manual_seed(0)
    net, p = wrong_generator(torch.float32), teacher(torch.float32)
    method = METHODS["vsd"](net, p, SIGMA_DATA, SHAPE)
    fake = method.companions["fake"]
    schedule = Schedule("linear", start=0.3, final=0.02)

    def settings(seed: int, lr: float) -> TrainSettings:
        return TrainSettings(iterations=500, batch=128, lr=lr, seed=seed, schedule=schedule, head_lr=1e-2)

    state = TrainState(
        net, settings(0, 5e-3), method.heads, {"fake": TrainState(fake.net, settings(1, 4e-2), fake.heads)}
    )
    batch = Batch(torch.zeros(128, *SHAPE), None, torch.arange(128))
    train(state, method.objective, lambda i: batch, companions={"fake": fake.objective})
    mean, cov = (moment.detach() for moment in net.moments())
    torch.testing.assert_close(mean, p.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(cov, p.cov(), rtol=0, atol=0.05)
    assert isinstance(fake.net, GaussianModel)
    torch.testing.assert_close(fake.net.cov().detach(), cov, rtol=0, atol=0.05)


# --- the objectives and F_φ ----------------------------------------------------------------------------------------------------------


def small_net(guidance_input: bool, seed: int, dropout: float = 0.0, labels: int = 3) -> SmallNet:
    torch.manual_seed(seed)
    net = SmallNet(2, 4, labels=labels, width=8, blocks=2, guidance_input=guidance_input, dropout=dropout)
    for name, parameter in net.named_parameters():
        if "gain" in name:
            torch.nn.init.constant_(parameter, 0.9)
    return net


def images() -> Batch:
    return Batch(torch.zeros(6, 2, 4, 4), torch.arange(6) % 3, torch.arange(6))


def pieces(net: SmallNet, scales: bool, P_mean: float, P_std: float) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x0, s, z, t as both objectives draw them."""
    generator = torch.Generator().manual_seed(3)
    start = SIGMA_DATA * torch.randn(6, 2, 4, 4, generator=generator)
    s = 1 + torch.rand(6, generator=generator) if scales else None
    top = torch.full((6,), START)
    x = math.sin(START) * start
    x0 = consistency_function(net(x / SIGMA_DATA, top, images().labels, s), x, top, SIGMA_DATA)
    z = SIGMA_DATA * torch.randn(6, 2, 4, 4, generator=generator)
    return x0, s, z, sample_times(6, P_mean, P_std, SIGMA_DATA, generator)


@pytest.mark.parametrize("scales", [None, (1.0, 2.0)])
@pytest.mark.parametrize("fake_guidance", [True, False])
def test_objectives_are_their_formulas(scales: tuple[float, float] | None, fake_guidance: bool) -> None:
    """Both losses rebuilt: e^w/D ‖x0 − sg(x0) + F_teacher − F_φ‖² − w with the guided teacher, and F_φ's diffusion loss on x0."""
    net, own, labels = small_net(scales is not None, 5), small_net(False, 8).eval(), images().labels
    told = scales is not None and fake_guidance
    fake = small_net(told, 9)
    head, fake_head = LogVarHead(1.3), LogVarHead(0.4)
    make = OneStepSampler(net, SIGMA_DATA, scales)
    terms = VsdObjective(make, own, fake, head, 0.4, 2.0, told)(images(), torch.Generator().manual_seed(3), 0)
    x0, s, z, t = pieces(net, scales is not None, 0.4, 2.0)
    with torch.no_grad():
        x = diffuse(x0, z, t) / SIGMA_DATA
        cond, uncond = own(x, t, labels), own(x, t, None)
        F_teacher = cond if s is None else uncond + s[:, None, None, None] * (cond - uncond)
        difference = F_teacher - fake(x, t, labels, s if told else None)
    error = difference.square().flatten(1).mean(1)
    torch.testing.assert_close(terms.loss, (head(t).exp() * error - head(t)).mean(), rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(terms.loss, list(net.parameters()), allow_unused=True)
    weight = 2 * head(t).exp().detach()[:, None, None, None] / (difference[0].numel() * len(t))
    expected = torch.autograd.grad(x0, list(net.parameters()), weight * difference, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

    terms = FakeObjective(make, fake, fake_head, -0.8, 1.6, told)(images(), torch.Generator().manual_seed(3), 0)
    x0, s, z, t = pieces(net, scales is not None, -0.8, 1.6)
    F = fake(diffuse(x0, z, t) / SIGMA_DATA, t, labels, s if told else None)
    reference = diffusion_loss(F, velocity(x0, z, t), fake_head(t), SIGMA_DATA).loss
    torch.testing.assert_close(terms.loss, reference, rtol=1e-5, atol=1e-6)


def test_the_generator_waits_for_the_fake_network() -> None:
    """In the first `vsd_delay` iterations the loss and its weighting are those of the others, and the generator's gradient is zero."""
    net, own = small_net(True, 5), small_net(False, 8).eval()
    make, fake, head = OneStepSampler(net, SIGMA_DATA, (1.0, 2.0)), small_net(True, 9), LogVarHead(0.5)
    objective = VsdObjective(make, own, fake, head, 0.4, 2.0, True, delay=3)
    found = []
    for iteration in (2, 3):
        terms = objective(images(), torch.Generator().manual_seed(3), iteration)
        gradients = torch.autograd.grad(terms.loss, [head.bias, *net.parameters()], allow_unused=True)
        found.append((float(terms.loss.detach()), float(gradients[0]), [g for g in gradients[1:] if g is not None]))
    (early, early_head, waiting), (late, late_head, moving) = found
    assert (early, early_head) == (late, late_head)
    assert len(waiting) == len(moving) > 0
    assert not any(g.any() for g in waiting)
    assert all(g.any() for g in moving)
    with pytest.raises(ValueError, match="vsd_delay"):
        VsdObjective(make, own, fake, head, 0.4, 2.0, True, delay=-1)


def test_sum_of_scd_and_vsd() -> None:
    """L_sCD + λ L_VSD, the parts drawing one after the other from the step's generator."""
    losses = {}
    for weight in (0.5, 1.0, 2.0):
        net, own = small_net(True, 5), small_net(False, 8).eval()
        options = {"P_mean": -1.0, "P_std": 1.4, "warmup": 0, "guidance": (1.0, 2.0), "vsd_weight": weight}
        method = METHODS["scd_vsd"](net, own, SIGMA_DATA, (2, 4, 4), **options)
        losses[weight] = float(method.objective(images(), torch.Generator().manual_seed(3), 0).loss.detach())
    generator = torch.Generator().manual_seed(3)
    scd = METHODS["scd"](net, own, SIGMA_DATA, (2, 4, 4), P_mean=-1.0, P_std=1.4, warmup=0, guidance=(1.0, 2.0))
    first = float(scd.objective(images(), generator, 0).loss.detach())
    vsd = METHODS["vsd"](net, own, SIGMA_DATA, (2, 4, 4), guidance=(1.0, 2.0))
    second = float(vsd.objective(images(), generator, 0).loss.detach())
    assert second != 0
    for weight, loss in losses.items():
        assert loss == pytest.approx(first + weight * second, rel=1e-5)
    assert set(method.heads) == {"logvar", "vsd_logvar"}


TINY_UNET = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention_resolutions": (4,)}
ARCHITECTURES = {
    "small": {"width": 8, "blocks": 2},
    "ddpmpp": TINY_UNET,
    "edm2": {**TINY_UNET, "head_channels": 4},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fake_starts_as_the_teacher(architecture: str) -> None:
    """F_φ with a guidance input is the teacher's function at every scale, also beside a student that has left the teacher; it can learn
    from the scale, and shares nothing with either."""
    config = {"architecture": architecture, "channels": 2, "resolution": 8, "labels": 3, **ARCHITECTURES[architecture]}
    torch.manual_seed(0)
    student, own = build_network({**config, "guidance_input": True}), build_network(config).requires_grad_(False)
    with torch.no_grad():
        for parameter in [*student.parameters(), *own.parameters()]:
            parameter += 0.3 * torch.randn_like(parameter)
    x, t, labels, s = torch.randn(6, 2, 8, 8), torch.linspace(0.1, 1.5, 6), torch.arange(6) % 3, torch.linspace(1, 2, 6)
    told, plain = fake_network(student, own, True), fake_network(student, own, False)
    expected = own(x, t, labels)
    assert (student(x, t, labels, s) - student(x, t, labels, 2 * s)).abs().max() > 1e-3
    torch.testing.assert_close(told(x, t, labels, s), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain(x, t, labels), expected, rtol=0, atol=0)
    for fake in (told, plain):
        assert all(parameter.requires_grad for parameter in fake.parameters())
        shared = {p.data_ptr() for p in [*student.parameters(), *own.parameters()]}
        assert not any(p.data_ptr() in shared for p in fake.parameters())
    told(x, t, labels, s).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for name, p in told.named_parameters() if "guidance" in name)
    assert not any(p.requires_grad for p in own.parameters())


def test_fake_is_trained_with_dropout_and_asked_without() -> None:
    """F_φ drops activations in its own step only; the generator's loss sees it, and the teacher, without; modes are put back."""
    net, own = small_net(False, 5), small_net(False, 8, dropout=0.5).eval()
    method = METHODS["vsd"](net, own, SIGMA_DATA, (2, 4, 4))
    fake = method.companions["fake"]
    fake.net.train()
    seen: list[bool] = []
    fake.net.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(float(method.objective(images(), torch.Generator().manual_seed(3), 0).loss.detach()))
    assert losses[0] == losses[1]
    assert fake.net.training
    assert all(module.training for module in fake.net.modules())
    assert not own.training
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(float(fake.objective(images(), torch.Generator().manual_seed(3), 0).loss.detach()))
    assert losses[2] != losses[3]
    assert seen == [False, False, True, True]


def test_bad_options() -> None:
    """No teacher, scales without labels, in the wrong order, F_φ with a guidance input that the student lacks, weights of 0."""
    net, own = small_net(False, 5), small_net(False, 8).eval()
    shape = (2, 4, 4)
    with pytest.raises(ValueError, match="teacher: this method distils a teacher, got None"):
        METHODS["vsd"](net, None, SIGMA_DATA, shape)
    with pytest.raises(ValueError, match=r"guidance: expected None, .* without a guidance input, got \(1.0, 2.0\)"):
        METHODS["vsd"](net, own, SIGMA_DATA, shape, guidance=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"fake_guidance: .* no guidance input of its own"):
        fake_network(net, own, True)
    wider = SmallNet(2, 4, labels=3, width=16, blocks=2, guidance_input=True)
    with pytest.raises(ValueError, match=r"fake_guidance: .*weight has shape \(32, 16\), the teacher's \(16, 8\)"):
        fake_network(wider, own, True)
    for name in ("vsd_P_mean", "fake_P_mean"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number, got nan"):
            METHODS["vsd"](net, own, SIGMA_DATA, shape, **{name: math.nan})
    with pytest.raises(ValueError, match="sigma_data: expected a positive number, got 0"):
        OneStepSampler(net, 0.0, None)
    with pytest.raises(ValueError, match=r"fake_guidance: .*blocks\.1"):
        fake_network(SmallNet(2, 4, labels=3, width=8, blocks=1, guidance_input=True), own, True)
    with pytest.raises(ValueError, match="guidance: expected finite scales"):
        METHODS["vsd"](small_net(True, 5), own, SIGMA_DATA, shape, guidance=(2.0, 1.0))
    for name in ("vsd_P_std", "fake_P_std"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
            METHODS["vsd"](net, own, SIGMA_DATA, shape, **{name: 0.0})
    with pytest.raises(ValueError, match="vsd_weight: expected a positive number, got -1"):
        METHODS["scd_vsd"](net, own, SIGMA_DATA, shape, vsd_weight=-1, P_mean=-1.0, P_std=1.4, warmup=0)
    method = METHODS["vsd"](small_net(True, 5), own, SIGMA_DATA, shape, guidance=(1.0, 2.0))
    unlabelled = Batch(torch.zeros(6, *shape), None, torch.arange(6))
    for objective in (method.objective, method.companions["fake"].objective):
        with pytest.raises(ValueError, match="guidance: classifier-free guidance needs labels, got labels=None"):
            objective(unlabelled, torch.Generator().manual_seed(0), 0)
