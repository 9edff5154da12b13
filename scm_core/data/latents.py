# SPDX-License-Identifier: Apache-2.0
"""The latents that latent-space models train on: one Gaussian per image, scaled to standard deviation σ_d."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scm_core.data.images import PART, from_uint8
from scm_core.data.shards import Field, Sharded, open_store
from scm_core.data.writing import ShardWriter
from scm_core.seeds import normal

KIND = "latents"


@dataclass(frozen=True)
class LatentStore:
    """Per-image latent Gaussians and the per-channel scaling to σ_d.

    `mean`, `std` (N, C, h, w) float32, in memory or mapped (`Sharded`); `labels` (N,) int64; `channel_mean`, `channel_std` (C,) float32;
    `sigma_data` > 0; `name` of the image set. `ValueError` if types or shapes disagree, or the scaling is not finite and positive. The
    values of `mean` and `std`, which may be larger than memory, are not looked at: `checked_std` does, when they are made.
    """

    mean: Tensor | Sharded
    std: Tensor | Sharded
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
    mean: Tensor | Sharded,
    std: Tensor | Sharded,
    labels: Tensor,
    sigma_data: float,
    name: str,
    channel_mean: Tensor | None = None,
    channel_std: Tensor | None = None,
) -> LatentStore:
    """Build a `LatentStore`, with the given channel scaling or with the one measured over the set (`ChannelMoments`)."""
    parts: Iterable[tuple[Tensor, Tensor]]
    if isinstance(mean, Tensor) and isinstance(std, Tensor):
        parts = [(mean, std)]
    else:
        parts = zip(mean.split(PART), std.split(PART), strict=True)
    scaling = _scaling(parts, channel_mean, channel_std)
    return LatentStore(mean, std, labels, *scaling, float(sigma_data), name)


def _scaling(
    parts: Iterable[tuple[Tensor, Tensor]], channel_mean: Tensor | None, channel_std: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The channels' mean and standard deviation (C,) float32: the given ones, or those of latents whose mean and std come in `parts`."""
    if (channel_mean is None) != (channel_std is None):
        raise ValueError("channel_mean and channel_std must be given both or neither")
    if channel_mean is None or channel_std is None:
        moments = ChannelMoments()
        for mean, std in parts:
            moments.update(mean, std)
        channel_mean, channel_std = moments.mean, moments.std
    return channel_mean.float(), channel_std.float()


class ChannelMoments:
    """The channel scaling of latent Gaussians, gathered part by part in float64.

    The channel's mean over images and positions, and by the law of total variance channel_std² = Var(mean) + E[std²], so that x0 with its
    sampling noise has standard deviation σ_d. Parts are merged by the formula for pooled variances.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self._between = self._within = torch.zeros(0, dtype=torch.float64)

    def update(self, mean: Tensor, std: Tensor) -> None:
        """Add latents (B, C, h, w)."""
        wide = mean.double()
        count, centre = wide.numel() // wide.shape[1], wide.mean(dim=(0, 2, 3))
        between = wide.var(dim=(0, 2, 3), correction=0)
        within = std.double().square().mean(dim=(0, 2, 3))
        if not self.count:
            self.count, self.mean, self._between, self._within = count, centre, between, within
            return
        total = self.count + count
        share, shift = count / total, centre - self.mean
        self._between = self._between + (between - self._between) * share + shift.square() * share * (1 - share)
        self._within = self._within + (within - self._within) * share
        self.count, self.mean = total, self.mean + shift * share

    @property
    def std(self) -> Tensor:
        """(C,) float64."""
        return (self._between + self._within).sqrt()


def checked_std(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return std = e^(logvar/2) of an encoder's output; `ValueError` if one of the three holds NaN or an infinity."""
    std = (logvar / 2).exp()
    if not bool(torch.isfinite(mean).all() and torch.isfinite(logvar).all() and torch.isfinite(std).all()):
        raise ValueError("the encoder returned NaN or infinite latents")
    return std


@torch.no_grad()
def encode_images(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor | Sharded, batch: int = 500
) -> tuple[Tensor, Tensor]:
    """Return (mean, std), each (N, C, h, w), of `encode(x) -> (mean, logvar)` over uint8 images (N, C, H, W), `batch`
    at a time. `ValueError` if the encoder gives NaN, an infinity, or a log-variance whose std overflows.
    """
    if batch < 1:
        raise ValueError(f"batch must be ≥ 1, got {batch}")
    parts = [encode(from_uint8(chunk)) for chunk in images.split(batch)]
    mean = torch.cat([part[0] for part in parts]).contiguous()
    logvar = torch.cat([part[1] for part in parts]).contiguous()
    return mean, checked_std(mean, logvar)


def latent_writer(
    folder: str | Path, count: int, shape: tuple[int, int, int], made_from: Mapping[str, object] | None = None
) -> ShardWriter:
    """The store in `folder` of `count` latents (C, h, w), to be filled with `mean` and `std` float32; `finish_latents` ends it."""
    fields = {"mean": Field("float32", shape), "std": Field("float32", shape)}
    return ShardWriter(folder, KIND, fields, count, made_from)


def finish_latents(
    writer: ShardWriter,
    labels: Tensor,
    sigma_data: float,
    name: str,
    channel_mean: Tensor | None = None,
    channel_std: Tensor | None = None,
) -> None:
    """Publish a filled store of latents with `labels` (N,) int64 and the given channel scaling, or the one measured over its shards."""
    parts = ((torch.from_numpy(shard["mean"]), torch.from_numpy(shard["std"])) for shard in writer.shard_arrays())
    mean, std = _scaling(parts, channel_mean, channel_std)
    small = {"channel_mean": mean, "channel_std": std, "labels": labels}
    writer.finish({key: value.numpy() for key, value in small.items()}, {"name": name, "sigma_data": float(sigma_data)})


def save_latents(store: LatentStore, folder: str | Path) -> None:
    """Write a latent store to `folder`: mean-00000.npy, std-00000.npy, … (N, C, h, w), three small arrays, index.json."""
    writer = latent_writer(folder, len(store), store.shape)

    def items(part: range) -> dict[str, np.ndarray]:
        return {key: getattr(store, key)[part.start : part.stop].numpy() for key in ("mean", "std")}

    writer.fill(items, PART)
    finish_latents(writer, store.labels, store.sigma_data, store.name, store.channel_mean, store.channel_std)


def load_latents(folder: str | Path, verify: bool = False) -> LatentStore:
    """Return the latent store in `folder`, mean and std mapped into memory; raises and verifies as `open_store`."""
    fields, arrays, meta = open_store(folder, KIND, verify)
    names = ({"mean", "std"}, {"labels", "channel_mean", "channel_std"}, {"name", "sigma_data"})
    there = (set(fields), set(arrays), set(meta))
    missing = sorted(set.union(*(need - have for need, have in zip(names, there, strict=True))))
    if missing:
        raise ValueError(f"{folder}: its index.json is incomplete for latents (missing {missing}): make it again")
    labels, channel_mean, channel_std = (
        torch.from_numpy(arrays[key]) for key in ("labels", "channel_mean", "channel_std")
    )
    return LatentStore(
        fields["mean"], fields["std"], labels, channel_mean, channel_std, meta["sigma_data"], meta["name"]
    )
