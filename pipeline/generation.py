# SPDX-License-Identifier: Apache-2.0
"""Samples of a slot's models as params.yaml describes them: which solver or times, which noise, which labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.params import Slot
from pipeline.students import TEACHER, MultistepTraining, StudentTraining
from scm_core.sampling import Guided, sample_consistency, sample_diffusion, sample_multistep
from scm_core.seeds import sample_noise
from scm_core.trigflow import t_max


def samples(
    slot: Slot,
    student: StudentTraining | None,
    net: nn.Module,
    noise: Sequence[Tensor],
    labels: Tensor,
    guidance: float | None,
) -> Tensor:
    """x0 (B, C, H, W) from unit noise (B, C, H, W): the first starts the sampler, each further one is a student's next step.

    `student` is the section that it was trained with: it samples at t_max and then t_mid, or from segment to segment, with the scale as an
    input. None: the teacher, which samples with the slot's solver and steps, classifier-free guided.
    """
    how, z = slot.evaluation.teacher, slot.sigma_data * noise[0]
    known = labels if slot.dataset.labels else None  # the networks of an unlabelled slot take none
    bound = Guided(net, known, guidance, student=student is not None)
    if student is None:
        return sample_diffusion(bound, z, how.steps, slot.sigma_data, how.solver)
    if isinstance(student, MultistepTraining):
        return sample_multistep(bound, z, student.segments, slot.sigma_data)
    times = consistency_times(slot, len(noise))
    fresh = [slot.sigma_data * further for further in noise[1:]]
    return sample_consistency(bound, z, times, slot.sigma_data, noise=fresh)


def consistency_times(slot: Slot, steps: int) -> tuple[float, ...]:
    """Where a student is evaluated, in radians: at t_max, then t_mid."""
    return (t_max(slot.sigma_data), slot.evaluation.t_mid)[:steps]


def noise_of(student: StudentTraining | None, indices: Sequence[int], shape: Sequence[int], steps: int) -> list[Tensor]:
    """The unit noise of the samples with these indices: one tensor for a deterministic sampler, else one for each step.

    Teachers and students start from the same noise."""
    deterministic = student is None or isinstance(student, MultistepTraining)
    further = range(1, 1 if deterministic else steps)
    return [sample_noise(indices, shape), *(sample_noise(indices, shape, f"step {i}") for i in further)]


def student_of_job(slot: Slot, size: str, method: str) -> StudentTraining | None:
    """The section of a student; None for the teacher."""
    return None if method == TEACHER else slot.student_for(size, method)
