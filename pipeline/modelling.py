# SPDX-License-Identifier: Apache-2.0
"""What the training and evaluating stages share: data, decoder, names of model files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import paths
from pipeline.context import Context
from pipeline.errors import PipelineError
from pipeline.files import sha256_file
from pipeline.params import PretrainedVae, Slot
from scm_core.autoencoder_kl import KNOWN, AutoencoderKL, Pretrained, load_pretrained
from scm_core.data import BatchOrder, ImageSet, from_uint8, load_images, load_latents, to_uint8
from scm_core.nn.build import load_model
from scm_core.objectives import Batch
from scm_core.precision import full_precision
from scm_core.seeds import Shard, derive_seed
from scm_core.train.distributed import SINGLE, Ranks
from scm_core.train.state import TrainSettings
from scm_core.vae import VAE
from scm_core.validate import check_labels

MODEL = "model.safetensors"  # in the output of teacher and student
VAE_FILE = "vae.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"


@dataclass(frozen=True)
class Data:
    """What a network trains on: `x0(indices, generator)` scaled to σ_d, labels (count,) or None, and the shape of one item."""

    x0: Callable[[Tensor, torch.Generator], Tensor]
    labels: Tensor | None
    count: int
    shape: tuple[int, int, int]

    def batches(self, settings: TrainSettings, ranks: Ranks = SINGLE) -> Callable[[int], Batch]:
        """This process's part of the batch of each iteration, a function of (seed, iteration) alone."""
        total, seed = settings.batch, settings.seed
        order = BatchOrder(self.count, total, seed)

        def at(iteration: int) -> Batch:
            start, count = ranks.share(total)
            indices = order.indices(iteration)[start : start + count]
            generator = Shard(derive_seed(seed, "data", iteration), total, start, count)
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
        check_labels(data.labels, ctx.slot.dataset.labels)  # here once, where the wrong one can be named on any device
    return data


def image_data(images: ImageSet, labelled: bool) -> Data:
    """Images in [−1, 1], with their labels if asked for."""
    pixels = images.images
    labels = images.labels if labelled else None
    return Data(lambda index, _: from_uint8(pixels[index]), labels, len(images), images.shape)


class Decoder:
    """x0 of a network to uint8 images: through the VAE among a job's inputs for latents, as many at once as the slot says; by rounding for
    pixels."""

    def __init__(self, slot: Slot, inputs: Mapping[str, Path], device: torch.device | None = None) -> None:
        self.vae = load_vae(inputs["vae"]).to(device or "cpu") if slot.vae else None
        self.store = load_latents(inputs["latents"]) if slot.vae else None
        self.batch = slot.vae.engine.batch if slot.vae else 0
        self.facts: dict[str, Any] = {}  # what it depends on, as JSON values
        if self.store is not None:
            scaling = {key: getattr(self.store, key).tolist() for key in ("channel_mean", "channel_std")}
            self.facts = {"vae": sha256_file(inputs["vae"] / VAE_FILE), "batch": self.batch, **scaling}

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> Tensor:
        if self.vae is None or self.store is None:
            return to_uint8(x0)
        latents = self.store.decode_scale(x0)
        with full_precision(latents.device):
            return torch.cat([to_uint8(self.vae.decode(part)) for part in latents.split(self.batch)])


def load_vae(folder: Path) -> VAE | AutoencoderKL:
    """The autoencoder of stage vae, in evaluation mode."""
    model = load_model(folder / VAE_FILE)
    assert isinstance(model.net, VAE | AutoencoderKL)
    return model.net


def find_vae(name: str, wanted: PretrainedVae, channels: int) -> Pretrained:
    """A published autoencoder, verified, or `PipelineError` of the job `name`; images have `channels`."""
    source = wanted.pretrained if wanted.pretrained in KNOWN else paths.root() / wanted.pretrained
    try:
        found = load_pretrained(source, wanted.sha256, unit_images=wanted.unit_images)
    except (FileNotFoundError, ValueError) as error:
        raise PipelineError(f"{name}: {error}") from error
    for key, said in wanted.sizes(channels)._asdict().items():
        if (size := getattr(found.net, key)) != said:
            section = "dataset" if key == "channels" else "vae"
            raise PipelineError(
                f"{name}: {section}.{key} is {said} in params.yaml, and the VAE {wanted.pretrained} has {size}: change it, or use another "
                "VAE"
            )
    return found
