# SPDX-License-Identifier: Apache-2.0
"""Stage latents: encode every image once; keep mean and standard deviation, so that each epoch draws its own sample."""

from pipeline.context import Context
from pipeline.modelling import load_vae
from scm_core.data import encode_images, latent_store, load_images, save_latents


def run(ctx: Context) -> None:
    """Write the latents with their labels and the channel statistics that scale them to σ_d."""
    images = load_images(ctx.inputs["dataset"])
    mean, std = encode_images(load_vae(ctx.inputs["vae"]).encode, images.images)
    store = latent_store(mean, std, images.labels, ctx.slot.sigma_data, images.name)
    save_latents(store, ctx.out)
    for channel, (centre, spread) in enumerate(
        zip(store.channel_mean.tolist(), store.channel_std.tolist(), strict=True)
    ):
        ctx.tracker.log_metrics(0, {f"channel_{channel}_mean": centre, f"channel_{channel}_std": spread})
