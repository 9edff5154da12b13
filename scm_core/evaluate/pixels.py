# SPDX-License-Identifier: Apache-2.0
"""The uint8 RGB pixels that feature extractors take."""

import torch
from torch import Tensor


def to_rgb(images: Tensor) -> Tensor:
    """Repeat the channel of greyscale uint8 images (B, 1, H, W) three times, leave RGB ones; `ValueError` for anything
    else.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 pixels 0…255 of shape (B, 1 or 3, H, W), got {images.dtype} of shape "
            f"{tuple(images.shape)}: turn floats in [-1, 1] into pixels with scm_core.data.to_uint8"
        )
    return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images


def checked_rgb(images: Tensor) -> Tensor:
    """The images, if they are uint8 RGB (B, 3, H, W); `ValueError` for anything else."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return to_rgb(images)
