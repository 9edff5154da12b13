# SPDX-License-Identifier: Apache-2.0
"""Stage reference: the features of the data in every feature space, and their moments, computed once for all evaluations."""

from pipeline.context import Context
from pipeline.spaces import load_extractor
from scm_core.data import load_images
from scm_core.evaluate.protocol import make_reference
from scm_core.train.distributed import own_device


def run(ctx: Context) -> None:
    """Write a folder for each space: features, mean and covariance, with the identities of data and extractor."""
    images = load_images(ctx.inputs["dataset"])
    for space in ctx.slot.evaluation.spaces:
        make_reference(load_extractor(space, ctx.inputs, own_device()), images).save(ctx.out / space)
