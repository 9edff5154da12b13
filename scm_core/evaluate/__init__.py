# SPDX-License-Identifier: Apache-2.0
"""Metrics and the protocol around them; who needs an extractor imports `scm_core.evaluate.extractors` (slow)."""

from scm_core.evaluate.frechet import FidResult, frechet_distance, frechet_with_error
from scm_core.evaluate.manifold import (
    FeatureSet,
    ManifoldMetrics,
    PrecisionRecall,
    kid,
    manifold_metrics,
    precision_recall,
)
from scm_core.evaluate.moments import Moments
from scm_core.evaluate.protocol import Evaluation, evaluate, extract, make_reference, to_uint8
from scm_core.evaluate.reference import Prepared, Reference, Subset, load_reference

__all__ = [
    "Evaluation",
    "FeatureSet",
    "FidResult",
    "ManifoldMetrics",
    "Moments",
    "PrecisionRecall",
    "Prepared",
    "Reference",
    "Subset",
    "evaluate",
    "extract",
    "frechet_distance",
    "frechet_with_error",
    "kid",
    "load_reference",
    "make_reference",
    "manifold_metrics",
    "precision_recall",
    "to_uint8",
]
