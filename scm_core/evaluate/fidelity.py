# SPDX-License-Identifier: Apache-2.0
"""torch-fidelity's extractors and ours behind its interface, registered with it so that its own functions know them too.

Importing this takes seconds (torch-fidelity imports torchvision): `create_extractor` does where it is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scm_core.compat import prepare_torchvision
from scm_core.evaluate.classifier import LAYERS, load_classifier, rgb_layers
from scm_core.evaluate.dinov2 import VIT_L, load_dinov2, normalize, resize_bicubic
from scm_core.evaluate.extractors import CLASSIFIER, DINOV2, INCEPTION
from scm_core.evaluate.pixels import checked_rgb
from scm_core.evaluate.weights import fill, find_weights, load_tensors

prepare_torchvision()  # before torch_fidelity, which imports torchvision

import torch_fidelity  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # noqa: E402
from torch_fidelity.utils import create_feature_extractor  # noqa: E402

# What is done to the pixels before the network. A class of ours says so itself, in `preprocessing`; what it says must
# change with what it does, since features are compared by it.
OTHER_PREPROCESSING = f"torch-fidelity-{torch_fidelity.__version__}"


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
        return rgb_layers(self.classifier, input, self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return LAYERS

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
        images = resize_bicubic(checked_rgb(input)).to(input.device)
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


def layers(name: str) -> tuple[tuple[str, ...], str]:
    """The layers of the registered extractor `name`, and the one that torch-fidelity uses for the FID; `ValueError` if there is none."""
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        raise ValueError(f"unknown extractor {name!r}: registered are {', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}")
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    return tuple(cls.get_provided_features_list()), cls.get_default_feature_layer_for_metric("fid")


def create(name: str, layer: str, weights: Path) -> tuple[nn.Module, str]:
    """The registered extractor `name` with the weights of a file, and what it does to the pixels first."""
    if name == INCEPTION:
        return _Inception(name, [layer], weights), _Inception.preprocessing
    if not issubclass(FEATURE_EXTRACTORS_REGISTRY[name], ClassifierFeatures | Dinov2Features):
        load_tensors(weights)  # torch-fidelity itself would unpickle whatever is in it
    module = create_feature_extractor(
        name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )
    return module, getattr(module, "preprocessing", OTHER_PREPROCESSING)
