# SPDX-License-Identifier: Apache-2.0
"""The autoencoder that the latents are of, as a model of diffusers with the interface of its AutoencoderKL's decoder."""

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from scm_core.vae import VAE as Network


class SCMAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own way
    """`decode(z).sample` are images in [−1, 1] of latents z; `arguments` are those of the network."""

    @register_to_config
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.network = Network(**arguments)

    def decode(self, z: Tensor) -> DecoderOutput:
        """Images (B, channels, H, W) of latents (B, latent_channels, h, w)."""
        return DecoderOutput(sample=self.network.decode(z))
