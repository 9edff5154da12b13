# SPDX-License-Identifier: Apache-2.0
"""Everything that changes while training, and its form in a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scm_core.ema import PowerEma
from scm_core.nn.layers import normalized
from scm_core.train.checkpoint import CheckpointError
from scm_core.train.schedule import Schedule


@dataclass(frozen=True)
class TrainSettings:
    """The numbers of one training run. `lr` is the reference rate of the network, `head_lr` that of the other modules (weighting heads)."""

    iterations: int
    batch: int
    lr: float
    seed: int
    schedule: Schedule = field(default_factory=Schedule)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    head_lr: float | None = None
    ema_sigma_rel: float | None = None
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 0  # 0: never
    patience: int = 20  # non-finite steps in a row that stop the run


class TrainState:
    """The trained modules (`net` first, then heads), the optimizer, the average of `net`, and the counters.

    `companions` are the states of networks that are trained beside it, in step with it, and kept in its checkpoints (VSD's F_φ).
    """

    def __init__(
        self,
        net: nn.Module,
        settings: TrainSettings,
        heads: Mapping[str, nn.Module] | None = None,
        companions: Mapping[str, "TrainState"] | None = None,
    ) -> None:
        self.net, self.heads, self.settings = net, dict(heads or {}), settings
        self.companions = dict(companions or {})
        if any(other.settings.seed == settings.seed for other in self.companions.values()):
            raise ValueError(
                f"companions: expected seeds of their own, or they share the noise of seed {settings.seed}"
            )
        groups: list[dict[str, Any]] = [{"params": list(net.parameters()), "lr": settings.lr}]
        if self.heads:
            parameters = [p for head in self.heads.values() for p in head.parameters()]
            groups.append({"params": parameters, "lr": settings.lr if settings.head_lr is None else settings.head_lr})
        self.reference_lr = [group["lr"] for group in groups]
        self.optimizer = torch.optim.Adam(groups, betas=settings.betas, eps=settings.eps, fused=True)
        # Adam's moments now, not at its first step: a checkpoint has them even if every step so far was skipped
        for group in groups:
            for parameter in group["params"]:
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
                step = torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        self.ema = PowerEma(net, settings.ema_sigma_rel) if settings.ema_sigma_rel is not None else None
        self.iteration = self.nimg = self.skipped = self.skipped_in_a_row = 0

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
        if self.ema is None:
            raise ValueError("ema_sigma_rel: this run keeps no average, got None")
        return normalized(self.net, self.ema.state())

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers, optimizer moments and averages by name."""
        result: dict[str, Tensor] = {}
        for module_name, module in self.modules().items():
            result |= {f"{module_name}/{key}": value for key, value in module.state_dict().items()}
            for key, parameter in module.named_parameters():
                moments = self.optimizer.state[parameter]
                result |= {f"optimizer/{module_name}/{key}/{name}": value for name, value in moments.items()}
        if self.ema is not None:
            result |= {f"ema/{key}": value for key, value in self.ema.state().items()}
        for name, other in self.companions.items():
            result |= {f"companion/{name}/{key}": value for key, value in other.tensors().items()}
        return result

    def meta(self) -> dict[str, Any]:
        """The counters, for JSON."""
        counters = {"nimg": self.nimg, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        if not self.companions:
            return counters
        return {**counters, "companions": {name: other.meta() for name, other in self.companions.items()}}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: str = "checkpoint") -> None:
        """Take the state over from `tensors()` and `meta()` of another one; CheckpointError names the key that does not fit."""
        own = self.tensors()
        if missing := sorted(own.keys() - tensors.keys()):
            raise CheckpointError(
                f"{source}: tensor {missing[0]!r} is missing ({len(missing)} in all); it is of another network or version"
            )
        if extra := sorted(tensors.keys() - own.keys()):
            raise CheckpointError(
                f"{source}: tensor {extra[0]!r} is unknown here ({len(extra)} in all); it is of another network or version"
            )
        for key, value in own.items():
            if value.shape != tensors[key].shape:
                raise CheckpointError(
                    f"{source}: tensor {key!r} has shape {tuple(tensors[key].shape)}, expected {tuple(value.shape)}"
                )
        for key, value in own.items():
            value.copy_(tensors[key])
        self._count(int(meta["iteration"]), meta)

    def _count(self, iteration: int, meta: Mapping[str, Any]) -> None:
        self.iteration, self.nimg = iteration, int(meta["nimg"])
        self.skipped, self.skipped_in_a_row = int(meta["skipped"]), int(meta["skipped_in_a_row"])
        for name, other in self.companions.items():
            other._count(iteration, meta["companions"][name])
