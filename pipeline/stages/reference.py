# SPDX-License-Identifier: Apache-2.0
"""Stage reference: the features of the data and their moments, computed once for all evaluations."""

from pipeline.context import Context
from pipeline.modelling import CLASSIFIER_FILE
from scm_core.data import load_images
from scm_core.evaluate.extractors import CLASSIFIER, create_extractor
from scm_core.evaluate.protocol import make_reference


def run(ctx: Context) -> None:
    """Write features, mean and covariance, what evaluations need of them alone, and the identities of data and extractor."""
    extractor = create_extractor(CLASSIFIER, ctx.inputs["features"] / CLASSIFIER_FILE)
    make_reference(extractor, load_images(ctx.inputs["dataset"])).prepare().save(ctx.out)
