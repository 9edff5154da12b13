# SPDX-License-Identifier: Apache-2.0
"""Stage features: train the classifier whose penultimate layer is the space of the demo's FID."""

import torch

from pipeline.context import Context
from pipeline.modelling import CLASSIFIER_FILE, image_data
from pipeline.training import run_training, train_settings
from scm_core.data import load_images
from scm_core.evaluate.classifier import Classifier, classifier_loss, fit_standardization, save_classifier
from scm_core.objectives import Batch, Terms
from scm_core.seeds import derive_seed


def run(ctx: Context) -> None:
    """Write the classifier with its standardisation; the accuracy logged is that of the training batches."""
    wanted, dataset = ctx.slot.features, ctx.slot.dataset
    assert wanted is not None
    seed = derive_seed(ctx.scale.seed, ctx.job.name)
    images = load_images(ctx.inputs["dataset"])
    torch.manual_seed(derive_seed(seed, "init"))
    classifier = Classifier(dataset.channels, images.num_labels, wanted.dim, dataset.resolution)
    settings = train_settings(wanted.training, seed)

    def objective(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        assert batch.labels is not None
        terms = classifier_loss(classifier(batch.x0), batch.labels)
        return Terms(terms.loss, {"accuracy": terms.accuracy.detach()})

    run_training(ctx, settings, classifier, objective, image_data(images, labelled=True))
    classifier.cpu()
    fit_standardization(classifier, images.images)
    save_classifier(classifier, ctx.out / CLASSIFIER_FILE, {"run": ctx.run_id, "dataset": images.name})
