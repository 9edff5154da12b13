# SPDX-License-Identifier: Apache-2.0
"""Feature extractors behind torch-fidelity's interface: Inception v3, DINOv2, the demo's classifier, and what else is
registered.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scm_core.compat import prepare_torchvision
from scm_core.data.images import from_uint8
from scm_core.evaluate.classifier import load_classifier
from scm_core.evaluate.dinov2 import VIT_L, load_dinov2, normalize, resize_bicubic
from scm_core.evaluate.weights import DINOV2, INCEPTION, fill, find_weights, load_tensors
from scm_core.precision import full_precision

prepare_torchvision()  # before torch_fidelity, which imports torchvision

import torch_fidelity  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # noqa: E402
from torch_fidelity.utils import create_feature_extractor  # noqa: E402

__all__ = ["CLASSIFIER", "DINOV2", "INCEPTION", "Extractor", "ExtractorIdentity", "create_extractor", "to_rgb"]

CLASSIFIER = "scm-classifier"
# What is done to the pixels before the network. A class of ours says so itself, in `preprocessing`; what it says must
# change with what it does, since features are compared by it.
OTHER_PREPROCESSING = f"torch-fidelity-{torch_fidelity.__version__}"
CPU = torch.device("cpu")


class _Uncompiled(torch_fidelity.FeatureExtractorBase):
    """What torch-fidelity asks of an extractor that it is not to compile."""

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        raise NotImplementedError


class ClassifierFeatures(_Uncompiled):
    """The demo's classifier as a torch-fidelity extractor: RGB uint8 (B, 3, H, W) → ("features" (B, dim), "logits").

    `feature_extractor_weights_path` names a file of `save_classifier`. A greyscale classifier sees the mean of the
    three channels, exact for grey images stored as RGB.
    """

    preprocessing = "none"

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        if feature_extractor_weights_path is None:
            raise ValueError(f"extractor {name} needs a weights file: it is trained by the features stage, not fetched")
        self.classifier = load_classifier(feature_extractor_weights_path)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the requested layers for uint8 images (B, 3, H, W)."""
        x = from_uint8(_checked_rgb(input))
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


class Dinov2Features(_Uncompiled):
    """DINOv2 as a torch-fidelity extractor: RGB uint8 (B, 3, H, W) → ("features",), the class token (B, 1024).

    `feature_extractor_weights_path` is taken as it is (`create_extractor` verifies it); without one the published file
    is used, as `find_weights` finds it.
    """

    preprocessing = "pil-bicubic-224"
    batch = 64
    size = VIT_L

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        path = feature_extractor_weights_path
        self.network = load_dinov2(find_weights(name).path if path is None else path, self.size)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return the class token for uint8 images (B, 3, H, W)."""
        images = resize_bicubic(_checked_rgb(input)).to(input.device)
        return (self.network(normalize(images)),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "features"


class _Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception v3, which unpickles its file without restriction: it gets tensors that were read safely."""

    preprocessing = "tf1-bilinear-299"
    batch = 64

    def __init__(self, name: str, features_list: list[str], path: Path) -> None:
        self.path = path
        copy = io.BytesIO()
        torch.save(load_tensors(path), copy)
        copy.seek(0)
        super().__init__(name, features_list, copy)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Take the weights; the error names what does not fit."""
        fill(self, state_dict, self.path)


for _name, _class in ((CLASSIFIER, ClassifierFeatures), (DINOV2, Dinov2Features)):
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor(_name, _class)


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
    """A feature extractor (`module`, torch-fidelity's, on `device`) with its identity; call it with uint8
    (B, 1 or 3, H, W) on any device for float32 features (B, D) on its own, `batch` images at a time (all if None).
    """

    module: torch_fidelity.FeatureExtractorBase
    identity: ExtractorIdentity
    device: torch.device = CPU
    batch: int | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        chunks = to_rgb(images).split(self.batch or max(1, len(images)))
        with full_precision(self.device):
            return torch.cat([self.module(chunk.to(self.device))[0].float() for chunk in chunks])


def to_rgb(images: Tensor) -> Tensor:
    """Repeat the channel of greyscale uint8 images (B, 1, H, W) three times, leave RGB ones; `ValueError` for anything
    else.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be uint8 pixels 0…255 of shape (B, 1 or 3, H, W), got {images.dtype} of shape "
            f"{tuple(images.shape)}: turn floats in [-1, 1] into pixels with scm_core.data.to_uint8"
        )
    return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images


def _checked_rgb(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return to_rgb(images)


def create_extractor(
    name: str,
    weights_path: str | Path | None = None,
    layer: str | None = None,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
    batch: int | None = None,
) -> Extractor:
    """Create the registered torch-fidelity extractor `name` on `device`, in eval mode and float32.

    `name` is "scm-classifier", "inception-v3-compat", "scm-dinov2-vit-l-14" or any other registered one; `layer` defaults
    to the one torch-fidelity uses for the FID. The weights are those of `find_weights`: of Inception and DINOv2 the
    published file, from `weights_path`, from the weights folder, or fetched; others only with their `sha256`. A pickled
    file is only taken if it holds nothing but tensors. `batch` bounds how many images pass at once (64 for the two large
    networks). Raises `ValueError` for an unknown name, layer or device or an unusable file, `FileNotFoundError` for a
    missing one.
    """
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise ValueError(f"unknown extractor {name!r}: registered are {', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be ≥ 1, got {batch}")
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    layer = layer or cls.get_default_feature_layer_for_metric("fid")
    if layer not in cls.get_provided_features_list():
        raise ValueError(
            f"extractor {name} has no layer {layer!r}: it has {', '.join(cls.get_provided_features_list())}"
        )
    place = _usable(device)
    weights = find_weights(name, weights_path, sha256)
    if name == INCEPTION:
        module = _Inception(name, [layer], weights.path)
    else:
        if not issubclass(cls, ClassifierFeatures | Dinov2Features):
            load_tensors(weights.path)  # torch-fidelity itself would unpickle whatever is in it
        module = create_feature_extractor(
            name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=str(weights.path)
        )
    identity = ExtractorIdentity(name, layer, weights.sha256, getattr(module, "preprocessing", OTHER_PREPROCESSING))
    return Extractor(module.to(place), identity, place, batch or getattr(module, "batch", None))


def _usable(device: str | torch.device) -> torch.device:
    """The device, after a first tensor on it."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return place
