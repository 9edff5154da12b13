# SPDX-License-Identifier: Apache-2.0
"""The feature spaces of params.yaml (`evaluation.spaces`): their networks, and what the Fréchet distance in them is called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.modelling import CLASSIFIER_FILE
from scm_core.evaluate.extractors import CLASSIFIER, DINOV2, INCEPTION, Extractor, create_extractor


class Space(NamedTuple):
    """The registered name of a network, and that of the distance."""

    extractor: str
    distance: str


SPACES: Mapping[str, Space] = {
    "classifier": Space(CLASSIFIER, "fid"),
    "inception": Space(INCEPTION, "fid"),
    "dinov2": Space(DINOV2, "fd_dinov2"),
}


def load_extractor(space: str, inputs: Mapping[str, Path], device: torch.device | None = None) -> Extractor:
    """The network of a space: the slot's own classifier among a job's inputs, or one with published weights, found or fetched."""
    weights = inputs["features"] / CLASSIFIER_FILE if space == "classifier" else None
    return create_extractor(SPACES[space].extractor, weights, device=device)
