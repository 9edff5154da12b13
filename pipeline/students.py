# SPDX-License-Identifier: Apache-2.0
"""The students' sections of params.yaml: one for each method, told apart by the key `method`.

The keys that a section adds to `Training` are the options of its method in `scm_core.objectives.methods`, under the same names
(without the prefix `tangent_`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.sections import Count, GuidanceRange, Index, NonNegative, Positive, Training, absent, problem

TEACHER = "teacher"  # the method that is not a student's


class StudentTraining(Training):
    """What all methods have in common."""

    method: str
    """Its objective, one of `scm_core.objectives.methods`."""
    guidance: GuidanceRange | None
    """Range of the guidance scale s ~ U[low, high] of each sample; null: no guidance."""
    start: str = Field(TEACHER, exclude_if=lambda name: name == TEACHER)
    """The network that it starts as: the teacher, or another student of the size, by name, which is trained before it."""

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of sampling steps that the student is measured at."""
        return (1, 2)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the method in `scm_core.objectives.methods`."""
        own = type(self).model_fields.keys() - Training.model_fields.keys() - {"method", "start"}
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
    fake_lr: Positive | None = Field(None, exclude_if=absent)
    """Its peak learning rate; null: the student's."""
    vsd_delay: Index = Field(0, exclude_if=lambda iterations: iterations == 0)
    """Iterations in which it learns alone, before it moves the student."""


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


def in_order(students: Mapping[str, StudentTraining]) -> list[str]:
    """The names of a size's students, each after the one that it starts as; an error of params.yaml for one that cannot start so."""
    for name, student in students.items():
        key, start = f"students.{name}.start", student.start
        if start == TEACHER:
            continue
        if start not in students:
            known = ", ".join([TEACHER, *(other for other in students if other != name)])
            raise problem(key, f"must be the teacher or another student of the size ({known}), got {start}")
        if (students[start].guidance is None) != (student.guidance is None):
            has = "no guidance input" if students[start].guidance is None else "a guidance input"
            raise problem(key, f"must be a student with the same inputs as {name}, and {start} has {has}")
    ordered: list[str] = []
    for name in students:
        chain: list[str] = []
        while name != TEACHER and name not in ordered:
            if name in chain:
                raise problem(
                    f"students.{name}.start", "leads back to itself: let one of the students start as the teacher"
                )
            chain.append(name)
            name = students[name].start
        ordered += reversed(chain)
    return ordered


METHODS = ("sct", "scd", "dsct", "dscd", "multistep", "vsd", "scd_vsd", "ect")
UNGUIDED = {
    "sct": "sCT learns from data",
    "dsct": "dsCT learns from data",
    "ect": "ECT learns from data",
}
