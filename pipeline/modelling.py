# SPDX-License-Identifier: Apache-2.0
"""What the training and evaluating stages share: data, decoder, training with its log, model files, sample grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.context import Context
from pipeline.grids import save_grid
from pipeline.params import BasicTraining, Decay, Training
from scm_core.data import BatchOrder, ImageSet, from_uint8, load_images, load_latents, to_uint8
from scm_core.nn.build import build_network, load_model, save_model
from scm_core.objectives import Batch, Companion, Objective
from scm_core.seeds import derive_seed, generator_for, sample_noise
from scm_core.train.checkpoint import CheckpointStore
from scm_core.train.loop import Hooks, train
from scm_core.train.schedule import Schedule
from scm_core.train.state import TrainSettings, TrainState
from scm_core.vae import VAE
from scm_core.validate import check_labels

MODEL = "model.safetensors"  # in the output of teacher and student
VAE_FILE = "vae.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
GRID_ROWS = 4


@dataclass(frozen=True)
class Data:
    """What a network trains on: `x0(indices, generator)` scaled to σ_d, labels (count,) or None, and the shape of one item."""

    x0: Callable[[Tensor, torch.Generator], Tensor]
    labels: Tensor | None
    count: int
    shape: tuple[int, int, int]

    def batches(self, batch: int, seed: int) -> Callable[[int], Batch]:
        """The batch of each iteration, a function of (seed, iteration) alone."""
        order = BatchOrder(self.count, batch, seed)

        def at(iteration: int) -> Batch:
            indices = order.indices(iteration)
            generator = generator_for(seed, "data", iteration)
            labels = None if self.labels is None else self.labels[indices]
            return Batch(self.x0(indices, generator), labels, indices)

        return at


def load_data(ctx: Context) -> Data:
    """Latents (resampled from their posterior at every use), or the images of a pixel slot in [−1, 1]."""
    labelled = bool(ctx.slot.dataset.labels)  # a slot may hide the labels of its data: unconditional models
    if "latents" in ctx.inputs:
        store = load_latents(ctx.inputs["latents"])
        data = Data(store.sample, store.labels if labelled else None, len(store), store.shape)
    else:
        data = image_data(load_images(ctx.inputs["dataset"]), labelled)
    if data.labels is not None:
        check_labels(
            data.labels, ctx.slot.dataset.labels
        )  # here once; a network takes what it does not know for "no label"
    return data


def image_data(images: ImageSet, labelled: bool) -> Data:
    """Images in [−1, 1], with their labels if asked for."""
    pixels = images.images
    shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    return Data(lambda index, _: from_uint8(pixels[index]), images.labels if labelled else None, len(images), shape)


def load_decoder(inputs: Mapping[str, Path]) -> Callable[[Tensor], Tensor]:
    """x0 of a network to uint8 images: through the VAE among a job's inputs for latents, by rounding for pixels."""
    if "vae" not in inputs:
        return to_uint8
    vae, store = load_vae(inputs["vae"]), load_latents(inputs["latents"])

    @torch.no_grad()
    def decode(x0: Tensor) -> Tensor:
        return to_uint8(vae.decode(store.decode_scale(x0)))

    return decode


def load_vae(folder: Path) -> VAE:
    """The trained VAE in evaluation mode."""
    model = load_model(folder / VAE_FILE)
    assert isinstance(model.net, VAE)
    return model.net


def schedule(training: BasicTraining | Training) -> Schedule:
    """The learning-rate schedule that params.yaml describes; an auxiliary network's rate falls linearly to 0."""
    if isinstance(training, BasicTraining):
        return Schedule("linear", start=0.0, final=0.0)
    decay: Decay = training.decay
    return Schedule(ramp_up=training.ramp_up, **decay.model_dump())


def train_settings(training: BasicTraining | Training, seed: int) -> TrainSettings:
    """The library's settings from a section of params.yaml."""
    extra: dict[str, Any] = {}
    if isinstance(training, Training):
        extra = {
            "betas": training.betas,
            "eps": training.eps,
            "head_lr": training.logvar_lr,
            "ema_sigma_rel": training.ema_sigma_rel,
            "sample_every": training.sample_every,
        }
    return TrainSettings(
        iterations=training.iterations,
        batch=training.batch,
        lr=training.lr,
        seed=seed,
        schedule=schedule(training),
        log_every=training.log_every,
        checkpoint_every=training.checkpoint_every,
        **extra,
    )


def run_training(
    ctx: Context,
    settings: TrainSettings,
    net: nn.Module,
    heads: Mapping[str, nn.Module],
    objective: Objective,
    data: Callable[[int], Batch],
    sample: Callable[[TrainState], None] = lambda state: None,
    companions: Mapping[str, Companion] | None = None,
) -> TrainState:
    """Train with checkpoints in the job's working folder, metrics to the tracker by images seen, and a progress display.

    Companions train with the same settings, but without an average.
    """
    companions = companions or {}
    progress = ctx.progress(settings.iterations, "it")
    shown = ("loss", "tangent_norm", "images_per_second")
    hooks = Hooks(
        start=progress.start,
        log=lambda nimg, scalars: ctx.tracker.log_metrics(nimg, scalars),
        progress=lambda done, scalars: progress.update(done, **{key: scalars[key] for key in shown if key in scalars}),
        sample=sample,
    )
    beside = {}
    for name, other in companions.items():
        own = replace(settings, seed=derive_seed(settings.seed, name), ema_sigma_rel=None)  # noise of its own
        beside[name] = TrainState(other.net, own, other.heads)
    state = TrainState(net, settings, heads, beside)
    objectives = {name: other.objective for name, other in companions.items()}
    train(state, objective, data, CheckpointStore(ctx.work / "checkpoints"), hooks, objectives)
    progress.close()
    return state


def grid_sampler(
    ctx: Context, config: Mapping[str, Any], data: Data, generate: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> Callable[[TrainState], None]:
    """A hook that draws the averaged network's samples of every class from fixed unit noise, into samples.png and the tracker."""
    decode = load_decoder(ctx.inputs)
    columns = config["labels"] or 10
    labels = torch.arange(columns).repeat(GRID_ROWS)
    noise = sample_noise(range(len(labels)), data.shape, "grid")

    def sample(state: TrainState) -> None:
        net = build_network(config).eval()
        net.load_state_dict(state.averaged(), strict=False)
        path = ctx.out / "samples.png"
        save_grid(decode(generate(net, noise, labels)), path, columns)
        named = ctx.work / f"samples-{state.nimg:09d}.png"
        named.write_bytes(path.read_bytes())
        ctx.tracker.log_artifact(named, "samples")

    return sample


def save_average(ctx: Context, state: TrainState, config: Mapping[str, Any], **info: Any) -> None:
    """Write the averaged network, the result of a training stage."""
    facts = {
        "run": ctx.run_id,
        "iterations": state.iteration,
        "nimg": state.nimg,
        "skipped_steps": state.skipped,
        **info,
    }
    save_model(ctx.out / MODEL, state.averaged(), config, facts)
