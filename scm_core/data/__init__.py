# SPDX-License-Identifier: Apache-2.0
"""Datasets: where images come from, how they and their latents are stored, and the order in which training sees them."""

from scm_core.data.images import (
    ImageSet,
    finish_images,
    from_uint8,
    image_writer,
    load_images,
    save_images,
    to_uint8,
)
from scm_core.data.latents import (
    LatentStore,
    checked_std,
    encode_images,
    finish_latents,
    latent_store,
    latent_writer,
    load_latents,
    save_latents,
)
from scm_core.data.sampler import BatchOrder
from scm_core.data.shards import Sharded
from scm_core.data.sources import SOURCES, Wanted, load_source, open_source, set_name, store_images, store_source
from scm_core.data.writing import ShardWriter

__all__ = [
    "SOURCES",
    "BatchOrder",
    "ImageSet",
    "LatentStore",
    "ShardWriter",
    "Sharded",
    "Wanted",
    "checked_std",
    "encode_images",
    "finish_images",
    "finish_latents",
    "from_uint8",
    "image_writer",
    "latent_store",
    "latent_writer",
    "load_images",
    "load_latents",
    "load_source",
    "open_source",
    "save_images",
    "save_latents",
    "set_name",
    "store_images",
    "store_source",
    "to_uint8",
]
