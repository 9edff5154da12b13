# SPDX-License-Identifier: Apache-2.0
"""Where images come from: sets that ship inside Python packages, CIFAR-10, ImageNet, and any folder or ZIP of images."""

from scm_core.data.sources.listing import BrokenImagesError, Source
from scm_core.data.sources.named import SOURCES, Wanted, open_source, set_name, store_images
from scm_core.data.sources.reading import store_source
from scm_core.data.sources.shipped import load_source

__all__ = [
    "SOURCES",
    "BrokenImagesError",
    "Source",
    "Wanted",
    "load_source",
    "open_source",
    "set_name",
    "store_images",
    "store_source",
]
