# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: a factor on the reference rate as a function of the iteration."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Rule = Literal["constant", "linear", "inverse_sqrt"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `ramp_up` iterations, or over `ramp_up_images` images (EDM2: 10 million), then a decay rule.

    `linear`: constant until `start` (a fraction of the run), then linear to `final` at its end. `inverse_sqrt`: 1/√max(i/t_ref, 1),
    EDM2's rule (its Eq. 67). `constant`: 1.
    """

    rule: Rule = "constant"
    ramp_up: int = 0
    ramp_up_images: int = 0
    start: float = 0.0
    final: float = 0.0
    t_ref: float = math.inf

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"decay.rule: expected {', '.join(get_args(Rule))}, got {self.rule!r}")
        if self.ramp_up < 0 or self.ramp_up_images < 0 or (self.ramp_up and self.ramp_up_images):
            raise ValueError(
                f"ramp_up: expected iterations or images, one of them 0 and none negative, got {self.ramp_up} and {self.ramp_up_images}"
            )
        if not self.t_ref > 0:
            raise ValueError(f"decay.t_ref: expected a number of iterations > 0, got {self.t_ref}")

    def __call__(self, iteration: int, iterations: int, batch: int = 1) -> float:
        """The factor for step number `iteration` (from 0) of `iterations` of `batch` images."""
        warm = min(1.0, (iteration + 1) / self.ramp_up) if self.ramp_up else 1.0
        if self.ramp_up_images:
            warm = min(1.0, (iteration + 1) * batch / self.ramp_up_images)
        if self.rule == "linear":
            begin = self.start * iterations
            done = max(0.0, iteration - begin) / max(iterations - begin, 1)
            return warm * (1 - (1 - self.final) * done)
        if self.rule == "inverse_sqrt":
            return warm / math.sqrt(max(iteration / self.t_ref, 1))
        return warm
