# SPDX-License-Identifier: Apache-2.0
"""Figure 4: how fast a diffusion model's F moves along its PF-ODE, with three embeddings of the time (paper §4.1).

dF/dt = ∇_x F · dx_t/dt + ∂_t F. Under EDM's c_noise = ¼ ln(σ_d tan t) and random Fourier features of scale 16 the second part is large
and noisy; it is what makes the tangents of consistency training unstable. Trained here are teachers of a toy: 2-D points, small networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.figures import Figure4
from scm_core.engines import value_and_jvp
from scm_core.mixture import GaussianMixture
from scm_core.nn.embedding import LogVarHead
from scm_core.nn.mlp import MLP
from scm_core.objectives import Batch
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.seeds import derive_seed, generator_for
from scm_core.train.loop import Hooks, train
from scm_core.train.schedule import Schedule
from scm_core.train.state import TrainSettings, TrainState
from scm_core.trigflow import diffuse, sigma_to_t

VARIANTS = {
    "edm_fourier": "EDM c_noise, Fourier scale {scale:g}",
    "edm_positional": "EDM c_noise, positional",
    "trigflow_positional": "TrigFlow c_noise = t, positional",
}
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM


class Row(NamedTuple):
    """One number of figure4.csv: the mean norm over points at a time."""

    embedding: str
    seed: int
    quantity: str
    t: float
    value: float


def embedding_of(variant: str, plan: Figure4, seed: int) -> dict[str, Any]:
    """The arguments of the network."""
    noise, _, kind = variant.partition("_")
    shared = {"c_noise": "t" if noise == "trigflow" else "edm", "sigma_data": plan.sigma_data, "embedding": kind}
    return {**shared, **({"fourier_scale": plan.fourier_scale, "fourier_seed": seed} if kind == "fourier" else {})}


def teacher(plan: Figure4, variant: str, seed: int, report: Callable[[int], None]) -> MLP:
    """A diffusion model of the mixture, its averaged weights."""
    mixture = mixture_of(plan)
    torch.manual_seed(derive_seed(seed, "init"))
    net = MLP(2, plan.width, plan.blocks, **embedding_of(variant, plan, seed))
    logvar = LogVarHead(bias=-2 * math.log(plan.sigma_data))
    objective = DiffusionObjective(net, logvar, plan.sigma_data, plan.P_mean, plan.P_std, 0.0)
    settings = TrainSettings(
        iterations=plan.iterations,
        batch=plan.batch,
        lr=plan.lr,
        seed=seed,
        schedule=Schedule(ramp_up=plan.ramp_up, **plan.decay.model_dump()),
        betas=plan.betas,
        eps=plan.eps,
        ema_sigma_rel=plan.ema_sigma_rel,
    )

    def batch(iteration: int) -> Batch:
        x0 = mixture.sample(plan.batch, generator_for(seed, "data", iteration))
        return Batch(x0, None, torch.arange(iteration * plan.batch, (iteration + 1) * plan.batch))

    state = TrainState(net, settings, {"logvar": logvar})
    train(state, objective, batch, hooks=Hooks(progress=lambda done, scalars: report(done)))
    net.load_state_dict(state.averaged())
    return net.eval()


def mixture_of(plan: Figure4) -> GaussianMixture:
    """The toy's data."""
    return GaussianMixture.scaled(torch.tensor(plan.means), plan.std, sigma_data=plan.sigma_data)


def parts(net: MLP, x_t: Tensor, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """‖∇_x F · dx_t/dt‖ and ‖∂_t F‖ of each point, (B,), along the PF-ODE of the network itself: dx_t/dt = σ_d F(x_t/σ_d, t)."""
    with torch.no_grad():
        F = net(x_t / sigma_data, t)
    still, nothing = torch.zeros_like(x_t), torch.zeros_like(t)
    # the network's argument is x_t/σ_d, whose time derivative is F
    space = value_and_jvp(net, x_t / sigma_data, t, F, nothing)[1]
    time = value_and_jvp(net, x_t / sigma_data, t, still, torch.ones_like(t))[1]
    return space.norm(dim=1), time.norm(dim=1)


def times(plan: Figure4) -> Tensor:
    """t of σ from 0.002 to 80, equally spaced in ln σ, float64."""
    sigma = torch.exp(torch.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), plan.times, dtype=torch.float64))
    return sigma_to_t(sigma, plan.sigma_data)


def measure(plan: Figure4, seed: int, report: Callable[[int], None] = lambda iterations: None) -> list[Row]:
    """Train each variant from every seed, and measure its parts at all times; `report` hears of the iterations done so far."""
    return list(_measure(plan, seed, report))


def _further(report: Callable[[int], None], before: int, iterations: int) -> None:
    report(before + iterations)


def _measure(plan: Figure4, seed: int, report: Callable[[int], None]) -> Iterator[Row]:
    mixture, done = mixture_of(plan), 0
    for variant in VARIANTS:
        for number in range(plan.seeds):
            net = teacher(plan, variant, derive_seed(seed, "figure4", number), partial(_further, report, done))
            done += plan.iterations
            net.double()
            random = generator_for(seed, "figure4 points")
            x0 = mixture.sample(plan.points, random, torch.float64)
            z = plan.sigma_data * torch.randn(x0.shape, generator=random, dtype=torch.float64)
            for time in times(plan):
                t = time.expand(plan.points)
                found = parts(net, diffuse(x0, z, t), t, plan.sigma_data)
                for quantity, norms in zip(("space", "time"), found, strict=True):
                    yield Row(variant, number, quantity, float(time), float(norms.mean()))
