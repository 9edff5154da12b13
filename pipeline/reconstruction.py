# SPDX-License-Identifier: Apache-2.0
"""What encoding and decoding alone costs: a slot's images, each drawn from its latent Gaussian and decoded, as a set to be measured.

The latent is a sample, not the posterior's mean, because samples are what latent models are trained on: of a model that has learnt their
distribution perfectly, these distances remain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import paths
from pipeline.errors import PipelineError
from pipeline.files import canonical, read_json, sha256_file, sha256_text
from pipeline.modelling import Decoder
from pipeline.params import Slot
from pipeline.provenance import meaning_of
from pipeline.subjects import CODE, Identities
from pipeline.sweep import Point
from scm_core.evaluate.manifest import ImagesManifest
from scm_core.seeds import sample_noise

NOISE = "reconstruction"  # the stream of the latents' noise


class ReconstructionSubject:
    """As many images as an evaluation reports, spread evenly over the set: all of them, if there are no more."""

    is_folder = False
    steps = (0,)
    guidable = False
    guidance_range = None

    def __init__(self, slot: Slot, inputs: Mapping[str, Path], device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.decode = Decoder(slot, inputs, self.device)
        if self.decode.store is None:
            raise PipelineError("a slot of pixel data has no latents to decode")
        self.store = self.decode.store
        self.count = min(slot.evaluation.samples, len(self.store))
        made = inputs["latents"] / paths.MANIFEST
        self.name, self.latents = str((read_json(made) or {}).get("run")), sha256_file(made)

    def __len__(self) -> int:
        return self.count

    def index(self, positions: range) -> Tensor:
        """The images' indices in the store."""
        return torch.tensor([position * len(self.store) // self.count for position in positions])

    def manifest(self, point: Point, chunk: int, extractors: Identities) -> dict[str, Any]:
        """All that the features depend on, as JSON values."""
        images = {
            "latents": self.latents,
            "decoder": self.decode.facts,
            "noise": NOISE,
            "count": self.count,
            "code": meaning_of(*CODE, "pipeline/reconstruction.py"),
        }
        digest = sha256_text(canonical(images))
        return ImagesManifest(images_sha256=digest, size=self.count, chunk=chunk, extractors=extractors).to_json()

    def images(self, point: Point) -> Callable[[range], Tensor]:
        """A function from positions in the set to uint8 images (B, C, H, W)."""

        def at(positions: range) -> Tensor:
            index = self.index(positions)
            noise = sample_noise(index.tolist(), self.store.shape, NOISE)
            latents = self.store.mean[index] + self.store.std[index] * noise
            return self.decode(self.store.scale(latents).to(self.device)).cpu()

        return at

    def nfe(self, point: Point) -> int:
        """No network is sampled."""
        return 0
