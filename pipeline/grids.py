# SPDX-License-Identifier: Apache-2.0
"""Grids of sample images as PNG files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """uint8 images (N, C, H, W), N a multiple of `columns`, as one picture (H', W', C), row by row, on white."""
    count, channels, height, width = images.shape
    if count % columns:
        raise ValueError(f"images: expected a multiple of {columns} columns, got {count}")
    rows = count // columns
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return canvas


def save_grid(images: Tensor, path: Path, columns: int, zoom: int = 2) -> None:
    """Write the tiled images, enlarged without smoothing."""
    canvas = tile(images, columns).numpy()
    picture = Image.fromarray(canvas[:, :, 0] if canvas.shape[2] == 1 else canvas)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)
