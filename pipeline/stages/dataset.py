# SPDX-License-Identifier: Apache-2.0
"""Stage dataset: read the source's images, check and store them."""

from pipeline.context import Context
from scm_core.data import load_source, save_images


def run(ctx: Context) -> None:
    """Write the image set (uint8 arrays, labels, index with digests)."""
    wanted = ctx.slot.dataset
    images = load_source(wanted.source, wanted.resolution)
    save_images(images, ctx.out)
    ctx.tracker.log_metrics(0, {"images": float(len(images))})
