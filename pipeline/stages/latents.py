# SPDX-License-Identifier: Apache-2.0
"""Stage latents: encode every image once; keep mean and standard deviation, so that each epoch draws its own sample."""

import torch

from pipeline.context import Context
from pipeline.files import canonical, sha256_text
from pipeline.modelling import load_vae
from pipeline.params import PretrainedVae
from pipeline.provenance import meaning_of
from pipeline.ranks import RankDone, together
from scm_core.data import finish_latents, load_images, load_latents
from scm_core.data.encoding import encode_set

# what a latent depends on beside its image and the VAE
CODE = tuple(
    f"scm_core/{name}.py"
    for name in ("vae", "autoencoder_kl", "precision", "data/encoding", "data/latents", "data/images")
)


def run(ctx: Context) -> None:
    """Write the latents with their labels and the channel statistics that scale them to σ_d: those of the data, or given ones."""
    wanted = ctx.slot.vae
    assert wanted is not None  # the registry gives this stage to latent slots only
    images = load_images(ctx.inputs["dataset"])
    # Of another batch or other code the last digits may differ: what a killed job has left is gone on with under the same only.
    same = sha256_text(canonical([meaning_of(*CODE), wanted.engine.batch]))[:16]
    with together(ctx.job, wanted.engine.processes) as ranks:
        progress = ctx.progress(len(images), "img")
        writer = encode_set(
            load_vae(ctx.inputs["vae"]).to(ranks.device),
            images,
            ctx.work / f"latents-{same}",
            wanted.engine.batch,
            device=ranks.device,
            shard=(ranks.rank, ranks.count),
            progress=progress.update,
        )
        progress.close()
        ranks.wait()
        if not ranks.first:
            raise RankDone
    given = wanted.statistics if isinstance(wanted, PretrainedVae) and wanted.statistics != "measured" else None
    scaling = (torch.tensor(given.mean), torch.tensor(given.std)) if given else (None, None)
    finish_latents(writer, images.labels, ctx.slot.sigma_data, images.name, *scaling)
    writer.move(ctx.out)
    store = load_latents(ctx.out)
    for channel, (centre, spread) in enumerate(
        zip(store.channel_mean.tolist(), store.channel_std.tolist(), strict=True)
    ):
        ctx.tracker.log_metrics(0, {f"channel_{channel}_mean": centre, f"channel_{channel}_std": spread})
