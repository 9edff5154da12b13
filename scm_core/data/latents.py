# SPDX-License-Identifier: Apache-2.0
"""The latents that latent-space models train on: one Gaussian per image, scaled to standard deviation σ_d."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scm_core.data.arrays import load_arrays, save_arrays
from scm_core.data.images import from_uint8
from scm_core.seeds import normal

KIND = "latents"


@dataclass(frozen=True)
class LatentStore:
    """Per-image latent Gaussians and the per-channel scaling to σ_d.

    `mean`, `std` (N, C, h, w) float32; `labels` (N,) int64; `channel_mean`, `channel_std` (C,) float32;
    `sigma_data` > 0; `name` of the image set. `ValueError` if types or shapes disagree, or the scaling is not finite and positive. The
    values of `mean` and `std`, which may be larger than memory, are not looked at: `encode_images` checks what it makes.
    """

    mean: Tensor
    std: Tensor
    labels: Tensor
    channel_mean: Tensor
    channel_std: Tensor
    sigma_data: float
    name: str

    def __post_init__(self) -> None:
        if self.mean.ndim != 4 or self.std.shape != self.mean.shape or self.labels.shape != self.mean.shape[:1]:
            raise ValueError(
                f"latents {self.name}: mean, std (N, C, h, w) and labels (N,) disagree: "
                f"{tuple(self.mean.shape)}, {tuple(self.std.shape)}, {tuple(self.labels.shape)}"
            )
        for key in ("mean", "std", "labels", "channel_mean", "channel_std"):
            expected, found = torch.int64 if key == "labels" else torch.float32, getattr(self, key).dtype
            if found != expected:
                raise ValueError(f"latents {self.name}: {key} must be {expected}, got {found}")
        channels = self.mean.shape[1:2]
        if self.channel_mean.shape != channels or self.channel_std.shape != channels:
            raise ValueError(f"latents {self.name}: channel_mean and channel_std must have shape {tuple(channels)}")
        if not bool((torch.isfinite(self.channel_std) & (self.channel_std > 0)).all()):
            raise ValueError(
                f"latents {self.name}: channel_std must be finite and > 0, got {self.channel_std.tolist()}"
            )
        if not bool(torch.isfinite(self.channel_mean).all()):
            raise ValueError(f"latents {self.name}: channel_mean must be finite, got {self.channel_mean.tolist()}")
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"latents {self.name}: sigma_data must be finite and > 0, got {self.sigma_data}")

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        channels, height, width = self.mean.shape[1:]
        return channels, height, width

    def sample(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return x0 (B, C, h, w) of the images `index` (B,): x0 = (mean + std·ε − channel_mean)·σ_d/channel_std, ε from
        `generator`.
        """
        mean, std = self.mean[index], self.std[index]
        eps = torch.randn_like(mean) if generator is None else normal(generator, *mean.shape, dtype=mean.dtype)
        return self.scale(mean + std * eps)

    def scale(self, latents: Tensor) -> Tensor:
        """Return x0 = (latents − channel_mean)·σ_d/channel_std for autoencoder latents (B, C, h, w)."""
        shift, factor = self._affine(latents)
        return (latents - shift) / factor

    def decode_scale(self, x0: Tensor) -> Tensor:
        """Return the autoencoder's latents x0·channel_std/σ_d + channel_mean for x0 (B, C, h, w): the inverse of
        `scale`.
        """
        shift, factor = self._affine(x0)
        return x0 * factor + shift

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shift = self.channel_mean.to(like)[:, None, None]
        return shift, (self.channel_std.to(like) / self.sigma_data)[:, None, None]


def latent_store(
    mean: Tensor,
    std: Tensor,
    labels: Tensor,
    sigma_data: float,
    name: str,
    channel_mean: Tensor | None = None,
    channel_std: Tensor | None = None,
) -> LatentStore:
    """Build a `LatentStore`, with the given channel scaling or with the one measured over the set.

    Measured: the channel's mean over images and positions, and by the law of total variance
    channel_std² = Var(mean) + E[std²], so that x0 with its sampling noise has standard deviation σ_d.
    """
    if (channel_mean is None) != (channel_std is None):
        raise ValueError("channel_mean and channel_std must be given both or neither")
    if channel_mean is None or channel_std is None:
        wide = mean.double()
        channel_mean = wide.mean(dim=(0, 2, 3))
        variance = wide.var(dim=(0, 2, 3), correction=0) + std.double().square().mean(dim=(0, 2, 3))
        channel_std = variance.sqrt()
    return LatentStore(mean, std, labels, channel_mean.float(), channel_std.float(), float(sigma_data), name)


@torch.no_grad()
def encode_images(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, batch: int = 500
) -> tuple[Tensor, Tensor]:
    """Return (mean, std), each (N, C, h, w), of `encode(x) -> (mean, logvar)` over uint8 images (N, C, H, W), `batch`
    at a time. `ValueError` if the encoder gives NaN, an infinity, or a log-variance whose std overflows.
    """
    if batch < 1:
        raise ValueError(f"batch must be ≥ 1, got {batch}")
    parts = [encode(from_uint8(chunk)) for chunk in images.split(batch)]
    mean = torch.cat([part[0] for part in parts]).contiguous()
    logvar = torch.cat([part[1] for part in parts]).contiguous()
    std = (logvar / 2).exp()
    if not bool(torch.isfinite(mean).all() and torch.isfinite(logvar).all() and torch.isfinite(std).all()):
        raise ValueError("the encoder returned NaN or infinite latents")
    return mean, std


def save_latents(store: LatentStore, folder: str | Path) -> None:
    """Write a latent store to `folder` as .npy arrays with index.json."""
    arrays = {name: getattr(store, name).numpy() for name in ("mean", "std", "labels", "channel_mean", "channel_std")}
    save_arrays(folder, KIND, arrays, {"name": store.name, "sigma_data": store.sigma_data})


def load_latents(folder: str | Path, verify: bool = True) -> LatentStore:
    """Return the latent store in `folder`, memory-mapped; raises as `load_arrays` for missing, truncated or corrupt
    files.
    """
    arrays, meta = load_arrays(folder, KIND, verify)
    missing = {"mean", "std", "labels", "channel_mean", "channel_std"} - set(arrays)
    if missing or not {"name", "sigma_data"} <= set(meta):
        raise ValueError(
            f"{folder}: its index.json is incomplete for latents (missing {sorted(missing)}): make it again"
        )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return LatentStore(**tensors, sigma_data=meta["sigma_data"], name=meta["name"])
