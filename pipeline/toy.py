# SPDX-License-Identifier: Apache-2.0
"""The toy of Figure 3: consistency models of a 2-D Gaussian mixture, whose PF-ODE is known, and how far they are from it.

The teacher is the mixture itself, the perfect diffusion model. Every distilled student continues from one sCD student, for as many
iterations: what differs between them is the method, the number of intervals N, and the precision alone. That their training forgets where
it started is an assumption; dsCD's errors next to those of N steps of DDIM, its fixed point, show how far it holds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.figures import Figure3, ToyTraining
from scm_core.mixture import GaussianMixture
from scm_core.nn.mlp import MLP
from scm_core.nn.network import Precision
from scm_core.objectives import Batch
from scm_core.objectives.consistency import ConsistencyObjective
from scm_core.objectives.discrete import DiscreteObjective
from scm_core.objectives.methods import METHODS
from scm_core.sampling import sample_consistency, sample_diffusion
from scm_core.seeds import derive_seed, generator_for
from scm_core.tangent import tangent
from scm_core.train.loop import Hooks, train
from scm_core.train.schedule import Schedule
from scm_core.train.state import TrainSettings, TrainState
from scm_core.trigflow import diffuse, sample_times, t_max

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")
DIMENSIONS = 2


class Row(NamedTuple):
    """One number of figure3.csv. `intervals` is N, or empty for continuous time."""

    quantity: str
    method: str
    precision: str
    intervals: int | str
    value: float


class Toy:
    """The mixture that a section describes, and fresh noise with the exact ends of its PF-ODE paths, (points, 2), float64."""

    def __init__(self, plan: Figure3, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.mixture = GaussianMixture.scaled(torch.tensor(plan.means), plan.std, sigma_data=plan.sigma_data)
        self.t_max = t_max(plan.sigma_data)
        unit = torch.randn(plan.points, DIMENSIONS, generator=generator_for(seed, "points"), dtype=torch.float64)
        self.z = plan.sigma_data * unit
        start = torch.full((plan.points,), self.t_max, dtype=torch.float64)
        self.exact = self.mixture.pf_ode_map(math.sin(self.t_max) * self.z, start)

    def network(self, precision: Precision = "fp32", start: MLP | None = None) -> MLP:
        """A network of the section's size, with the weights of `start` if there is one."""
        torch.manual_seed(derive_seed(self.seed, "init"))
        net = MLP(DIMENSIONS, self.plan.width, self.plan.blocks, precision)
        if start is not None:
            net.load_state_dict(start.state_dict())
        return net

    def batch(self, iteration: int) -> Batch:
        """Fresh data of an iteration."""
        size = self.plan.batch
        x0 = self.mixture.sample(size, generator_for(self.seed, "data", iteration))
        return Batch(x0, None, torch.arange(iteration * size, (iteration + 1) * size))

    def proposal(self) -> dict[str, Any]:
        """The options that all consistency methods have in common; without adaptive weighting, which on this toy makes sCD worse."""
        plan = self.plan
        return {"P_mean": plan.P_mean, "P_std": plan.P_std, "c": plan.tangent_c, "adaptive_weighting": False}

    def settings(self, training: ToyTraining, seed: int) -> TrainSettings:
        """The library's settings of a run."""
        plan = self.plan
        schedule = Schedule(ramp_up=training.ramp_up, **training.decay.model_dump())
        return TrainSettings(
            iterations=training.iterations,
            batch=plan.batch,
            lr=training.lr,
            seed=seed,
            schedule=schedule,
            betas=plan.betas,
            eps=plan.eps,
            ema_sigma_rel=plan.ema_sigma_rel,
        )

    def student(
        self,
        method: str,
        training: ToyTraining,
        precision: Precision = "fp32",
        start: MLP | None = None,
        report: Callable[[int], None] = lambda iterations: None,
        **options: Any,
    ) -> MLP:
        """The averaged network after training with a method of `METHODS`; `options` go to it, beside those of `proposal`."""
        net = self.network(precision, start)
        made = METHODS[method](
            net,
            self.mixture,
            self.plan.sigma_data,
            (DIMENSIONS,),
            **{**self.proposal(), "warmup": training.tangent_warmup, **options},
        )
        state = TrainState(net, self.settings(training, self.seed), made.heads)
        train(state, made.objective, self.batch, hooks=Hooks(progress=lambda done, scalars: report(done)))
        return averaged(state)

    def one_step(self, net: MLP) -> Tensor:
        """f(sin(t_max) z, t_max) of the noise, (points, 2)."""
        return sample_consistency(net, self.z.float(), (self.t_max,), self.plan.sigma_data)

    def paths(self, start: Tensor, points: int = 17) -> Tensor:
        """The PF-ODE's path from x at t_max to 0 at equally spaced times, (points, B, 2)."""
        times = torch.linspace(self.t_max, 0, points, dtype=start.dtype).expand(len(start), points).mT
        path = [start]
        for now, following in pairwise(times):
            path.append(self.mixture.integrate(path[-1], now, following, 1e-8))
        return torch.stack(path)

    def error(self, x: Tensor) -> float:
        """RMS distance of x from the exact ends, per coordinate: σ_d is the unit's scale."""
        return float((x - self.exact).square().mean().sqrt())

    def tangent_error(self, net: MLP, precision: Precision, intervals: int | None) -> float:
        """‖ĝ − g‖/‖g‖ over the points: ĝ of the network in that precision, discrete or continuous (None), g continuous in float64.

        The times are one draw from the proposal for all, which discrete time rounds up to its grid, as its own proposal does.
        """
        plan, kind = self.plan, "scd" if intervals is None else "dscd"
        extra = {} if intervals is None else {"intervals": intervals}
        options = {**self.proposal(), "warmup": 0, "normalize": "none", **extra}
        half = self.network(precision, net).eval()
        objective = METHODS[kind](half, self.mixture, plan.sigma_data, (DIMENSIONS,), **options).objective
        assert isinstance(objective, ConsistencyObjective)
        random = generator_for(self.seed, "tangent")
        x0, z = self.mixture.sample(plan.points, random), self.z.float()
        t = sample_times(plan.points, plan.P_mean, plan.P_std, plan.sigma_data, random)
        if isinstance(objective, DiscreteObjective):
            t = objective.grid.rounded_up(t)
        x_t = diffuse(x0, z, t)
        with torch.no_grad():
            dxdt = self.mixture.velocity(x_t, t)
            g = objective.tangent(half, x_t, t, dxdt, 1.0).g
            exact = copy.deepcopy(net).double()
            wanted = tangent(exact, x_t.double(), t.double(), dxdt.double(), plan.sigma_data, normalize="none").g
        return float((g - wanted).norm() / wanted.norm())


def averaged(state: TrainState) -> MLP:
    """The network with the averaged weights, in evaluation mode."""
    net: MLP = copy.deepcopy(state.net).eval()  # type: ignore[assignment]
    net.load_state_dict(state.averaged())
    return net


class Result(NamedTuple):
    """The numbers of Figure 3, and one-step samples: `exact`, and for each student <method>-<precision>-<N, or nothing>."""

    rows: list[Row]
    samples: dict[str, Tensor]


def intervals_of(plan: Figure3, precision: Precision) -> tuple[int, ...]:
    """N of the discrete-time students in that precision."""
    return plan.intervals if precision == "fp32" else plan.half_intervals


def total_iterations(plan: Figure3) -> int:
    """Iterations of all runs of `measure`, for the progress display."""
    tuned = 1 + sum(1 + len(intervals_of(plan, precision)) for precision in PRECISIONS)
    return 2 * plan.scratch.iterations + tuned * plan.tune.iterations


def measure(toy: Toy, report: Callable[[int], None] = lambda iterations: None) -> Result:
    """Train every student, each for as many iterations, and measure it; `report` hears of the iterations done so far."""
    plan, rows, done = toy.plan, list[Row](), 0
    samples = {"exact": toy.exact}

    def student(
        method: str, training: ToyTraining, precision: Precision = "fp32", start: MLP | None = None, **options: Any
    ) -> MLP:
        nonlocal done
        net = toy.student(method, training, precision, start, lambda n: report(done + n), **options)
        done += training.iterations
        return net

    def tune(method: str, precision: Precision, start: MLP, **options: Any) -> None:
        x, n = toy.one_step(student(method, plan.tune, precision, start, **options)), options.get("intervals", "")
        rows.append(Row("rms_error", method, precision, n, toy.error(x)))
        samples[f"{method}-{precision}-{n}"] = x

    scd = student("scd", plan.scratch)
    tune("sct", "fp32", student("sct", plan.scratch))
    rows += [Row("rms_error", "ddim", "fp64", n, toy.error(ddim(toy, n))) for n in plan.intervals]
    for precision in PRECISIONS:
        tune("scd", precision, scd)
        for n in intervals_of(plan, precision):
            tune("dscd", precision, scd, intervals=n)
    for precision in PRECISIONS:
        rows.append(Row("tangent_error", "scd", precision, "", toy.tangent_error(scd, precision, None)))
        rows += [
            Row("tangent_error", "dscd", precision, n, toy.tangent_error(scd, precision, n)) for n in plan.intervals
        ]
    return Result(rows, samples)


def ddim(toy: Toy, steps: int) -> Tensor:
    """Where N DDIM steps of the teacher on the grid of dsCD end: the fixed point of dsCD's training, f(x_t, t) = f(x_t', t')."""
    return sample_diffusion(toy.mixture, toy.z, steps, toy.plan.sigma_data, "ddim")
