# SPDX-License-Identifier: Apache-2.0
"""The students' sections of params.yaml: one for each method, told apart by the key `method`.

The keys that a section adds to `Training` are the options of its method in `scm_core.objectives.methods`, under the same names
(without the prefix `tangent_`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.sections import Count, GuidanceRange, Index, NonNegative, Positive, Training, problem


class StudentTraining(Training):
    """What all methods have in common."""

    method: str
    """Its objective, one of `scm_core.objectives.methods`."""
    guidance: GuidanceRange | None
    """Range of the guidance scale s ~ U[low, high] of each sample; null: no guidance."""

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of sampling steps that the student is measured at."""
        return (1, 2)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the method in `scm_core.objectives.methods`."""
        own = type(self).model_fields.keys() - Training.model_fields.keys() - {"method"}
        return {name.removeprefix("tangent_"): getattr(self, name) for name in sorted(own)}

    @model_validator(mode="after")
    def _ordered(self) -> StudentTraining:
        if self.guidance and self.guidance[0] > self.guidance[1]:
            raise problem("guidance", f"must be [low, high] with low ≤ high, got {list(self.guidance)}")
        return self


class _Tangent(StudentTraining):
    """Algorithms 1 and 2."""

    P_mean: float
    """Mean of ln σ of the proposal."""
    P_std: Positive
    """Standard deviation of ln σ of the proposal."""
    tangent_warmup: Index
    """H: iterations over which the unstable part of the tangent is faded in."""
    tangent_normalize: Literal["norm", "clip", "none"]
    tangent_c: Positive
    """c of the normalisation g/(‖g‖ + c)."""
    adaptive_weighting: bool
    """Whether a head learns the weight of each time."""


class _Continuous(_Tangent):
    """Algorithm 1."""

    tangent_engine: Literal["auto", "dual", "func", "finite_difference"]
    """How the derivative is computed; auto: pairs where the network has them, else torch.func.jvp."""


class _Vsd(StudentTraining):
    """Variational score distillation."""

    vsd_P_mean: float
    """Mean of ln σ at which the scores are compared."""
    vsd_P_std: Positive
    fake_P_mean: float
    """Mean of ln σ of the proposal that the network of the student's samples is trained with."""
    fake_P_std: Positive
    fake_guidance: bool
    """Whether that network is told the guidance scale."""


class ConsistencyTraining(_Continuous):
    """sCT, which learns from data and has no guidance, and sCD, which learns from the teacher."""

    method: Literal["sct", "scd"]


class DiscreteTraining(_Tangent):
    """Discrete time: dsCT and dsCD."""

    method: Literal["dsct", "dscd"]
    intervals: Annotated[int, Field(ge=2, le=100_000)]
    """N: steps of the time grid."""


class MultistepTraining(_Continuous):
    """sCD in segments of time."""

    method: Literal["multistep"]
    segments: Annotated[int, Field(ge=1, le=1000)]
    """M: segments, and steps of the sampler."""

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.segments,)


class VsdTraining(_Vsd):
    """VSD alone."""

    method: Literal["vsd"]
    adaptive_weighting: bool

    @property
    def steps(self) -> tuple[int, ...]:
        return (1,)  # it learns nothing about other times than t_max


class ScdVsdTraining(_Continuous, _Vsd):
    """sCD and VSD together."""

    method: Literal["scd_vsd"]
    vsd_weight: Positive
    """λ of L_sCD + λ L_VSD."""


class EctTraining(StudentTraining):
    """Easy Consistency Tuning, the baseline of Table E3."""

    method: Literal["ect"]
    P_mean: float
    """Mean of ln σ of the proposal."""
    P_std: Positive
    stage_iterations: Count
    """Iterations after which the distance of the two times shrinks."""
    q: Annotated[float, Field(gt=1)]
    """Factor by which it shrinks."""
    k: NonNegative
    b: Positive
    c: Positive
    """Of the pseudo-Huber metric."""


Student = Annotated[
    ConsistencyTraining | DiscreteTraining | MultistepTraining | VsdTraining | ScdVsdTraining | EctTraining,
    Field(discriminator="method"),
]
METHODS = ("sct", "scd", "dsct", "dscd", "multistep", "vsd", "scd_vsd", "ect")
UNGUIDED = {
    "sct": "sCT learns from data",
    "dsct": "dsCT learns from data",
    "ect": "ECT learns from data",
}
