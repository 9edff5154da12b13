# SPDX-License-Identifier: Apache-2.0
"""Feature extractors: the demo's classifier, Inception v3, DINOv2, and what else is registered with torch-fidelity."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scm_core.evaluate.classifier import LAYERS, load_classifier, rgb_layers
from scm_core.evaluate.pixels import to_rgb
from scm_core.evaluate.weights import DINOV2, INCEPTION, find_weights
from scm_core.precision import full_precision

__all__ = ["CLASSIFIER", "DINOV2", "INCEPTION", "Extractor", "ExtractorIdentity", "create_extractor"]

CLASSIFIER = "scm-classifier"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ExtractorIdentity:
    """What makes two feature sets comparable: extractor, layer, SHA-256 of the weights file, what is done to the pixels
    before the network, and the type that it computes in.
    """

    name: str
    layer: str
    weights_sha256: str
    preprocessing: str = "none"
    dtype: str = "float32"

    def to_json(self) -> dict[str, str]:
        """The five fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor (`module`, called as torch-fidelity's are, on `device`) with its identity; call it with uint8
    (B, 1 or 3, H, W) on any device for float32 features (B, D) on its own, `batch` images at a time (all if None).
    """

    module: nn.Module
    identity: ExtractorIdentity
    device: torch.device = CPU
    batch: int | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        chunks = to_rgb(images).split(self.batch or max(1, len(images)))
        with full_precision(self.device):
            return torch.cat([self.module(chunk.to(self.device))[0].float() for chunk in chunks])


class _ClassifierLayer(nn.Module):
    """A layer of the demo's classifier, called as torch-fidelity's extractors are, whose import takes seconds and is not needed here."""

    preprocessing = "none"

    def __init__(self, path: Path, layer: str) -> None:
        super().__init__()
        self.classifier, self.layer = load_classifier(path), layer

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the layer for uint8 images (B, 3, H, W), alone in a tuple."""
        return rgb_layers(self.classifier, images, (self.layer,))


def create_extractor(
    name: str,
    weights_path: str | Path | None = None,
    layer: str | None = None,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
    batch: int | None = None,
) -> Extractor:
    """Create the extractor `name` on `device`, in eval mode and float32.

    `name` is "scm-classifier", "inception-v3-compat", "scm-dinov2-vit-l-14" or any other that is registered with
    torch-fidelity; `layer` defaults to the one torch-fidelity uses for the FID. The weights are those of `find_weights`:
    of Inception and DINOv2 the published file, from `weights_path`, from the weights folder, or fetched; others only with
    their `sha256`. A pickled file is only taken if it holds nothing but tensors. `batch` bounds how many images pass at
    once (64 for the two large networks). Raises `ValueError` for an unknown name, layer or device or an unusable file,
    `FileNotFoundError` for a missing one.
    """
    if name == CLASSIFIER:
        offered, default = LAYERS, "features"
    else:
        from scm_core.evaluate import fidelity

        offered, default = fidelity.layers(name)
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be ≥ 1, got {batch}")
    layer = layer or default
    if layer not in offered:
        raise ValueError(f"extractor {name} has no layer {layer!r}: it has {', '.join(offered)}")
    place = _usable(device)
    weights = find_weights(name, weights_path, sha256)
    module: nn.Module
    if name == CLASSIFIER:
        module, preprocessing = _ClassifierLayer(weights.path, layer), _ClassifierLayer.preprocessing
    else:
        module, preprocessing = fidelity.create(name, layer, weights.path)
    identity = ExtractorIdentity(name, layer, weights.sha256, preprocessing)
    return Extractor(module.to(place), identity, place, batch or getattr(module, "batch", None))


def _usable(device: str | torch.device) -> torch.device:
    """The device, after a first tensor on it."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return place
