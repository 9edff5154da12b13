# SPDX-License-Identifier: Apache-2.0
"""DINOv2 (Oquab et al. 2023) as FD-DINOv2 uses it (Stein et al. 2023, arXiv:2306.04675): pixels in, class token out."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from scm_core.compat import prepare_torchvision
from scm_core.evaluate.weights import fill, load_tensors

PATCH, RESOLUTION = 14, 224
# Of ImageNet's pixels in [0, 1], as torchvision documents them; DINOv2 was trained with these.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFSET = 0.1  # of a patch, by which DINOv2 scales its positional embedding too far; the features need the same


class VitSize(NamedTuple):
    """Width, number of blocks and attention heads of a vision transformer."""

    dim: int
    depth: int
    heads: int


VIT_L = VitSize(1024, 24, 16)


def resize_bicubic(images: Tensor, resolution: int = RESOLUTION) -> Tensor:
    """Return uint8 RGB images (B, 3, H, W) as uint8 (B, 3, resolution, resolution) on the CPU, resized by Pillow.

    Pillow's bicubic filter widens when it shrinks an image (antialiasing) and rounds to uint8 after each direction, and
    features move measurably with either: hence Pillow itself, not one of torch's interpolations.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def resize(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((resolution, resolution), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(max(1, min(len(pixels), len(os.sched_getaffinity(0))))) as pool:  # Pillow frees the GIL
        resized = np.stack(list(pool.map(resize, pixels)))
    return torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous()


def normalize(images: Tensor) -> Tensor:
    """Map uint8 RGB images (B, 3, H, W) to float32: (pixel/255 − mean)/std of each channel."""
    mean, std = (images.new_tensor(values, dtype=torch.float32)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def resample_positions(embedding: Tensor, grid: int) -> Tensor:
    """Resample a positional embedding (1, 1 + n², D), the class token's first, to (1, 1 + grid², D) as DINOv2 does.

    Bicubic without antialiasing, with the scale (grid + 0.1)/n in place of grid/n. `ValueError` if there is no n.
    """
    if embedding.ndim != 3 or math.isqrt(embedding.shape[1] - 1) ** 2 != embedding.shape[1] - 1:
        raise ValueError(f"positional embedding must be (1, 1 + n², D), got {tuple(embedding.shape)}")
    n = math.isqrt(embedding.shape[1] - 1)
    if n == grid:
        return embedding
    token, patches = embedding[:, :1].float(), embedding[:, 1:].float().unflatten(1, (n, n)).permute(0, 3, 1, 2)
    scale = (grid + OFFSET) / n
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_dinov2(path: str | Path, size: VitSize = VIT_L) -> nn.Module:
    """Return the network of a weights file, in eval mode: normalised images (B, 3, 224, 224) → class tokens (B, D).

    The class token is taken after the last norm. The file is the publisher's .pth, or timm's .safetensors, whose tensors
    have the same names. Raises `ValueError` for a file of another network.
    """
    prepare_torchvision()  # before timm, which imports torchvision
    import timm

    tensors = load_tensors(path)
    tensors.pop("mask_token", None)  # only training sees it
    if "pos_embed" in tensors:
        tensors["pos_embed"] = resample_positions(tensors["pos_embed"], RESOLUTION // PATCH)
    with torch.device("meta"):  # 1.2 GB that the file's tensors replace
        network: Any = timm.create_model(
            "vit_large_patch14_dinov2",
            pretrained=False,
            img_size=RESOLUTION,
            embed_dim=size.dim,
            depth=size.depth,
            num_heads=size.heads,
            num_classes=0,
            global_pool="token",
        )
    fill(network, tensors, path)
    for block in network.blocks:  # attention by its formula, as DINOv2 has it: no choice of a kernel enters
        block.attn.fused_attn = False
    return network.eval()
