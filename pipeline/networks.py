# SPDX-License-Identifier: Apache-2.0
"""The networks' sections of params.yaml, one for each architecture, told apart by the key `architecture`.

The keys are the arguments of the architecture's class in `scm_core.nn`, under the same names; what depends on the data (channels,
resolution, labels) comes from the slot.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from pipeline.sections import Count, Model, Positive, Training, problem

Even = Annotated[int, Field(ge=4, multiple_of=2)]
Counts = Annotated[tuple[Count, ...], Strict(False)]
SMALL_PATCH = 2  # the small network starts with one pixel-unshuffle


class SmallNetwork(Model):
    architecture: Literal["small"]
    """One level after a pixel-unshuffle, no attention."""
    width: Even
    """Channels."""
    blocks: Count
    """Residual blocks."""

    @property
    def downsampling(self) -> int:
        """What the resolution must be divisible by."""
        return SMALL_PATCH

    def misfit(self, resolution: int) -> tuple[str, str] | None:
        """The key that does not fit items of that resolution, which divides by `downsampling`, and what is wrong with it."""
        return None

    def config(self, sigma_data: float) -> dict[str, Any]:
        """What `scm_core.nn.build.build_network` takes, without what comes from the data and from the training."""
        return self.model_dump()

    def dropout(self, training: Training) -> dict[str, Any]:
        """The network's arguments that are the training's."""
        return {"dropout": training.dropout}

    def work(self, resolution: int) -> float:
        """Multiplications of one forward pass, in units of a network of one block and one channel at 4 × 4 positions."""
        return self.width**2 * self.blocks * (resolution / 8) ** 2

    def weights(self) -> int:
        """About the number of parameters: two 3×3 convolutions and the embedding's parts in each block."""
        return 23 * self.width**2 * self.blocks


class _UNet(Model):
    """What EDM2's U-Net and DDPM++ have in common."""

    width: Even
    """Channels of the first level (the paper's channel multiplier)."""
    multipliers: Annotated[Counts, Field(min_length=1)]
    """Channels of each level, in multiples of the width."""
    blocks: Count
    """Residual blocks per level of the encoder."""
    attention_resolutions: Counts
    embedding: Literal["positional", "fourier"]
    """Of the time."""
    fourier_scale: Positive | None = None
    """Standard deviation of the frequencies; for embedding fourier alone."""
    c_noise: Literal["t", "edm"]
    """What is embedded: t, or EDM's ¼ ln σ."""
    checkpointing: bool
    """Whether activations are computed a second time in the backward pass instead of being kept."""
    precision: Literal["fp32", "fp16", "bf16"]
    """Of activations and tangents; weights, embeddings and losses stay in float32."""

    @model_validator(mode="after")
    def _fourier(self) -> _UNet:
        if (self.fourier_scale is None) == (self.embedding == "fourier"):
            what = "is missing: add it" if self.fourier_scale is None else "must be left out"
            raise problem("fourier_scale", f"{what} for embedding {self.embedding}")
        return self

    @property
    def downsampling(self) -> int:
        """What the resolution must be divisible by."""
        return 1 << (len(self.multipliers) - 1)

    def misfit(self, resolution: int) -> tuple[str, str] | None:
        """The key that does not fit items of that resolution, which divides by `downsampling`, and what is wrong with it."""
        sides = [resolution >> level for level in range(len(self.multipliers))]
        for side in self.attention_resolutions:
            if side not in sides:
                return "attention_resolutions", f"must be some of the network's, {sides}, got {side}"
        return None

    def config(self, sigma_data: float) -> dict[str, Any]:
        """What `scm_core.nn.build.build_network` takes, without what comes from the data and from the training."""
        return {**self.model_dump(mode="json", exclude_none=True), "sigma_data": sigma_data}

    def dropout(self, training: Training) -> dict[str, Any]:
        """The network's arguments that are the training's."""
        return {"dropout": training.dropout, "dropout_resolution": training.dropout_resolution}

    @property
    def _convolutions(self) -> float:
        """About how many c-to-c 3×3 convolutions a level has: two per block, nearly three where a skip joins the input."""
        return 2 * (self.blocks + 0.7) + 2.9 * (self.blocks + 1) + 2

    def work(self, resolution: int) -> float:
        """Multiplications of one forward pass in the 3×3 convolutions, in the unit of `SmallNetwork.work`."""
        positions = ((resolution / 4 / 2**level) ** 2 for level in range(len(self.multipliers)))
        channels = ((m * self.width) ** 2 for m in self.multipliers)
        return sum(c * n for c, n in zip(channels, positions, strict=True)) * self._convolutions / 2

    def weights(self) -> int:
        """About the number of parameters: the 3×3 convolutions, and a third as many for attention and embeddings."""
        return round(sum((m * self.width) ** 2 for m in self.multipliers) * self._convolutions * 9 * 4 / 3)


class EDM2Network(_UNet):
    """EDM2's U-Net, config G."""

    architecture: Literal["edm2"]
    head_channels: Count
    """Channels of an attention head."""
    norm: Literal["double", "adagn"]
    """Adaptive double normalisation, or EDM2's own gain."""

    def misfit(self, resolution: int) -> tuple[str, str] | None:
        bottom = len(self.multipliers) - 1  # which always has attention
        for level, multiplier in enumerate(self.multipliers):
            side, channels = resolution >> level, multiplier * self.width
            if (level == bottom or side in self.attention_resolutions) and channels % self.head_channels:
                what = f"the {channels} channels (width · multiplier) of the attention at resolution {side}"
                return "head_channels", f"must divide {what}, got {self.head_channels}"
        return super().misfit(resolution)


class DDPMPPNetwork(_UNet):
    """DDPM++ of Score SDE and EDM."""

    architecture: Literal["ddpmpp"]
    noise_channels: Even
    """Numbers that the time is embedded in."""
    norm: Literal["double", "adagn", "shift"]
    """Adaptive double normalisation, AdaGN, or the shift of Score SDE and EDM."""

    def misfit(self, resolution: int) -> tuple[str, str] | None:
        for channels in sorted(self._normalised()):
            multiple = max(4, min(32, channels // 4))  # groups of at least 4 channels, at most 32 of them
            if channels % multiple:
                what = f"{channels} channels (width · multiplier, with skips) for a group norm"
                return "width", f"makes {what}, which takes a multiple of {multiple}: change it or the multipliers"
        return super().misfit(resolution)

    def _normalised(self) -> set[int]:
        """The numbers of channels that blocks get and give. In the decoder's level l a block gets those of level l + 1, then of l itself,
        and a skip beside them: of level l, the last one's of l − 1."""
        levels = [m * self.width for m in self.multipliers]
        found = {self.width, *levels}
        for above, own, below in zip([self.width, *levels], levels, [*levels[1:], levels[-1]], strict=False):
            found |= {below + own, own + above}
            if self.blocks > 1:
                found.add(2 * own)
        return found


Network = Annotated[SmallNetwork | EDM2Network | DDPMPPNetwork, Field(discriminator="architecture")]
