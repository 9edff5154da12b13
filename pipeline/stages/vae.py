# SPDX-License-Identifier: Apache-2.0
"""Stage vae: the autoencoder that gives the latents, trained here, or a published one, verified."""

import torch

from pipeline.context import Context
from pipeline.grids import save_grid
from pipeline.modelling import VAE_FILE, find_vae, image_data
from pipeline.params import PretrainedVae, Vae
from pipeline.training import run_training, train_settings
from scm_core.data import from_uint8, load_images, to_uint8
from scm_core.nn.build import build_network, save_model
from scm_core.objectives import Batch, Terms
from scm_core.seeds import derive_seed
from scm_core.vae import VAE, vae_loss


def run(ctx: Context) -> None:
    """Write the VAE's weights; of one that is trained also a picture of images above their reconstructions."""
    wanted = ctx.slot.vae
    assert wanted is not None  # the registry gives this stage to latent slots only
    if isinstance(wanted, PretrainedVae):
        # As a model file of this project, which later stages read without the folder that it comes from.
        net, config, info = find_vae(ctx.job.name, wanted, ctx.slot.dataset.channels)
        save_model(ctx.out / VAE_FILE, net.state_dict(), config, info)
    else:
        train(ctx, wanted)


def train(ctx: Context, wanted: Vae) -> None:
    """The weights, and a picture of images above their reconstructions."""
    seed = derive_seed(ctx.scale.seed, ctx.job.name)
    images = load_images(ctx.inputs["dataset"])
    config = {
        "architecture": "vae",
        "channels": ctx.slot.dataset.channels,
        "latent_channels": wanted.latent_channels,
        "width": wanted.width,
    }
    torch.manual_seed(derive_seed(seed, "init"))
    vae = build_network(config)
    assert isinstance(vae, VAE)
    settings = train_settings(wanted.training, seed)

    def objective(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        reconstruction, mean, logvar = vae(batch.x0, generator)
        terms = vae_loss(batch.x0, reconstruction, mean, logvar, wanted.kl_weight)
        return Terms(terms.loss, {"mse": terms.mse.detach(), "kl": terms.kl.detach()})

    state = run_training(ctx, settings, vae, objective, image_data(images, labelled=False))
    vae.cpu()
    save_model(ctx.out / VAE_FILE, vae.state_dict(), config, {"run": ctx.run_id, "iterations": state.iteration})

    originals = images.images[:20]
    with torch.no_grad():
        reconstructions = to_uint8(vae.decode(vae.encode(from_uint8(originals))[0]))
    save_grid(
        torch.cat([originals[:10], reconstructions[:10], originals[10:], reconstructions[10:]]),
        ctx.out / "samples.png",
        10,
    )
    ctx.tracker.log_artifact(ctx.out / "samples.png", "samples")
