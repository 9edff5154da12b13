# SPDX-License-Identifier: Apache-2.0
"""Samples of a slot's models as params.yaml describes them: which solver or times, which noise, which labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.params import Slot
from scm_core.sampling import Guided, sample_consistency, sample_diffusion
from scm_core.seeds import sample_noise
from scm_core.trigflow import t_max

TEACHER = "teacher"  # the method that is not a student's


def samples(
    slot: Slot, method: str, net: nn.Module, noise: Sequence[Tensor], labels: Tensor, guidance: float | None
) -> Tensor:
    """x0 (B, C, H, W) from unit noise (B, C, H, W): the first starts the sampler, each further one is a student's next step.

    A teacher samples with the slot's solver and steps, classifier-free guided; a student at t_max and then t_mid, with the scale as
    an input.
    """
    how, z = slot.evaluation, slot.sigma_data * noise[0]
    known = labels if slot.dataset.labels else None  # the networks of an unlabelled slot take none
    if method == TEACHER:
        return sample_diffusion(Guided(net, known, guidance), z, how.teacher.steps, slot.sigma_data, how.teacher.solver)
    times = (t_max(slot.sigma_data), how.t_mid)[: len(noise)]
    fresh = [slot.sigma_data * further for further in noise[1:]]
    return sample_consistency(Guided(net, known, guidance, student=True), z, times, slot.sigma_data, noise=fresh)


def noise_of(method: str, indices: Sequence[int], shape: Sequence[int], steps: int) -> list[Tensor]:
    """The unit noise of the samples with these indices: one tensor for a teacher, one for each step of a student.

    Teachers and students start from the same noise."""
    further = range(1, 1 if method == TEACHER else steps)
    return [sample_noise(indices, shape), *(sample_noise(indices, shape, f"step {i}") for i in further)]
