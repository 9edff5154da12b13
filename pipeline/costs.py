# SPDX-License-Identifier: Apache-2.0
"""What each kind of job needs: threads, memory, a time limit, and an estimate of its time and disk.

The estimates count multiplications and scale measurements of the demo on one CPU thread; `python -m pipeline plan`
prefers the times of finished runs. On a cluster the profile's `set-resources` replaces the limits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeline.autoencoders import PretrainedVae
from pipeline.params import Scale, Slot
from pipeline.sections import BasicTraining, Training

START = 6.0  # seconds to start Python with torch and MLflow
# Seconds per image, per (width² · blocks) of the small network, of one teacher iteration; two jobs at a time on two cores.
TEACHER = 108 / (2500 * 64 * 64**2 * 5)
FORWARD = TEACHER / 3  # a backward pass costs two forward passes
# Teacher iterations per student iteration; a guided teacher runs twice. Measured for sCT and sCD, by operation count else.
STUDENT = {
    "sct": 1.4, "scd": 1.8, "dsct": 4 / 3, "dscd": 5 / 3, "multistep": 1.8, "vsd": 9 / 3, "scd_vsd": 1.8 + 9 / 3, "ect": 4 / 3
}  # fmt: skip
GUIDED = 1 / 3  # more for each teacher that is guided
VAE = 40 / (1000 * 64 * 24**2)  # per image and width², an iteration of 32×32
PUBLISHED_VAE = (30, 335e6)  # seconds and bytes of sd-vae-ft-mse, without its download
FEATURES = 12 / (600 * 64)  # per image
IMAGE = 0.9e-3  # to decode a sample and take its features
TOY = 35e-6 / 64  # per point and unit of width, an iteration of Figure 3's networks
IMAGES = 5000  # of the demo's dataset
DIMS = {"inception": 2048, "dinov2": 1024}  # features of an image
MB = 1024**2


@dataclass(frozen=True)
class Resources:
    """What a job may use, and what it is expected to use."""

    threads: int
    memory_mb: int
    gpus: int
    minutes: int
    """Time limit."""
    seconds: float
    """Expected time."""
    bytes: int
    """Expected size of the output."""


def _resources(seconds: float, bytes: float, memory_mb: int = 3000) -> Resources:
    # One thread: two small runs at once beat one run on two threads. A limit far above the expectation, and above ten
    # minutes in any case: SLURM takes a preemption within the last ten for a time-out.
    minutes = max(30, math.ceil(4 * (START + seconds) / 60))
    return Resources(1, memory_mb, 0, minutes, round(START + seconds, 1), int(bytes))


def _of_slot(
    estimate: Callable[[Slot, Mapping[str, str]], Resources],
) -> Callable[[Scale, Mapping[str, str]], Resources]:
    """An estimate of a stage that has the axis slot."""

    @functools.wraps(estimate)
    def of_scale(scale: Scale, axes: Mapping[str, str]) -> Resources:
        return estimate(scale.slots[axes["slot"]], axes)

    return of_scale


def _work(slot: Slot, axes: Mapping[str, str]) -> float:
    return slot.sizes[axes["size"]].network.work(slot.item_resolution)


def _bytes(slot: Slot, axes: Mapping[str, str]) -> float:
    return 2 * 4 * slot.sizes[axes["size"]].network.weights()  # float32, and as much again for what lies beside it


def _images(training: Training | BasicTraining) -> int:
    return training.iterations * training.batch


@_of_slot
def dataset(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Reading and padding the images."""
    return _resources(5, IMAGES * slot.dataset.resolution**2 * slot.dataset.channels)


@_of_slot
def vae(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training the VAE, or verifying a published one."""
    if isinstance(slot.vae, PretrainedVae):
        return _resources(PUBLISHED_VAE[0], PUBLISHED_VAE[1])
    assert slot.vae is not None
    area = (slot.dataset.resolution / 32) ** 2
    return _resources(VAE * _images(slot.vae.training) * slot.vae.width**2 * area, 4 * 300 * slot.vae.width**2)


@_of_slot
def latents(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Encoding every image."""
    return _resources(5, IMAGES * 8 * slot.item_channels * slot.item_resolution**2)


@_of_slot
def reconstruction(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Decoding and measuring as many images as an evaluation reports."""
    return _resources(5 + IMAGE * min(slot.evaluation.samples, IMAGES), 1 * MB)


@_of_slot
def features(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training the feature network."""
    assert slot.features is not None
    return _resources(FEATURES * _images(slot.features.training), 1 * MB)


@_of_slot
def reference(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Features of every image."""
    dims = {**DIMS, "classifier": slot.features.dim if slot.features else 0}
    return _resources(5, 4 * IMAGES * sum(dims[space] for space in slot.evaluation.spaces))


@_of_slot
def teacher(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training a teacher."""
    training = slot.teacher_for(axes["size"])
    return _resources(TEACHER * _images(training) * _work(slot, axes), _bytes(slot, axes))


@_of_slot
def student(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training a student."""
    training = slot.student_for(axes["size"], axes["method"])
    factor = STUDENT[training.method] + (GUIDED if training.guidance else 0)
    return _resources(factor * TEACHER * _images(training) * _work(slot, axes), _bytes(slot, axes))


@_of_slot
def evaluate(slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Sampling the guidance sweep and the reported sets: those of the best scale and those of scale 1."""
    plan, method = slot.evaluation, axes["method"]
    reported = plan.report_sets * plan.samples
    student = None if method == "teacher" else slot.student_for(axes["size"], method)
    guidable = slot.dataset.labels > 0 if student is None else student.guidance is not None
    unguided, guided = reported, 0  # samples without guidance and with it
    if guidable:
        others = sum(scale != 1 for scale in plan.guidance)
        unguided += plan.select_samples
        guided += others * plan.select_samples + (reported if others else 0)
    training = student or slot.teacher_for(axes["size"])
    if training.snapshots:  # other averages are measured in full, earlier checkpoints on one set
        earlier = sum(n < training.iterations for n in plan.checkpoints) * plan.samples
        averages = 1 + sum(width != training.ema_sigma_rel for width in plan.averages)
        unguided, guided = averages * unguided + earlier, averages * guided + (earlier if guided else 0)
    if student is None:  # guidance costs a second pass
        steps = 2 * plan.teacher.steps - 1 if plan.teacher.solver == "heun" else plan.teacher.steps
        passes, images = steps * (unguided + 2 * guided), unguided + guided
    else:
        passes, images = sum(student.steps) * (unguided + guided), len(student.steps) * (unguided + guided)
    return _resources(FORWARD * _work(slot, axes) * passes + IMAGE * images, 1 * MB)


def report(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Writing a table."""
    return _resources(1, 64 * 1024)


def figure(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Sampling and drawing a figure."""
    return _resources(10, 1 * MB)


def figure3(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Training the students of the toy: from scratch, then one for each N and precision."""
    plan = scale.figure3
    assert plan is not None
    tuned = 4 + len(plan.intervals) + 2 * len(plan.half_intervals)
    iterations = 2 * plan.scratch.iterations + tuned * plan.tune.iterations
    return _resources(5 + TOY * plan.width * plan.batch * iterations, 1 * MB)
