# SPDX-License-Identifier: Apache-2.0
"""A small KL-regularised autoencoder (Kingma & Welling 2014) that turns 32×32 images into 8×8 latents."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scm_core.seeds import normal

DOWNSAMPLING = 4  # image side over latent side


class Autoencoder(Protocol):
    """What turns images into latents and back, here `VAE`, published ones `scm_core.autoencoder_kl.AutoencoderKL`."""

    channels: int
    latent_channels: int
    downsampling: int
    """Image side over latent side."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | x), (B, latent_channels, h, w), for images x (B, channels, H, W) in [−1, 1]."""

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, channels, H, W), nominally in [−1, 1], not clipped, of latents z (B, latent_channels, h, w)."""


def check_images(vae: Autoencoder, x: Tensor) -> None:
    """Raise `ValueError` unless x can be encoded: (B, channels, H, W), H and W multiples of the VAE's factor."""
    if x.ndim != 4 or x.shape[1] != vae.channels or x.shape[2] % vae.downsampling or x.shape[3] % vae.downsampling:
        raise ValueError(
            f"VAE: images must be (B, {vae.channels}, H, W) with H and W multiples of {vae.downsampling}, "
            f"got {tuple(x.shape)}"
        )


def check_latents(vae: Autoencoder, z: Tensor) -> None:
    """Raise `ValueError` unless z can be decoded: (B, latent_channels, h, w)."""
    if z.ndim != 4 or z.shape[1] != vae.latent_channels:
        raise ValueError(f"VAE: latents must be (B, {vae.latent_channels}, h, w), got {tuple(z.shape)}")


class VaeTerms(NamedTuple):
    """The VAE's loss and its parts, each a scalar tensor: `loss = mse + kl_weight · kl`."""

    loss: Tensor
    mse: Tensor
    kl: Tensor


class VAE(nn.Module):
    """Images (B, channels, H, W) in [−1, 1] ↔ latents (B, latent_channels, H/4, W/4); H and W multiples of 4.

    Made for a CPU: space-to-depth replaces convolutions at full resolution, and the decoder gets most of the work,
    since it decides how sharp a sample can be.
    """

    downsampling = DOWNSAMPLING

    def __init__(self, channels: int = 1, latent_channels: int = 4, width: int = 24) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("latent_channels", latent_channels), ("width", width)):
            if value < 1:
                raise ValueError(f"VAE: {name} must be ≥ 1, got {value}")
        self.channels, self.latent_channels, self.width = channels, latent_channels, width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(16 * channels, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | x), each (B, latent_channels, H/4, W/4), for images x in [−1, 1]."""
        check_images(self, x)
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, channels, 4h, 4w), nominally in [−1, 1], not clipped, of latents (B, latent_channels, h, w)."""
        check_latents(self, z)
        return self.decoder(z)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return (reconstruction, mean, logvar), z = mean + exp(logvar/2)·ε drawn from the posterior by `generator`."""
        mean, logvar = self.encode(x)
        eps = torch.randn_like(mean) if generator is None else normal(generator, *mean.shape, dtype=mean.dtype)
        return self.decode(mean + (logvar / 2).exp() * eps), mean, logvar


def vae_loss(x: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float) -> VaeTerms:
    """Return the β-VAE objective (Higgins et al. 2017) averaged over batch and elements: mse + kl_weight · KL.

    `mse` is the squared error per pixel, `kl` the KL(q(z | x) ‖ N(0, 1)) in nats per latent element.
    """
    if kl_weight < 0:
        raise ValueError(f"kl_weight must be ≥ 0, got {kl_weight}")
    mse = F.mse_loss(reconstruction, x)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return VaeTerms(loss=mse + kl_weight * kl, mse=mse, kl=kl)
