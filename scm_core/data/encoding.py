# SPDX-License-Identifier: Apache-2.0
"""Encoding an image set into a store of latents, by any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from scm_core.data.images import ImageSet, from_uint8
from scm_core.data.latents import checked_std, latent_writer
from scm_core.data.writing import ShardWriter
from scm_core.disk import StoreError
from scm_core.precision import full_precision
from scm_core.vae import Autoencoder


def encode_set(
    vae: Autoencoder,
    images: ImageSet,
    folder: str | Path,
    batch: int,
    *,
    device: torch.device | str = "cpu",
    made_from: Mapping[str, object] | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] | None = None,
) -> ShardWriter:
    """Return the filled store in `folder` of the latent Gaussians of `images`, which `data.finish_latents` ends.

    `vae` lies on `device` and sees `batch` images at a time, in float32 as it is (no TF32). What a killed process has left is gone on
    with, others that call this at the same time share the work (`ShardWriter.fill`; `shard` is this one's rank and their number), and the
    bytes do not depend on either. Memory: a batch, and what the network needs for it.

    Raises `StoreError` for images that the autoencoder does not take, and for latents that are NaN or infinite, before they are written.
    """
    channels, height, width = images.shape
    factor = vae.downsampling
    if channels != vae.channels or height % factor or width % factor:
        raise StoreError(
            f"image set {images.name}: its images are {channels}×{height}×{width}, and the VAE takes {vae.channels} channels and "
            f"sides that are multiples of {factor}: use another VAE, or prepare the images for this one"
        )
    shape = (vae.latent_channels, height // factor, width // factor)
    writer = latent_writer(folder, len(images), shape, made_from)

    @torch.no_grad()
    def items(part: range) -> dict[str, np.ndarray]:
        x = from_uint8(images.images[part.start : part.stop].to(device))
        with full_precision(x.device):
            mean, logvar = vae.encode(x)
        try:
            std = checked_std(mean, logvar)
        except ValueError as error:
            raise StoreError(
                f"image set {images.name}, images {part.start}…{part.stop - 1}: {error}; check the VAE's weights"
            ) from error
        return {"mean": mean.contiguous().cpu().numpy(), "std": std.contiguous().cpu().numpy()}

    writer.fill(items, batch, shard=shard, progress=progress)
    return writer
