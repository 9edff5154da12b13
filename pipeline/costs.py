# SPDX-License-Identifier: Apache-2.0
"""What each kind of job needs: processors, memory, a time limit, and an estimate of its time and disk.

Time is model FLOPs over a rate: of one CPU thread, measured on the demo, or of the GPUs that the scale's section `hardware` names, at the
utilisation that it assumes. `python -m pipeline plan` prefers the times of finished runs. Metrics after the features are not counted:
they take minutes where sampling takes hours. A site that lets jobs run shorter says so in the section `hardware`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pipeline.autoencoders import PretrainedVae
from pipeline.params import Scale, Slot
from pipeline.passes import STUDENTS, TEACHER
from pipeline.sections import BasicTraining, Training

START = 6.0  # seconds to start Python with torch and MLflow
GPU_START = 300.0  # the same on a cluster, with compilation of the networks and the data at hand; assumed
# FLOP/s of one CPU thread: the demo's teacher of size M (2,500 iterations of 64, 3 · 12.6 MFLOP an image) takes 108 s beside another job
CPU_FLOPS = 2500 * 64 * 3 * 12.59e6 / 108
PUBLISHED_VAE = (30, 335e6)  # seconds and bytes of sd-vae-ft-mse, without its download
VAE = 40 / (1000 * 64 * 24**2)  # seconds per image and width², an iteration of the demo's VAE at 32×32
FEATURES = 12 / (600 * 64)  # seconds per image, an iteration of the demo's classifier
IMAGE = 0.9e-3  # seconds to decode one of the demo's samples and take its features
IMPORT = 20e-9  # seconds per byte of an imported network: reading, verifying, writing; assumed
TOY = 35e-6 / 64  # seconds per point and unit of width, an iteration of Figure 3's networks
# In a source; images of one's own are counted when they are read, and until then taken for so many.
IMAGES = {"mnist5k": 5000, "digits": 1797, "cifar10": 50_000, "imagenet": 1_281_167, "images": 50_000}
DECODING = {"imagenet": 0.02, "images": 0.02}  # seconds per image to decode and crop a photograph; assumed
DIMS = {"inception": 2048, "dinov2": 1024}  # features of an image
# FLOPs that scm_core.train.flops counts: per image of 299×299 (Inception v3) and 224×224 (ViT-L/14), per pixel of sd-vae-ft-mse at 512×512
EXTRACTOR_FLOPS = {"inception": 11.4e9, "dinov2": 162e9}
ENCODER_FLOPS, DECODER_FLOPS = 1.117e12 / 512**2, 2.515e12 / 512**2
KEPT = 3  # checkpoints on disk while another one is written
MB = 1024**2
REPORT_SLOT = "latent_guided"  # the slot that Table 2 and Figure 2 show


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
    scratch_bytes: int
    """Expected size of what lies on disk while it runs and is removed after it: checkpoints, features."""
    processes: int = 1
    """Processes that share the threads."""
    nodes: int = 1
    """Nodes of a cluster that all of this is spread over, evenly."""
    tasks_per_node: int = 1
    """Processes that the cluster starts on each of them. One that has others beside it starts them itself."""

    @property
    def threads_each(self) -> int:
        """Threads of one process."""
        return max(1, self.threads // self.processes)


def _resources(
    scale: Scale, bytes: float, flops: float = 0, seconds: float = 0, scratch: float = 0, processes: int = 1
) -> Resources:
    """Those of a job of so many FLOPs and so many seconds of other work on one CPU thread, which its processes share.

    In a scale with GPUs each process has one, if the job has FLOPs to speak of; else it has a core.
    """
    hardware, size, work = scale.hardware, int(bytes), int(scratch)
    gpus = processes if hardware and flops else 0
    rate = hardware.flops if hardware else CPU_FLOPS
    total = (GPU_START if gpus else START) + (flops / rate + seconds) / processes
    # A limit far above the expectation, and above ten minutes in any case: SLURM takes a preemption within the last ten for a time-out.
    minutes = max(30, math.ceil((2 if gpus else 4) * total / 60))
    threads, memory = processes, 3000 * processes  # one thread each: two small runs at once beat one run on two threads
    if hardware and gpus:
        minutes = min(minutes, math.floor(60 * hardware.time_limit_hours))
        threads, memory = gpus * hardware.cpus_per_gpu, int(gpus * hardware.host_memory_per_gpu_gb * 1024)
    return Resources(threads, memory, gpus, minutes, round(total, 1), size, work, processes)


def _of_slot(
    estimate: Callable[[Scale, Slot, Mapping[str, str]], Resources],
) -> Callable[[Scale, Mapping[str, str]], Resources]:
    """An estimate of a stage that has the axis slot."""

    @functools.wraps(estimate)
    def of_scale(scale: Scale, axes: Mapping[str, str]) -> Resources:
        return estimate(scale, scale.slots[axes["slot"]], axes)

    return of_scale


def _images(training: Training | BasicTraining) -> int:
    return training.iterations * training.batch


def training_flops(slot: Slot, size: str, method: str) -> float:
    """Model FLOPs of a whole training, and what gradient checkpointing computes again."""
    network = slot.sizes[size].network
    training: Training = slot.teacher_for(size) if method == "teacher" else slot.student_for(size, method)
    passes, guided = TEACHER, False
    if method != "teacher":
        student = slot.student_for(size, method)
        passes, guided = STUDENTS[student.method], student.guidance is not None
    per_item = passes.total(guided, getattr(network, "checkpointing", False))
    return float(per_item * network.flops(slot.items) * _images(training))


@_of_slot
def dataset(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Reading and padding the images."""
    wanted = slot.dataset
    images = IMAGES[wanted.source]
    seconds = 5 + images * DECODING.get(wanted.source, 0.0)
    size = images * wanted.resolution**2 * wanted.channels
    return _resources(scale, size, seconds=seconds, processes=wanted.engine.processes)


@_of_slot
def vae(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training the VAE, or verifying a published one."""
    if isinstance(slot.vae, PretrainedVae):
        return _resources(scale, PUBLISHED_VAE[1], seconds=PUBLISHED_VAE[0])
    assert slot.vae is not None
    area = (slot.dataset.resolution / 32) ** 2
    seconds = VAE * _images(slot.vae.training) * slot.vae.width**2 * area
    return _resources(scale, 4 * 300 * slot.vae.width**2, seconds=seconds)


@_of_slot
def latents(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Encoding every image: mean and standard deviation of each element in float32."""
    assert slot.vae is not None
    images, items = IMAGES[slot.dataset.source], slot.items
    size = images * 8 * items.channels * items.resolution**2
    if not isinstance(slot.vae, PretrainedVae):
        return _resources(scale, size, seconds=5)
    flops = images * ENCODER_FLOPS * slot.dataset.resolution**2
    return _resources(scale, size, flops=flops, processes=slot.vae.engine.processes)


@_of_slot
def reconstruction(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Decoding and measuring as many images as an evaluation reports."""
    assert slot.vae is not None
    images = min(slot.evaluation.samples, IMAGES[slot.dataset.source])
    if scale.hardware is None:
        return _resources(scale, 1 * MB, seconds=5 + IMAGE * images)
    return _resources(scale, 1 * MB, flops=images * _image_flops(slot), processes=slot.evaluation.processes)


@_of_slot
def features(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training the feature network."""
    assert slot.features is not None
    return _resources(scale, 1 * MB, seconds=FEATURES * _images(slot.features.training))


@_of_slot
def reference(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Features of every image."""
    images = IMAGES[slot.dataset.source]
    flops = images * sum(EXTRACTOR_FLOPS.get(space, 0) for space in slot.evaluation.spaces)
    return _resources(scale, 4 * images * _dims(slot), flops=flops, seconds=5)


def _image_flops(slot: Slot) -> float:
    """Of decoding a sample and taking its features."""
    decoding = DECODER_FLOPS * slot.dataset.resolution**2 if slot.vae else 0.0
    return decoding + sum(EXTRACTOR_FLOPS.get(space, 0.0) for space in slot.evaluation.spaces)


def _dims(slot: Slot) -> int:
    """Features of one image in all spaces."""
    dims = {**DIMS, "classifier": slot.features.dim if slot.features else 0}
    return sum(dims[space] for space in slot.evaluation.spaces)


@_of_slot
def teacher(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training a teacher, or importing one, without a GPU: whether it fits is known before a student asks for some."""
    own = slot.sizes[axes["size"]]
    if own.imported:
        weights = 4 * own.network.weights(slot.items)
        return _resources(scale, weights + 1 * MB, seconds=IMPORT * weights)
    return _training(scale, slot, axes["size"], "teacher")


@_of_slot
def student(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Training a student."""
    return _training(scale, slot, axes["size"], axes["method"])


def _training(scale: Scale, slot: Slot, size: str, method: str) -> Resources:
    own = slot.sizes[size]
    training: Training = slot.teacher_for(size) if method == "teacher" else slot.student_for(size, method)
    weights = 4 * own.network.weights(slot.items)  # float32
    kept = training.snapshots
    widths, times = (len(kept.sigma_rel), training.iterations // kept.every) if kept else (0, 0)
    trained = 2 if "vsd" in getattr(training, "method", "") else 1  # F_φ beside the student
    state = weights * (3 * trained + 1 + widths)  # weights and two moments each; the averages
    need = _resources(
        scale,
        weights * (1 + widths * times) + 1 * MB,
        flops=training_flops(slot, size, method),
        scratch=KEPT * state,
        processes=own.engine.processes,
    )
    nodes = own.engine.nodes(scale.hardware.gpus_per_node if scale.hardware else None)
    return replace(need, nodes=nodes, tasks_per_node=own.engine.processes // nodes)


@_of_slot
def evaluate(scale: Scale, slot: Slot, axes: Mapping[str, str]) -> Resources:
    """Sampling the guidance sweep and the reported sets: those of scale 1 and of each feature space's best one."""
    plan, method = slot.evaluation, axes["method"]
    reported = plan.report_sets * plan.samples
    student = None if method == "teacher" else slot.student_for(axes["size"], method)
    guidable = slot.dataset.labels > 0 if student is None else student.guidance is not None
    unguided, guided, guided_scales = reported, 0, 0  # samples without guidance and with it, at so many selected scales
    if guidable:
        others = sum(scale != 1 for scale in plan.guidance)
        guided_scales = min(len(plan.spaces), others)
        unguided += plan.select_samples
        guided += others * plan.select_samples + guided_scales * reported
    training = student or slot.teacher_for(axes["size"])
    if training.snapshots:  # other averages are measured in full, earlier checkpoints on one set
        earlier = sum(n < training.iterations for n in plan.checkpoints) * plan.samples * training.snapshots.measured
        averages = 1 + sum(width != training.ema_sigma_rel for width in plan.averages)
        unguided, guided = averages * unguided + earlier, averages * guided + guided_scales * earlier
    if student is None:  # guidance costs a second pass
        passes, images = plan.teacher.nfe * (unguided + 2 * guided), unguided + guided
    else:
        passes, images = sum(student.steps) * (unguided + guided), len(student.steps) * (unguided + guided)
    flops = float(passes * slot.sizes[axes["size"]].network.flops(slot.items))
    scratch = 4 * plan.samples * _dims(slot)
    if scale.hardware is None:
        return _resources(scale, 1 * MB, flops=flops, seconds=IMAGE * images, scratch=scratch, processes=plan.processes)
    flops += images * _image_flops(slot)
    return _resources(scale, 1 * MB, flops=flops, scratch=scratch, processes=plan.processes)


def sampling(scale: Scale, flops: float, images: int, bytes: int) -> Resources:
    """Sampling so many images by one process."""
    return _resources(scale, bytes, flops=flops, seconds=IMAGE * images)


def report(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Writing a table."""
    return _resources(scale, 64 * 1024, seconds=1)


def figure2(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Samples of each class by every model that Table 2 shows."""
    slot = scale.slots[REPORT_SLOT]
    assert slot.figure2 is not None
    passes = 4 * slot.evaluation.teacher.steps + 6  # with guidance; two students with 1 and 2 steps
    work = sum(size.network.flops(slot.items) for size in slot.sizes.values())
    return _resources(scale, 1 * MB, flops=len(slot.figure2.labels) * passes * work, seconds=10)


def figure(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Drawing a figure."""
    return _resources(scale, 1 * MB, seconds=3)


def grids(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Samples with one and with two steps at three scales."""
    return _resources(scale, 3 * MB, seconds=20)


def figure4(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Training three embeddings from several seeds."""
    plan = scale.figure4
    assert plan is not None
    return _resources(scale, 1 * MB, seconds=5 + TOY * plan.width * plan.batch * 3 * plan.seeds * plan.iterations)


def figure3(scale: Scale, axes: Mapping[str, str]) -> Resources:
    """Training the students of the toy: from scratch, then one for each N and precision."""
    plan = scale.figure3
    assert plan is not None
    tuned = 4 + len(plan.intervals) + 2 * len(plan.half_intervals)
    iterations = 2 * plan.scratch.iterations + tuned * plan.tune.iterations
    return _resources(scale, 1 * MB, seconds=5 + TOY * plan.width * plan.batch * iterations)
