# SPDX-License-Identifier: Apache-2.0
"""The sections of params.yaml for figures that have numbers of their own."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field, Strict, model_validator

from pipeline.sections import Betas, Count, Decay, Index, Model, NonNegative, Positive, Width, problem


class Figure2(Model):
    labels: Annotated[tuple[Index, ...], Strict(False), Field(min_length=1)]
    """One column of samples for each."""
    seed: Index
    """Sample index of the first column's noise."""


class Grids(Model):
    """Figures 8 to 13: samples of one student with 1 and with 2 steps at three guidance scales, a row for each class."""

    student: str = "scd"
    """Of the largest size that trains it."""
    guidance: Annotated[tuple[NonNegative, NonNegative, NonNegative], Strict(False)]
    """Figures 8 and 9, 10 and 11, 12 and 13; a student that is not guided is shown once, in Figures 8 and 9."""
    labels: Annotated[tuple[Index, ...], Strict(False), Field(min_length=1)]
    """One row of samples for each."""
    columns: Count
    """Samples of each class: their noise is the same in every figure."""
    seed: Index
    """Sample index of the first one's noise."""


class ToyTraining(Model):
    """One training run of Figure 3."""

    iterations: Count
    lr: Positive
    ramp_up: Index
    decay: Decay
    tangent_warmup: Index


class Toy(Model):
    """A 2-D Gaussian mixture and a network for it."""

    sigma_data: Positive
    means: Annotated[tuple[Annotated[tuple[float, float], Strict(False)], ...], Strict(False), Field(min_length=1)]
    """Centres of the modes, of equal weight; the whole is moved and scaled to mean 0 and σ_d."""
    std: Positive
    """Standard deviation of each mode, in the units of `means`."""
    width: Count
    blocks: Count
    batch: Count
    betas: Betas
    eps: Positive
    ema_sigma_rel: Width

    @model_validator(mode="after")
    def _even(self) -> Toy:
        if self.width % 2 or self.width < 4:
            raise problem("width", f"must be even and at least 4, got {self.width}")
        return self


class Figure4(Toy):
    """Diffusion models of the toy with three time embeddings."""

    P_mean: float
    P_std: Positive
    fourier_scale: Positive
    """Of the first of them."""
    iterations: Count
    lr: Positive
    ramp_up: Index
    decay: Decay
    seeds: Annotated[int, Field(ge=2, le=100)]
    """Trainings of each."""
    points: Count
    """Points x_t at each time."""
    times: Annotated[int, Field(ge=2)]
    """Times t, equally spaced in ln tan t between those of σ = 0.002 and 80."""


class Figure3(Toy):
    """Consistency models of the toy."""

    P_mean: float
    P_std: Positive
    tangent_c: Positive
    scratch: ToyTraining
    """sCD and sCT from random weights."""
    tune: ToyTraining
    """sCT further; from that sCD: sCD and dsCD for each N, in each precision."""
    intervals: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Strict(False), Field(min_length=1)]
    """N of dsCD in float32."""
    half_intervals: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Strict(False)]
    """N of dsCD with the network's trunk in bf16 and fp16."""
    points: Count
    """Noise samples that errors are measured on."""
    paths: Count
    """Trajectories drawn."""

    @model_validator(mode="after")
    def _consistent(self) -> Figure3:
        if self.paths > self.points:
            raise problem("paths", f"must be at most points ({self.points}), got {self.paths}")
        for key in ("intervals", "half_intervals"):
            if any(a >= b for a, b in pairwise(getattr(self, key))):
                raise problem(key, f"must ascend without repetition, got {list(getattr(self, key))}")
        return self
