# SPDX-License-Identifier: Apache-2.0
"""The networks' sections of params.yaml, one for each architecture, told apart by the key `architecture`.

The keys are the arguments of the architecture's class in `scm_core.nn`, under the same names; what depends on the data (channels,
resolution, labels) comes from the slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, Strict, model_validator

from pipeline.sections import Count, Model, Positive, Training, problem
from scm_core.nn.layout import Layout, Place, layout

Even = Annotated[int, Field(ge=4, multiple_of=2)]
Counts = Annotated[tuple[Count, ...], Strict(False)]
SMALL_PATCH = 2  # the small network starts with one pixel-unshuffle


class Items(NamedTuple):
    """What a network is for: the shape of an item and the number of labels."""

    channels: int
    resolution: int
    labels: int


class Matrix(NamedTuple):
    """A layer's weights, and how often each of them multiplies in one pass (once for every position)."""

    weights: int
    positions: int


class _Counted(Model):
    """A network whose cost is known without building it."""

    def matrices(self, items: Items) -> Iterable[Matrix]:
        """Every convolution and linear layer; not the guidance input, which is small."""
        raise NotImplementedError

    def attention(self, items: Items) -> int:
        """Multiplications of one pass in q kᵀ and p v."""
        return 0

    def flops(self, items: Items) -> int:
        """Model FLOPs of one forward pass of one item, as scm_core.train.flops counts them: 2 for each multiplication."""
        return 2 * (sum(weights * positions for weights, positions in self.matrices(items)) + self.attention(items))

    def weights(self, items: Items) -> int:
        """Number of parameters, without biases and gains."""
        return sum(weights for weights, _ in self.matrices(items))


class SmallNetwork(_Counted):
    embedding: ClassVar[str] = "positional"  # what the other architectures choose, for tables of settings
    c_noise: ClassVar[str] = "t"
    norm: ClassVar[str] = "double"
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

    def matrices(self, items: Items) -> Iterator[Matrix]:
        positions, inner = (items.resolution // SMALL_PATCH) ** 2, items.channels * SMALL_PATCH**2
        yield Matrix(9 * (2 * inner + 1) * self.width, positions)  # the first and the last
        yield Matrix(18 * self.width**2 * self.blocks, positions)
        yield Matrix(2 * self.width * (self.width + items.labels + 2 * self.width * self.blocks), 1)  # the embeddings


class _UNet(_Counted):
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
    norm: str
    """How the embedding acts on a block."""
    _two: ClassVar[tuple[str, ...]]  # the norms that take a scale and a shift

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

    def layout(self, resolution: int) -> Layout:
        """Its blocks for items of that resolution."""
        raise NotImplementedError

    def attention(self, items: Items) -> int:
        blocks = self.layout(items.resolution)
        return sum(2 * p.resolution**4 * p.outputs for p in (*blocks.encoder, *blocks.decoder) if p.attention)

    def _conditioned(self, place: Place, inputs: int, embedding: int) -> Iterator[Matrix]:
        """A block's two 3×3 convolutions, its conditioning (scale and shift, or one of them) and its attention."""
        outputs, positions = place.outputs, place.resolution**2
        yield Matrix(9 * (inputs + outputs) * outputs, positions)
        yield Matrix(embedding * outputs * (2 if self.norm in self._two else 1), 1)
        if place.attention:
            yield Matrix(4 * outputs**2, positions)  # q, k, v; the projection


class EDM2Network(_UNet):
    """EDM2's U-Net, config G."""

    architecture: Literal["edm2"]
    head_channels: Count
    """Channels of an attention head."""
    norm: Literal["double", "adagn"]
    """Adaptive double normalisation, or EDM2's own gain."""
    _two: ClassVar[tuple[str, ...]] = ("double",)

    def layout(self, resolution: int) -> Layout:
        return layout(resolution, self.width, self.multipliers, self.blocks, self.attention_resolutions)

    def matrices(self, items: Items) -> Iterator[Matrix]:
        blocks, side = self.layout(items.resolution), items.resolution
        first, embedding = self.width * self.multipliers[0], self.width * max(self.multipliers)
        yield Matrix(9 * (2 * items.channels + 1) * first, side**2)  # the first and the last
        yield Matrix((first + items.labels) * embedding, 1)
        for place in (*blocks.encoder, *blocks.decoder):
            if place.inputs != place.outputs:
                yield Matrix(place.inputs * place.outputs, place.resolution**2)
        for place in blocks.encoder:  # whose 3×3 convolutions come after the 1×1 one
            yield from self._conditioned(place, place.outputs, embedding)
        for place in blocks.decoder:
            yield from self._conditioned(place, place.inputs, embedding)

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
    _two: ClassVar[tuple[str, ...]] = ("double", "adagn")

    def layout(self, resolution: int, attentive: bool = True) -> Layout:
        """Its blocks for items of that resolution; `attentive`: with its attention."""
        sides = self.attention_resolutions if attentive else ()
        return layout(resolution, self.width, self.multipliers, self.blocks, sides, entry=self.width, last_only=True)

    def matrices(self, items: Items) -> Iterator[Matrix]:
        blocks, embedding = self.layout(items.resolution), 4 * self.width
        last = blocks.decoder[-1].outputs
        yield Matrix(9 * items.channels * (self.width + last), items.resolution**2)
        yield Matrix(self.noise_channels * (items.labels + embedding) + embedding**2, 1)
        for place in (*blocks.encoder, *blocks.decoder):
            yield from self._conditioned(place, place.inputs, embedding)
            if place.inputs != place.outputs or place.resample:
                yield Matrix(place.inputs * place.outputs, place.resolution**2)

    def misfit(self, resolution: int) -> tuple[str, str] | None:
        blocks = self.layout(resolution, attentive=False)
        for channels in sorted({n for p in (*blocks.encoder, *blocks.decoder) for n in (p.inputs, p.outputs)}):
            multiple = max(4, min(32, channels // 4))  # groups of at least 4 channels, at most 32 of them
            if channels % multiple:
                what = f"{channels} channels (width · multiplier, with skips) for a group norm"
                return "width", f"makes {what}, which takes a multiple of {multiple}: change it or the multipliers"
        return super().misfit(resolution)


class DiffusersNetwork(_Counted):
    """A network of diffusers, which is imported: `python -m pipeline import` counts it."""

    architecture: Literal["diffusers"]
    forward_flops: Count
    """Model FLOPs of one forward pass of one item."""
    parameters: Count

    @property
    def downsampling(self) -> int:
        return 1

    def misfit(self, resolution: int) -> tuple[str, str] | None:
        return None

    def config(self, sigma_data: float) -> dict[str, Any]:
        """What is known of it without its file."""
        return {"architecture": self.architecture, "sigma_data": sigma_data}

    def dropout(self, training: Training) -> dict[str, Any]:
        return {"dropout": training.dropout}

    def flops(self, items: Items) -> int:
        return self.forward_flops

    def weights(self, items: Items) -> int:
        return self.parameters


Network = Annotated[SmallNetwork | EDM2Network | DDPMPPNetwork | DiffusersNetwork, Field(discriminator="architecture")]
