# SPDX-License-Identifier: Apache-2.0
"""Constants of an objective on the device of whoever asks: the grid of discrete time and its probabilities, the ends of segments."""

import torch
from torch import Tensor


class Copies:
    """Numbers of shape (N,), kept in float64, with a copy for each device and type that was asked for.

    Copied to a GPU anew at every step, they would make it wait each time.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.double()
        self.copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The numbers (N,), rounded to `dtype`, on `device`."""
        key = device, dtype
        if key not in self.copies:
            self.copies[key] = self.numbers.to(device, dtype)
        return self.copies[key]


class Ascending(Copies):
    """Times (N,) in radians that ascend, to look up those around t (B,)."""

    def before(self, t: Tensor) -> Tensor:
        """For each t (B,) the last time that is smaller, or the first of all if none is."""
        own = self.on(t.device, t.dtype)
        return own[(torch.searchsorted(own, t) - 1).clamp(min=0)]

    def rounded_up(self, t: Tensor) -> Tensor:
        """For each t (B,) the first time that is not smaller, or the last of all if none is."""
        own = self.on(t.device, t.dtype)
        return own[torch.searchsorted(own, t).clamp(max=len(own) - 1)]
