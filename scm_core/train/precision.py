# SPDX-License-Identifier: Apache-2.0
"""Dynamic loss scaling for half-precision trunks (Micikevicius et al. 2018).

Weights, gradients and optimizer are float32; only activations and what flows back through them are fp16, whose smallest numbers are
6e-8. The loss is multiplied by a power of two before the backward and the gradient divided by it after. A gradient that is not finite
halves the scale and its step is not applied; `interval` finite ones in a row double it. bf16 has float32's range and needs none of this.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scm_core.validate import check_positive


@dataclass(frozen=True)
class Scaling:
    """Where the scale starts, after how many finite steps it doubles, and its bounds. Raises ValueError for numbers out of range."""

    start: float = 2.0**16
    interval: int = 2000
    smallest: float = 2.0**-14
    largest: float = 2.0**24

    def __post_init__(self) -> None:
        for name in ("start", "interval", "smallest", "largest"):
            check_positive(f"loss scale: {name}", getattr(self, name))
        if not self.smallest <= self.start <= self.largest:
            raise ValueError(f"loss scale: expected start within [{self.smallest}, {self.largest}], got {self.start}")


class LossScale:
    """The scale as it changes while training, on the device, so that no step waits for the host."""

    def __init__(self, scaling: Scaling, device: torch.device) -> None:
        self.scaling = scaling
        self.scale = torch.tensor(scaling.start, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The scale and the number of finite steps since it last changed, for a checkpoint."""
        return {"scale": self.scale, "good": self.good}

    @torch.no_grad()
    def unscale(self, gradients: list[Tensor]) -> None:
        """gradients ← gradients / scale, in place."""
        torch._foreach_mul_(gradients, 1 / self.scale)

    @torch.no_grad()
    def update(self, found: Tensor) -> None:
        """After a step: `found` is 1 where something was not finite, else 0; of shape ()."""
        bad = found > 0
        grown = self.good + 1 >= self.scaling.interval
        factor = torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0))
        self.scale.mul_(factor).clamp_(self.scaling.smallest, self.scaling.largest)
        self.good.add_(1).mul_(~(bad | grown))
