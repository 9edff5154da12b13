# SPDX-License-Identifier: Apache-2.0
"""Multistep consistency distillation: M segments of [0, t_max], each with a consistency function to its lower end (Heek et al. 2024).

In the segment above s: f_s(x_t, t) = cos(t − s) x_t − sin(t − s) σ_d F(x_t/σ_d, t), a DDIM step; its tangent is the one of Algorithm 1 with
t − s in every cosine and sine. `scm_core.sampling.sample_multistep` goes from boundary to boundary. M = 1 is sCD.
"""

from typing import Any

import torch
from torch import Tensor, nn

from scm_core.engines import Net
from scm_core.guidance import teacher_velocity
from scm_core.objectives import Method
from scm_core.objectives.consistency import ConsistencyObjective, consistency_method, required
from scm_core.objectives.grid import Ascending
from scm_core.sampling import segment_times
from scm_core.tangent import Tangent, tangent


class MultistepObjective(ConsistencyObjective):
    """Algorithm 1 in each of `segments` pieces of [0, t_max], uniform in t; the other options are those of `ConsistencyObjective`.

    Raises ValueError for fewer than 1 segment.
    """

    def __init__(self, *arguments: Any, segments: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        boundaries = segment_times(segments, self.sigma_data)
        # ascending from 0, without t_max; rounded as the sampler's times are
        self.ends = Ascending(torch.tensor(boundaries[:0:-1], dtype=torch.float64))

    def end(self, t: Tensor) -> Tensor:
        """The lower end s of the segment that t belongs to, s < t ≤ s + t_max/M (times beyond t_max: the last one); (B,) → (B,)."""
        return self.ends.before(t)

    def tangent(self, net: Net, x_t: Tensor, t: Tensor, dxdt: Tensor, r: float) -> Tangent:
        """F and the direction g towards the consistency function of t's segment."""
        end = self.end(t)
        return tangent(net, x_t, t, dxdt, self.sigma_data, r, self.normalize, self.c, self.engine, end)


def multistep(
    net: nn.Module, teacher: nn.Module | None, sigma_data: float, shape: tuple[int, ...], **options: Any
) -> Method:
    """Multistep sCD (rows M = 2 … 16 of Table 5). `options`: `segments` and those of `scd`."""
    velocity_fn = teacher_velocity(required(teacher), sigma_data)
    return consistency_method(MultistepObjective, net, velocity_fn, sigma_data, shape, **options)
