# SPDX-License-Identifier: Apache-2.0
"""What variational score distillation of a guided teacher leads to, and why F_φ must know the scale, on Gaussians in closed form.

Classes of variance v_c within data of variance v_u, both in units of σ_d², means at 0. The guided score at t is that of a Gaussian of the
precision s/(cos² t v_c + sin² t) − (s − 1)/(cos² t v_u + sin² t), which is no diffused Gaussian's: the variance that VSD asks of the
samples depends on t. It is the harmonic extrapolation from v_u past v_c where t → 0, and the arithmetic one, v_c − (s − 1)(v_u − v_c),
where t → π/2. The guided PF-ODE, which sCD follows, gives the geometric one, v_c (v_c/v_u)^{s − 1}.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from scm_core.objectives import Batch
from scm_core.objectives.vsd import OneStepSampler, VsdObjective
from scm_core.sampling import Guided, sample_diffusion
from scm_core.trigflow import t_max

SIGMA_DATA = 0.5
SHAPE = (1, 2, 2)
F64 = torch.float64
START = math.sin(t_max(SIGMA_DATA))


def gaussian_F(x: Tensor, t: Tensor, mean: Tensor | float, v: Tensor | float) -> Tensor:
    """The optimal F for N(mean, v σ_d²) in each element, of x = x_t/σ_d; mean in units of σ_d."""
    cos, sin = (function(t)[:, None, None, None] for function in (torch.cos, torch.sin))
    residual = (x - cos * mean) / (cos**2 * v + sin**2)
    return cos * sin * residual - sin * (mean + cos * v * residual)


class Classes(nn.Module):
    """A teacher of data of variance v_u, each class of which has v_c."""

    def __init__(self, v_c: float, v_u: float) -> None:
        super().__init__()
        self.v_c, self.v_u = v_c, v_u

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        v = torch.where(labels < 0, self.v_u, self.v_c).to(x.dtype)[:, None, None, None]
        return gaussian_F(x, t, 0.0, v)


class Generator(nn.Module):
    """f(x, t) = √v x + spread · quantile(s) σ_d at every t: samples of the variance v about a mean that hangs on s."""

    guidance_input = True

    def __init__(self, v: float, spread: float = 0.0, low: float = 1.0, high: float = 2.0) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.tensor(math.sqrt(v), dtype=F64))
        self.spread, self.low, self.high = spread, low, high

    def mean(self, s: Tensor) -> Tensor:
        """Over s ~ U[low, high] a Gaussian of standard deviation `spread`, in units of σ_d; of shape (B, 1, 1, 1)."""
        place = ((s - self.low) / (self.high - self.low)).clamp(1e-9, 1 - 1e-9)
        return (self.spread * torch.special.ndtri(place))[:, None, None, None]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        cos, sin = torch.cos(t)[:, None, None, None], torch.sin(t)[:, None, None, None]
        wanted = self.root * x + self.mean(guidance)
        return (cos * x - wanted) / sin


class ModelOf(nn.Module):
    """The optimal F_φ of what the generator now makes, given s, or, told none, of the mixture over s."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | None) -> Tensor:
        v = self.generator.root.detach() ** 2 * START**2
        if guidance is None:
            return gaussian_F(x, t, 0.0, v + self.generator.spread**2)
        return gaussian_F(x, t, self.generator.mean(guidance), v)


def batch(count: int) -> Batch:
    return Batch(torch.zeros(count, *SHAPE, dtype=F64), torch.zeros(count, dtype=torch.int64), torch.arange(count))


def objective(
    net: Generator, teacher: nn.Module, s: tuple[float, float], P: tuple[float, float], told: bool = True
) -> VsdObjective:
    make = OneStepSampler(net, SIGMA_DATA, s)
    return VsdObjective(make, teacher, ModelOf(net), None, *P, fake_guidance=told)


def push(net: Generator, loss: VsdObjective, count: int = 20_000) -> float:
    """dL/d√v, whose sign says where descent takes the variance: < 0 up, > 0 down."""
    terms = loss(batch(count), torch.Generator().manual_seed(0), 0)
    (gradient,) = torch.autograd.grad(terms.loss, [net.root])
    return float(gradient)


def solution(v_c: float, v_u: float, s: float, P: tuple[float, float]) -> float:
    """The variance at which VSD comes to rest, by bisection; 0 where it falls for ever."""
    low, high = 1e-4, 1.0
    for _ in range(30):
        v = (low + high) / 2
        net = Generator(v)
        low, high = (v, high) if push(net, objective(net, Classes(v_c, v_u), (s, s), P), 4000) < 0 else (low, v)
    return high


def extrapolations(v_c: float, v_u: float, s: float) -> tuple[float, float, float]:
    """Arithmetic, geometric, harmonic: of v_u (s = 0) and v_c (s = 1)."""
    return v_c - (s - 1) * (v_u - v_c), v_c * (v_c / v_u) ** (s - 1), 1 / (s / v_c - (s - 1) / v_u)


@pytest.mark.parametrize(("v_c", "v_u", "s"), [(0.6, 0.9, 1.6), (0.4, 0.9, 1.3), (0.5, 0.5, 2.0), (0.4, 0.9, 1.0)])
def test_guided_vsd_asks_for_another_variance_at_each_time(v_c: float, v_u: float, s: float) -> None:
    """Harmonic at small t, arithmetic at large t, and sampling the guided teacher gives the geometric one between them."""
    arithmetic, geometric, harmonic = extrapolations(v_c, v_u, s)
    assert arithmetic <= geometric <= harmonic <= v_c
    assert solution(v_c, v_u, s, (-5.0, 0.01)) == pytest.approx(harmonic, rel=1e-2)
    assert solution(v_c, v_u, s, (3.0, 0.01)) == pytest.approx(arithmetic, rel=1e-2)
    z = SIGMA_DATA * torch.randn(500, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(0))
    bound = Guided(Classes(v_c, v_u), torch.zeros(500, dtype=torch.int64), s)
    x0 = sample_diffusion(bound, z, 200, SIGMA_DATA)
    torch.testing.assert_close(x0, math.sqrt(geometric) * z, rtol=1e-2, atol=1e-3)


def test_far_scales_ask_for_a_negative_variance() -> None:
    """v_c − (s − 1)(v_u − v_c) < 0: at large t descent shrinks the samples however little they vary, and at small t it does not."""
    v_c, v_u, s = 0.4, 0.9, 2.0
    arithmetic, geometric, harmonic = extrapolations(v_c, v_u, s)
    assert arithmetic < 0 < geometric < harmonic
    teacher = Classes(v_c, v_u)
    for v in (0.3, 0.03, 0.003):
        net = Generator(v)
        assert push(net, objective(net, teacher, (s, s), (3.0, 0.01))) > 0
        small_t = push(net, objective(net, teacher, (s, s), (-5.0, 0.01)))
        assert (small_t > 0) == (v > harmonic)


def test_a_model_that_is_not_told_the_scale_allows_collapse() -> None:
    """The scale changes nothing here (v_c = v_u), and the right samples have the variance v_c at every s. Samples that hardly vary, about a
    mean that hangs on s, make up the same mixture: F_φ of the mixture is F_teacher and finds no fault, F_φ told s widens them."""
    v, narrow = 0.8, 0.1
    for told, wanted in ((True, "widen"), (False, "rest")):
        net = Generator(narrow, spread=math.sqrt(v - narrow * START**2))
        gradient = push(net, objective(net, Classes(v, v), (1.0, 2.0), (0.4, 2.0), told))
        assert gradient < -0.05 if wanted == "widen" else abs(gradient) < 1e-6
