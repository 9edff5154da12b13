# SPDX-License-Identifier: Apache-2.0
"""Feature extractors behind torch-fidelity's interface: the demo's classifier and whatever it registers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scm_core.compat import prepare_torchvision
from scm_core.data.arrays import file_digest
from scm_core.data.images import from_uint8
from scm_core.evaluate.classifier import load_classifier

prepare_torchvision()  # before torch_fidelity, which imports torchvision

import torch_fidelity  # noqa: E402
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # noqa: E402
from torch_fidelity.utils import create_feature_extractor  # noqa: E402

CLASSIFIER = "scm-classifier"


class ClassifierFeatures(torch_fidelity.FeatureExtractorBase):
    """The demo's classifier as a torch-fidelity extractor: RGB uint8 (B, 3, H, W) → ("features" (B, dim), "logits").

    `feature_extractor_weights_path` names a file of `save_classifier`. A greyscale classifier sees the mean of the
    three channels, exact for grey images stored as RGB.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError(f"extractor {name} needs a weights file: it is trained by the features stage, not fetched")
        self.classifier = load_classifier(feature_extractor_weights_path)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested layers for uint8 images (B, 3, H, W)."""
        if input.dtype != torch.uint8 or input.ndim != 4 or input.shape[1] != 3:
            raise ValueError(f"images must be uint8 (B, 3, H, W), got {input.dtype} {tuple(input.shape)}")
        x = from_uint8(input)
        if self.classifier.config["channels"] == 1:
            x = x.mean(dim=1, keepdim=True)
        return tuple(
            self.classifier.features(x) if layer == "features" else self.classifier(x) for layer in self.features_list
        )

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        raise NotImplementedError


if CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:
    torch_fidelity.register_feature_extractor(CLASSIFIER, ClassifierFeatures)


@dataclass(frozen=True)
class ExtractorIdentity:
    """What makes two feature sets comparable: extractor name, layer, and the SHA-256 of its weights file."""

    name: str
    layer: str
    weights_sha256: str

    def to_json(self) -> dict[str, str]:
        """The three fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor (`module`, torch-fidelity's) with its identity; call it with uint8 (B, 1 or 3, H, W) for
    features (B, D).
    """

    module: torch_fidelity.FeatureExtractorBase
    identity: ExtractorIdentity

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.module(to_rgb(images))[0].float()


def to_rgb(images: Tensor) -> Tensor:
    """Repeat the channel of greyscale uint8 images (B, 1, H, W) three times, leave RGB ones; `ValueError` for anything
    else.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), got {images.dtype} of shape {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images


def create_extractor(name: str, weights_path: str | Path, layer: str | None = None) -> Extractor:
    """Create the registered torch-fidelity extractor `name` on the CPU, with weights from a local file.

    `name` is "scm-classifier" or any other registered one ("inception-v3-compat", …); `layer` defaults to the one
    torch-fidelity uses for the FID. Nothing is downloaded, and a pickled weights file is only taken if it holds
    nothing but tensors. Raises `ValueError` for an unknown name or layer or an unusable file, `FileNotFoundError`
    for a missing one.
    """
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise ValueError(f"unknown extractor {name!r}: registered are {', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}")
    path = Path(weights_path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: extractor {name} needs its weights there")
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    layer = layer or cls.get_default_feature_layer_for_metric("fid")
    if layer not in cls.get_provided_features_list():
        raise ValueError(
            f"extractor {name} has no layer {layer!r}: it has {', '.join(cls.get_provided_features_list())}"
        )
    if not issubclass(cls, ClassifierFeatures):
        _require_tensors_only(path)
    module = create_feature_extractor(
        name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=str(path)
    )
    return Extractor(module, ExtractorIdentity(name, layer, file_digest(path)))


def _require_tensors_only(path: Path) -> None:
    """Refuse a file that torch's restricted unpickler refuses: torch-fidelity itself would unpickle whatever is in it."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each way a file can be wrong
        raise ValueError(f"{path} is no tensors-only weights file: {error}") from error
