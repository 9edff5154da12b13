# SPDX-License-Identifier: Apache-2.0
"""The feature spaces of params.yaml (`evaluation.spaces`): their networks, and what the Fréchet distance in them is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from pipeline.sections import Evaluation
    from scm_core.evaluate.extractors import Extractor
    from scm_core.evaluate.reference import Subset


class Space(NamedTuple):
    """The name under which a network is registered with torch-fidelity, and that of the distance."""

    extractor: str
    distance: str


SPACES: Mapping[str, Space] = {
    "classifier": Space("scm-classifier", "fid"),
    "inception": Space("inception-v3-compat", "fid"),
    "dinov2": Space("scm-dinov2-vit-l-14", "fd_dinov2"),
}


def subset_of(how: Evaluation, seed: int) -> Subset | None:
    """The reference images that are compared pair by pair, where that is not all."""
    from scm_core.evaluate.reference import Subset
    from scm_core.seeds import derive_seed

    return Subset(how.manifold_images, derive_seed(seed, "reference")) if how.manifold_images else None


def load_extractor(space: str, inputs: Mapping[str, Path], device: torch.device | None = None) -> Extractor:
    """The network of a space: the slot's own classifier among a job's inputs, or one with published weights, found or fetched."""
    from pipeline.modelling import CLASSIFIER_FILE
    from scm_core.evaluate.extractors import create_extractor

    weights = inputs["features"] / CLASSIFIER_FILE if space == "classifier" else None
    return create_extractor(SPACES[space].extractor, weights, device=device or "cpu")
