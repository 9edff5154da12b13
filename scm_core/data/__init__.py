# SPDX-License-Identifier: Apache-2.0
"""Datasets: where images come from, how they and their latents are stored, and the order in which training sees them."""

from scm_core.data.images import from_uint8, load_images, save_images, to_uint8
from scm_core.data.latents import LatentStore, encode_images, latent_store, load_latents, save_latents
from scm_core.data.sampler import BatchOrder
from scm_core.data.sources import SOURCES, ImageSet, load_source, set_name

__all__ = [
    "SOURCES",
    "BatchOrder",
    "ImageSet",
    "LatentStore",
    "encode_images",
    "from_uint8",
    "latent_store",
    "load_images",
    "load_latents",
    "load_source",
    "save_images",
    "save_latents",
    "set_name",
    "to_uint8",
]
