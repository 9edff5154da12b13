# SPDX-License-Identifier: Apache-2.0
"""Everything that changes while training, and its form in a checkpoint."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scm_core.ema import Average, HalfLifeEma, PowerEma
from scm_core.nn.layers import mp_weights, normalized
from scm_core.train.checkpoint import CheckpointError
from scm_core.train.distributed import SINGLE, Ranks
from scm_core.train.guard import Step
from scm_core.train.optimizers import Implementation, Name, build_optimizer, local
from scm_core.train.precision import LossScale, Scaling
from scm_core.train.schedule import Schedule

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
COUNTERS = ("nimg", "unaveraged", "skipped", "skipped_in_a_row")
RESULT = "result"  # the average that a run is made for; others are named by their σ_rel


@dataclass(frozen=True)
class TrainSettings:
    """The numbers of one training run; ValueError for those out of range.

    `batch` is that of all processes together, cut into `accumulation` parts on each. `lr` is the reference rate of the network, `head_lr`
    that of the other modules (weighting heads). The run's result is the average of width `ema_sigma_rel`, or of half-life `ema_half_life`
    in images. Averages of the widths `snapshots` are kept beside it and stored every `snapshot_every` iterations, for others to be
    reconstructed from. `loss_scaling` is for fp16 trunks. `shard_optimizer`: each process keeps a part of the optimizer's moments.
    """

    iterations: int
    batch: int
    lr: float
    seed: int
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: Name = "adam"
    implementation: Implementation = "auto"
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    head_lr: float | None = None
    accumulation: int = 1
    loss_scaling: Scaling | None = None
    shard_optimizer: bool = False
    ema_sigma_rel: float | None = None
    ema_half_life: float | None = None
    snapshots: tuple[float, ...] = ()
    snapshot_every: int = 0  # 0: never
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 0  # 0: never
    patience: int = 20  # non-finite steps in a row that stop the run

    def __post_init__(self) -> None:
        for name in ("batch", "accumulation", "log_every", "checkpoint_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("iterations", "sample_every", "snapshot_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("lr", "head_lr", "eps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        if self.ema_sigma_rel is not None and self.ema_half_life is not None:
            raise ValueError(
                f"ema_half_life: expected one kind of average, got {self.ema_half_life} beside ema_sigma_rel {self.ema_sigma_rel}"
            )
        if self.snapshot_every and not self.snapshots:
            raise ValueError(
                f"snapshots: expected the widths to store every {self.snapshot_every} iterations, got none"
            )


class TrainState:
    """The trained modules (`net` first, then heads), the optimizer, the averages of `net`, and the counters.

    `companions` are the states of networks that are trained beside it, in step with it, and kept in its checkpoints (VSD's F_φ).
    """

    def __init__(
        self,
        net: nn.Module,
        settings: TrainSettings,
        heads: Mapping[str, nn.Module] | None = None,
        companions: Mapping[str, "TrainState"] | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.net, self.heads, self.settings, self.ranks = net, dict(heads or {}), settings, ranks
        # what is normalised at every step, found once: to walk through the modules costs more than to normalise a small network
        self.normalized = nn.ModuleList(module for _, module in mp_weights(net))
        self.companions = dict(companions or {})
        seeds = [settings.seed, *(other.settings.seed for other in self.companions.values())]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"companions: expected seeds of their own, or they share the noise of seed {settings.seed}"
            )
        groups: list[dict[str, Any]] = [{"params": list(net.parameters()), "lr": settings.lr}]
        if self.heads:
            parameters = [p for head in self.heads.values() for p in head.parameters()]
            groups.append({"params": parameters, "lr": settings.lr if settings.head_lr is None else settings.head_lr})
        self.reference_lr = [group["lr"] for group in groups]
        self.optimizer = build_optimizer(
            groups,
            settings.optimizer,
            settings.implementation,
            settings.betas,
            settings.eps,
            ranks,
            settings.shard_optimizer,
        )
        self.averages: dict[str, Average] = {}
        if settings.ema_sigma_rel is not None:
            self.averages[RESULT] = PowerEma(net, settings.ema_sigma_rel)
        elif settings.ema_half_life is not None:
            self.averages[RESULT] = HalfLifeEma(net, settings.ema_half_life)
        for width in settings.snapshots:
            self.averages[str(width)] = PowerEma(net, width)
        device = next(net.parameters()).device
        self.loss_scale = None if settings.loss_scaling is None else LossScale(settings.loss_scaling, device)
        self.iteration = self.nimg = self.skipped = self.skipped_in_a_row = 0
        self.unaveraged = 0  # images since the averages' last update
        self.pending: deque[Step] = deque()  # steps whose verdict is on its way
        self.descriptions: list[str] = []  # of steps that were not applied, for the log to take

    def modules(self) -> dict[str, nn.Module]:
        """The trained modules by name, without the companions'."""
        return {"net": self.net, **self.heads}

    def train(self, mode: bool = True) -> None:
        """Put all modules, the companions' too, into training or evaluation mode."""
        for module in self.modules().values():
            module.train(mode)
        for other in self.companions.values():
            other.train(mode)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights of `net` by parameter name, normalised as the network needs them. ValueError if the run keeps no average."""
        if RESULT not in self.averages:
            raise ValueError("ema_sigma_rel: this run keeps no average, got None")
        return normalized(self.net, self.averages[RESULT].state())

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers, optimizer moments, averages and loss scale by name.

        Where the optimizer's state is shared out among processes, all of them must call this, and only the first one's answer is whole.
        """
        places = self._places()
        for key, owner in self._owners(places).items():
            if self.ranks.rank in (0, owner):
                there = places[key]
                here = torch.empty_like(there, device=self.ranks.device) if there.is_meta else there.detach()
                places[key] = self.ranks.to_first(here, owner)
        return places

    def _owners(self, places: Mapping[str, Tensor]) -> dict[str, int]:
        """Where the tensors are that the first process lacks."""
        if self.ranks.count == 1:
            return {}
        lacking = torch.tensor([value.is_meta for value in places.values()])
        owner = self.ranks.largest(torch.where(lacking, -1, self.ranks.rank)).tolist()
        at_first = self.ranks.from_first(lacking.to(torch.int64)).tolist()
        return {key: rank for key, rank, missing in zip(places, owner, at_first, strict=True) if missing}

    def _places(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint by name: this process's, or one of its shape and type, without content, that another one has."""
        result: dict[str, Tensor] = {}
        moments = local(self.optimizer).state
        for module_name, module in self.modules().items():
            result |= {f"{module_name}/{key}": value for key, value in module.state_dict().items()}
            for key, parameter in module.named_parameters():
                own = moments.get(parameter)
                for name in MOMENTS:
                    like = torch.zeros((), device="meta") if name == "step" else parameter.detach().to("meta")
                    result[f"optimizer/{module_name}/{key}/{name}"] = like if own is None else own[name]
        for name, average in self.averages.items():
            result |= {f"ema/{name}/{key}": value for key, value in average.state().items()}
        if self.loss_scale is not None:
            result |= {f"loss_scale/{key}": value for key, value in self.loss_scale.tensors().items()}
        for name, companion in self.companions.items():
            result |= {f"companion/{name}/{key}": value for key, value in companion._places().items()}
        return result

    def meta(self) -> dict[str, Any]:
        """The counters, for JSON. Where everything random is drawn from follows from them and the seed, on every process."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        if not self.companions:
            return counters
        return {**counters, "companions": {name: other.meta() for name, other in self.companions.items()}}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: str = "checkpoint") -> None:
        """Take the state over from `tensors()` and `meta()` of another one; CheckpointError names the key that does not fit."""
        places = self._places()
        if missing := sorted(places.keys() - tensors.keys()):
            raise CheckpointError(
                f"{source}: tensor {missing[0]!r} is missing ({len(missing)} in all); it is of another network or version"
            )
        if extra := sorted(tensors.keys() - places.keys()):
            raise CheckpointError(
                f"{source}: tensor {extra[0]!r} is unknown here ({len(extra)} in all); it is of another network or version"
            )
        for key, value in places.items():
            for what in ("shape", "dtype"):
                found, expected = getattr(tensors[key], what), getattr(value, what)
                if found != expected:
                    shown = (tuple(found), tuple(expected)) if what == "shape" else (found, expected)
                    raise CheckpointError(f"{source}: tensor {key!r} has {what} {shown[0]}, expected {shown[1]}")
        for key, value in places.items():
            if not value.is_meta:
                value.copy_(tensors[key])
        self._count(int(meta["iteration"]), meta)

    def _count(self, iteration: int, meta: Mapping[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self, name, int(meta[name]))
        self.iteration = iteration
        for name, other in self.companions.items():
            other._count(iteration, meta["companions"][name])
