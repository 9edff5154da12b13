# SPDX-License-Identifier: Apache-2.0
"""The sections of params.yaml that stand for themselves: data, networks, training, evaluation.

Every number is required: params.yaml is where numbers live, so the models have no defaults for them. Types are strict
(a quoted number is an error), except that an integer may stand for a float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

# Integers stay exact in JSON (the fingerprints are hashes of JSON), hence the bound.
Count = Annotated[int, Field(ge=1, le=2**53)]
Index = Annotated[int, Field(ge=0, le=2**53)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
# YAML has lists where these models have tuples; the elements stay strict.
Betas = Annotated[tuple[Probability, Probability], Strict(False)]
GuidanceRange = Annotated[tuple[NonNegative, NonNegative], Strict(False)]


def problem(key: str, sentence: str) -> PydanticCustomError:
    """A cross-field error at `key` (dotted, relative to the model whose validator raises it)."""
    return PydanticCustomError("cross_field", "{sentence}", {"at": key, "sentence": sentence})


class Model(BaseModel):
    """Base of all sections: frozen, strict, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        # Before the fields are looked at: a mistyped key is better named than the key that it leaves missing.
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError("unknown_key", "unknown", {"at": key, "known": list(cls.model_fields)})
        return data


class BasicTraining(Model):
    """Training of an auxiliary network (VAE, feature classifier)."""

    iterations: Count
    batch: Count
    lr: Positive
    """Peak learning rate."""
    log_every: Count
    checkpoint_every: Count


class Features(Model):
    dim: Count
    """Width of the classifier's penultimate layer: the dimension of the FID space."""
    training: BasicTraining


class LinearDecay(Model):
    rule: Literal["linear"]
    start: Fraction
    """Fraction of the iterations after which the learning rate falls."""
    final: Fraction
    """Learning rate at the end, as a fraction of `lr`."""


class InverseSqrtDecay(Model):
    rule: Literal["inverse_sqrt"]
    t_ref: Count
    """Iterations until the learning rate starts to fall as 1/√t (EDM2)."""


Decay = Annotated[LinearDecay | InverseSqrtDecay, Field(discriminator="rule")]


Width = Annotated[float, Field(gt=0, lt=0.28)]


class Snapshots(Model):
    """Power-function averages to keep, from which one of any width can be reconstructed after the training."""

    sigma_rel: Annotated[tuple[Width, ...], Strict(False), Field(min_length=1)]
    """Their relative widths (EDM2: 0.05 and 0.10)."""
    every: Count
    """Iterations from one to the next."""
    measured: bool = Field(True, exclude_if=bool)
    """Whether `evaluation.checkpoints` are measured of this training."""


class Engine(Model):
    """How a size's networks are trained, as far as it changes rounding at most: not a part of what a result is known by."""

    processes: Count = 1
    """Processes that share each batch, one for each GPU."""
    processes_per_node: Count | None = None
    """The most of them on one node of a cluster; null: `hardware.gpus_per_node`, and all of them in a scale without that section."""
    accumulation: Count = 1
    """Parts that each process takes its share of a batch in, where it does not fit into memory at once."""
    compile: bool = False
    """torch.compile of the networks."""
    optimizer: Literal["auto", "fused", "foreach", "single"] = "auto"
    """How the optimizer's kernels work: over all weights at once, operation by operation, or weight by weight."""
    shard_optimizer: bool = False
    """Each process keeps its part of the optimizer's moments."""
    prefetch: Index = 0
    """Batches that a thread prepares ahead; worth it with a GPU."""
    budget_minutes: Positive | None = None
    """Minutes after which a training saves, stops and asks to be started again; null: none."""

    def nodes(self, gpus_per_node: int | None) -> int:
        """Nodes that the processes are spread over; the second is `hardware.gpus_per_node`, if the scale has it."""
        return math.ceil(self.processes / (self.processes_per_node or gpus_per_node or self.processes))


class Training(Model):
    """What teacher and student training have in common."""

    iterations: Count
    batch: Count
    optimizer: Literal["adam", "radam"] = "adam"
    lr: Positive
    """Peak learning rate."""
    betas: Betas
    eps: Positive
    ramp_up: Index
    """Iterations of linear warm-up."""
    ramp_up_images: Index = 0
    """The same in images (EDM2: 10 million), if `ramp_up` is 0."""
    decay: Decay
    ema_sigma_rel: Width | None
    """Relative width of the power-function EMA; 0.2887 would be the plain average (γ = 0). null: `ema_half_life` instead."""
    ema_half_life: Positive | None = None
    """Half-life of an exponential average, in images."""
    snapshots: Snapshots | None = None
    dropout: Probability
    dropout_resolution: Count | None
    """Blocks of a higher resolution have no dropout; null: all have it."""
    logvar_lr: Positive
    """Learning rate of the adaptive weighting head."""
    log_every: Count
    checkpoint_every: Count
    sample_every: Count

    @model_validator(mode="after")
    def _one_ramp(self) -> Training:
        if self.ramp_up and self.ramp_up_images:
            raise problem("ramp_up_images", f"must be 0 where ramp_up is not (it is {self.ramp_up}), or ramp_up 0")
        return self

    @model_validator(mode="after")
    def _one_average(self) -> Training:
        if (self.ema_sigma_rel is None) == (self.ema_half_life is None):
            raise problem("ema_half_life", "must be given if ema_sigma_rel is null, and only then")
        return self


class TeacherTraining(Training):
    P_mean: float
    """Mean of ln σ of the proposal."""
    P_std: Positive
    """Standard deviation of ln σ of the proposal."""
    label_dropout: Probability
    """Probability of hiding the label, which trains the unconditional model that guidance needs."""


class TeacherSampling(Model):
    solver: Literal["heun", "ddim", "dpm2m", "dpmpp2m"]
    steps: Annotated[int, Field(ge=2, le=10_000)]
    """Time steps n; Heun's method evaluates the network 2n − 1 times."""

    @property
    def nfe(self) -> int:
        """Evaluations of the network for one sample without guidance, as scm_core.sampling.diffusion_nfe counts them."""
        return 2 * self.steps - 1 if self.solver == "heun" else self.steps


Space = Literal["classifier", "inception", "dinov2"]


def absent(value: Any) -> bool:
    """Whether an optional key says nothing: results are then known by the same name as before there was such a key."""
    return value in (None, ())


class Evaluation(Model):
    spaces: Annotated[tuple[Space, ...], Strict(False), Field(min_length=1)]
    """Networks whose features are compared: the slot's own classifier or Inception (FID), DINOv2 (FD-DINOv2). Each selects its guidance."""
    samples: Count
    """Samples of each reported number."""
    select_samples: Count
    """Samples of each point of the sweep that selects the best guidance."""
    guidance: Annotated[tuple[NonNegative, ...], Strict(False), Field(min_length=1)]
    """The grid of guidance scales, ascending; it holds 1 (no guidance), where unguided models are measured."""
    select_seed: Index
    """First sample index of the selecting set."""
    report_seed: Index
    """First sample index of the reported set."""
    report_sets: Count
    """Reported sets, one behind the other; several give a standard deviation over seeds."""
    groups: Annotated[int, Field(ge=0, le=100)]
    """Groups of samples left out in turn for the standard errors of precision and recall; 0: no errors."""
    averages: Annotated[tuple[Width, ...], Strict(False)] = Field((), exclude_if=absent)
    """Other relative widths of the average, each swept like the published one, of trainings that keep `snapshots`."""
    checkpoints: Annotated[tuple[Count, ...], Strict(False)] = Field((), exclude_if=absent)
    """Iterations, ascending, after which these trainings are measured, too (Figure 5): one reported set at the selected scale and at 1."""
    manifold_images: Count | None = Field(None, exclude_if=absent)
    """Reference images, drawn at random, that precision, recall, density, coverage and KID compare with; null: all, as FID always does."""
    teacher: TeacherSampling
    t_mid: Annotated[float, Field(gt=0, lt=math.pi / 2)]
    """Time (radians) of the second step of consistency sampling."""
    neighbours: Count
    """k of precision, recall, density and coverage."""
    batch: Count
    """Samples made at once; part of what a result is known by, as it is rounded differently with another."""
    processes: Count = 1
    """Processes that share the sampling, one for each GPU."""
    keep_features: bool = False
    """Whether the features of a measured set stay on disk; without them another metric samples again."""

    @model_validator(mode="after")
    def _consistent(self) -> Evaluation:
        if any(a >= b for a, b in pairwise(self.guidance)):
            raise problem("guidance", f"must ascend without repetition, got {list(self.guidance)}")
        if 1.0 not in self.guidance:
            raise problem("guidance", f"must contain 1.0 (no guidance), got {list(self.guidance)}")
        if any(a >= b for a, b in pairwise(self.checkpoints)):
            raise problem("checkpoints", f"must ascend without repetition, got {list(self.checkpoints)}")
        if len(set(self.averages)) < len(self.averages):
            raise problem("averages", f"must name each width once, got {list(self.averages)}")
        if self.manifold_images is not None and self.manifold_images <= self.neighbours:
            raise problem(
                "manifold_images", f"must be above neighbours ({self.neighbours}), got {self.manifold_images}"
            )
        if self.select_samples > self.samples:
            raise problem("select_samples", f"must be at most samples ({self.samples}), got {self.select_samples}")
        if len(set(self.spaces)) < len(self.spaces) or {"classifier", "inception"} <= set(self.spaces):
            raise problem(
                "spaces", f"must name each once, and one of classifier and inception, got {list(self.spaces)}"
            )
        if self.groups == 1:
            raise problem("groups", "must be 0 or at least 2, got 1")
        if self.neighbours >= self.select_samples:
            raise problem("neighbours", f"must be below select_samples ({self.select_samples}), got {self.neighbours}")
        if self.groups and self.neighbours >= self.select_samples - math.ceil(self.select_samples / self.groups):
            raise problem("groups", f"leaves too few of {self.select_samples} samples for {self.neighbours} neighbours")
        select_end = self.select_seed + self.select_samples
        report_end = self.report_seed + self.report_sets * self.samples
        if self.select_seed < report_end and self.report_seed < select_end:
            raise problem(
                "report_seed",
                f"its samples {self.report_seed}…{report_end - 1} overlap the selecting samples "
                f"{self.select_seed}…{select_end - 1}, so move report_seed or select_seed",
            )
        return self
