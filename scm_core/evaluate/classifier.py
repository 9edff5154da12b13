# SPDX-License-Identifier: Apache-2.0
"""The demo's feature network: a small classifier whose 64 penultimate features, standardised, are the space of its FID."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scm_core.data.images import from_uint8
from scm_core.data.shards import Sharded
from scm_core.described import load_described, save_described
from scm_core.evaluate.pixels import checked_rgb

FORMAT = "scm-classifier-1"
LAYERS: tuple[str, ...] = ("features", "logits")


class ClassifierTerms(NamedTuple):
    """Cross-entropy in nats and accuracy in [0, 1] of one batch, scalar tensors."""

    loss: Tensor
    accuracy: Tensor


class Classifier(nn.Module):
    """Convolutional classifier of images (B, channels, resolution, resolution) in [−1, 1], `resolution` 8, 16, 32, ….

    Its features are the last hidden layer *before* its activation: smooth, unbounded, no unit of it can die.
    `feature_mean`, `feature_std` (dim,) standardise them; they are 0 and 1 until `fit_standardization` measures them.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self, channels: int = 1, labels: int = 10, dim: int = 64, resolution: int = 32, width: int = 24
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("labels", labels), ("dim", dim), ("width", width)):
            if value < 1:
                raise ValueError(f"Classifier: {name} must be ≥ 1, got {value}")
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"Classifier: resolution must be a power of two ≥ 8, got {resolution}")
        self.config = {
            "channels": channels,
            "labels": labels,
            "dim": dim,
            "resolution": resolution,
            "width": width,
        }
        # Pooled down to 4×4 and no further, so that images of any size leave the hidden layer more inputs than units.
        half, quarter = resolution // 2, max(4, resolution // 4)
        last = max(4, quarter // 2)
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * channels, width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(half // quarter),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(quarter // last),
            nn.Flatten(),
            nn.Linear(2 * width * last**2, dim),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(dim, labels))
        self.register_buffer("feature_mean", torch.zeros(dim))
        self.register_buffer("feature_std", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, labels) of images x in [−1, 1]."""
        return self.head(self.body(self._checked(x)))

    def features(self, x: Tensor) -> Tensor:
        """Return the standardised features (B, dim) of images x in [−1, 1]."""
        return (self.body(self._checked(x)) - self.feature_mean) / self.feature_std

    def _checked(self, x: Tensor) -> Tensor:
        expected = (self.config["channels"], self.config["resolution"], self.config["resolution"])
        if x.shape[1:] != expected:
            raise ValueError(f"Classifier: images must be (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        return x


def classifier_loss(logits: Tensor, labels: Tensor) -> ClassifierTerms:
    """Return cross-entropy and accuracy of logits (B, labels) against labels (B,) int64."""
    accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
    return ClassifierTerms(loss=F.cross_entropy(logits, labels), accuracy=accuracy)


def rgb_layers(classifier: Classifier, images: Tensor, layers: Iterable[str]) -> tuple[Tensor, ...]:
    """Return the asked-for `LAYERS`, features (B, dim) and logits (B, labels), of uint8 RGB images (B, 3, H, W).

    A greyscale classifier sees the mean of the three channels, exact for grey images stored as RGB.
    """
    x = from_uint8(checked_rgb(images))
    if classifier.config["channels"] == 1:
        x = x.mean(dim=1, keepdim=True)
    return tuple(classifier.features(x) if layer == "features" else classifier(x) for layer in layers)


@torch.no_grad()
def fit_standardization(classifier: Classifier, images: Tensor | Sharded, batch: int = 500) -> None:
    """Measure the features' mean and standard deviation over uint8 `images` (N, C, H, W) and freeze them into the
    buffers.

    Raises `ValueError` if a feature does not vary: it would divide by zero and means that training went wrong.
    """
    raw = torch.cat([classifier.body(from_uint8(chunk)).double() for chunk in images.split(batch)])
    std = raw.std(dim=0)
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        dead = torch.nonzero(~(std > 0)).flatten().tolist()
        raise ValueError(f"features without variance over the {len(images)} images: {dead}; train the classifier again")
    classifier.feature_mean.copy_(raw.mean(dim=0))
    classifier.feature_std.copy_(std)


def save_classifier(classifier: Classifier, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
    """Write weights, standardisation, configuration and `info` (JSON values: data set, accuracy, …) to one safetensors
    file.
    """
    save_described(Path(path), classifier.state_dict(), FORMAT, classifier.config, info)


def load_classifier(path: str | Path) -> Classifier:
    """Return the classifier in a file of `save_classifier`; `FileNotFoundError` or `ValueError` for a missing or wrong
    file.
    """
    tensors, config, _ = load_described(Path(path), FORMAT)
    try:
        classifier = Classifier(**config)
        classifier.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit its own configuration ({error}): make it again") from error
    return classifier.eval()
