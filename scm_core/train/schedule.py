# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: a factor on the reference rate as a function of the iteration."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `ramp_up` iterations, then a decay rule.

    `linear`: constant until `start` (a fraction of the run), then linear to `final` at its end. `inverse_sqrt`: 1/√max(i/t_ref, 1),
    EDM2's rule (its Eq. 67). `constant`: 1.
    """

    rule: Literal["constant", "linear", "inverse_sqrt"] = "constant"
    ramp_up: int = 0
    start: float = 0.0
    final: float = 0.0
    t_ref: float = math.inf

    def __call__(self, iteration: int, iterations: int) -> float:
        """The factor for step number `iteration` (from 0) of `iterations`."""
        warm = min(1.0, (iteration + 1) / self.ramp_up) if self.ramp_up else 1.0
        if self.rule == "linear":
            begin = self.start * iterations
            done = max(0.0, iteration - begin) / max(iterations - begin, 1)
            return warm * (1 - (1 - self.final) * done)
        if self.rule == "inverse_sqrt":
            return warm / math.sqrt(max(iteration / self.t_ref, 1))
        if self.rule == "constant":
            return warm
        raise ValueError(f"decay.rule: expected constant, linear or inverse_sqrt, got {self.rule!r}")
