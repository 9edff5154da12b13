# SPDX-License-Identifier: Apache-2.0
"""Stage reference: the features of the data in every feature space, and their moments, computed once for all evaluations."""

from pipeline.context import Context
from pipeline.spaces import load_extractor, subset_of
from scm_core.data import load_images
from scm_core.evaluate.protocol import make_reference
from scm_core.train.distributed import own_device


def run(ctx: Context) -> None:
    """Write a folder for each space: features, their moments, what evaluations need of them alone, identities of data and network."""
    images, device = load_images(ctx.inputs["dataset"]), own_device()
    subset = subset_of(ctx.slot.evaluation, ctx.scale.seed)
    for space in ctx.slot.evaluation.spaces:
        reference = make_reference(load_extractor(space, ctx.inputs, device), images, subset=subset)
        reference.prepare(device=device).save(ctx.out / space)
