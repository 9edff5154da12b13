# SPDX-License-Identifier: Apache-2.0
"""The section `vae` of a latent slot in params.yaml: an autoencoder that is trained here, or a published one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Strict, Tag, model_validator

from pipeline.sections import BasicTraining, Count, Model, NonNegative, Positive, problem


class Sizes(NamedTuple):
    """What of an autoencoder the rest of a slot depends on: channels of images and latents, image side over latent side."""

    channels: int
    latent_channels: int
    downsampling: int


# Those of scm_core.autoencoder_kl.KNOWN, known here without torch.
PUBLISHED: Mapping[str, Sizes] = MappingProxyType({"sd-vae-ft-mse": Sizes(3, 4, 8)})


class CodingEngine(Model):
    """How images go through an autoencoder, as far as it changes rounding at most: not a part of what latents are known by."""

    processes: Count = 1
    """Processes that share the encoding, one for each GPU."""
    batch: Count = 500
    """Images that are encoded or decoded at once by each."""


class Vae(Model):
    latent_channels: Count
    width: Count
    """Channels of the first level."""
    kl_weight: NonNegative
    """Weight of the KL term beside the mean squared error."""
    training: BasicTraining
    engine: CodingEngine = CodingEngine()

    def sizes(self, channels: int) -> Sizes:
        """Those of scm_core.vae.VAE for images of `channels`: it halves each side twice."""
        return Sizes(channels, self.latent_channels, 4)


class ChannelStatistics(Model):
    """Mean and standard deviation of each latent channel over the data, of latents as the autoencoder gives them."""

    mean: Annotated[tuple[float, ...], Strict(False), Field(min_length=1)]
    std: Annotated[tuple[Positive, ...], Strict(False), Field(min_length=1)]


MEASURED, GIVEN = "[measured]", "[given]"
Statistics = Annotated[
    Annotated[Literal["measured"], Tag(MEASURED)] | Annotated[ChannelStatistics, Tag(GIVEN)],
    Discriminator(lambda value: MEASURED if isinstance(value, str) else GIVEN),
]


class PretrainedVae(Model):
    """An autoencoder of diffusers' class AutoencoderKL, not trained here."""

    pretrained: Annotated[str, Field(min_length=1)]
    """sd-vae-ft-mse, or a folder with config.json and diffusion_pytorch_model.safetensors."""
    sha256: str | None = None
    """Of the folder's weights file; that of a published one is known."""
    latent_channels: Count | None = None
    """Channels of its latents; known of a published one."""
    downsampling: Count | None = None
    """Image side over latent side, 2^(levels − 1); known of a published one."""
    unit_images: bool = False
    """Whether it is shown images in [0, 1] instead of [−1, 1], as EDM2 does: for latents of a teacher of EDM2's."""
    statistics: Statistics
    """What latents are scaled by to sigma_data: the statistics of the encoded data, or given ones."""
    engine: CodingEngine = CodingEngine()

    @model_validator(mode="after")
    def _complete(self) -> PretrainedVae:
        known = PUBLISHED.get(self.pretrained)
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise problem(
                "sha256", f"must be 64 hex digits (sha256sum {self.pretrained}/*.safetensors), got {self.sha256}"
            )
        for name in ("sha256", "latent_channels", "downsampling"):
            given = getattr(self, name)
            if known is None and given is None:
                what = (
                    f"must be given for a folder of your own ({self.pretrained}); known by name: {', '.join(PUBLISHED)}"
                )
                raise problem(name, what)
            if known is not None and given not in (None, getattr(known, name, None)):
                what = f"is {getattr(known, name)}" if hasattr(known, name) else "is known"
                raise problem(name, f"must be left out, as that of {self.pretrained} {what}, got {given}")
        found = self.sizes(0).latent_channels
        if isinstance(self.statistics, ChannelStatistics):
            for name, values in self.statistics:
                if len(values) != found:
                    raise problem(
                        f"statistics.{name}",
                        f"must have {found} numbers, one for each latent channel, got {len(values)}",
                    )
        return self

    def sizes(self, channels: int) -> Sizes:
        """Its own; a folder's are checked against its config.json when it is read, `channels` of images among them."""
        if known := PUBLISHED.get(self.pretrained):
            return known
        assert self.latent_channels is not None  # see _complete
        assert self.downsampling is not None
        return Sizes(channels, self.latent_channels, self.downsampling)


def _kind(value: Any) -> str:
    pretrained = "pretrained" in value if isinstance(value, Mapping) else isinstance(value, PretrainedVae)
    return PRETRAINED if pretrained else TRAINED


TRAINED, PRETRAINED = "[trained]", "[pretrained]"
TAGS = {TRAINED, PRETRAINED, MEASURED, GIVEN}  # pydantic names them where an error is; they are no keys of the file
AnyVae = Annotated[Annotated[Vae, Tag(TRAINED)] | Annotated[PretrainedVae, Tag(PRETRAINED)], Discriminator(_kind)]


def described_by(vae: Vae | PretrainedVae) -> tuple[str, ...]:
    """The keys of the section that the autoencoder itself depends on, of those that are given."""
    return tuple(name for name in type(vae).model_fields if name in vae.model_fields_set - {"engine", "statistics"})
