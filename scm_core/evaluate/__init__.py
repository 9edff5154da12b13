# SPDX-License-Identifier: Apache-2.0
"""Metrics and the protocol around them; who needs an extractor imports `scm_core.evaluate.extractors` (slow)."""

from scm_core.evaluate.frechet import FidResult, frechet_distance, frechet_with_error
from scm_core.evaluate.manifold import PrecisionRecall, kid, precision_recall
from scm_core.evaluate.moments import Moments
from scm_core.evaluate.protocol import (
    Evaluation,
    Reference,
    evaluate,
    extract,
    load_reference,
    make_reference,
    to_uint8,
)

__all__ = [
    "Evaluation",
    "FidResult",
    "Moments",
    "PrecisionRecall",
    "Reference",
    "evaluate",
    "extract",
    "frechet_distance",
    "frechet_with_error",
    "kid",
    "load_reference",
    "make_reference",
    "precision_recall",
    "to_uint8",
]
