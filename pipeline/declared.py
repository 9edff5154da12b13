# SPDX-License-Identifier: Apache-2.0
"""The stages that make data, networks and their evaluations. `pipeline.reports` has the tables and figures, `pipeline.registry` all."""

from __future__ import annotations

from pipeline import costs, expansion
from pipeline.job import Stage

# In topological order.
MODELS = (
    Stage(
        "dataset",
        "read, crop and store the images",
        axes=("slot",),
        expand=expansion.slots,
        inputs=lambda p: {},
        params=lambda p: p.slot.dataset.keys(),
        cost=costs.dataset,
    ),
    Stage(
        "vae",
        "train the VAE, or verify a published one",
        axes=("slot",),
        expand=expansion.latent_slots,
        inputs=expansion.vae_inputs,
        params=expansion.vae_keys,
        cost=costs.vae,
    ),
    Stage(
        "latents",
        "encode the images",
        axes=("slot",),
        expand=expansion.latent_slots,
        inputs=lambda p: p.inputs("dataset", "vae"),
        params=expansion.latents_keys,
        cost=costs.latents,
    ),
    Stage(
        "features",
        "train the classifier that makes the features of FID",
        axes=("slot",),
        expand=expansion.classified_slots,
        inputs=lambda p: p.inputs("dataset"),
        params=lambda p: ("seed", ".features"),
        cost=costs.features,
    ),
    Stage(
        "reference",
        "features and moments of the data",
        axes=("slot",),
        expand=expansion.slots,
        inputs=lambda p: {**p.inputs("dataset"), **p.features()},
        params=expansion.reference_keys,
        cost=costs.reference,
    ),
    Stage(
        "reconstruction",
        "the distances of the images from themselves, encoded and decoded: the floor of a latent model's",
        axes=("slot",),
        expand=expansion.latent_slots,
        inputs=lambda p: {**p.inputs("latents", "vae"), **p.features(), **p.inputs("reference")},
        params=lambda p: tuple(f".evaluation.{key}" for key in ("spaces", "samples", "neighbours", "groups", "batch")),
        cost=costs.reconstruction,
    ),
    Stage(
        "teacher",
        "train a diffusion model, or import a published one",
        axes=("slot", "size"),
        expand=expansion.sizes,
        inputs=expansion.teacher_inputs,
        params=expansion.teacher_keys,
        cost=costs.teacher,
    ),
    Stage(
        "student",
        "train a consistency model",
        axes=("slot", "size", "method"),
        expand=expansion.students,
        inputs=expansion.student_inputs,
        params=expansion.student_keys,
        cost=costs.student,
    ),
    Stage(
        "evaluate",
        "sweep the guidance, select, measure again on fresh samples",
        axes=("slot", "size", "method"),
        expand=expansion.evaluated,
        inputs=lambda p: {**p.model(), **p.decoder(), **p.features(), **p.inputs("reference")},
        params=lambda p: (".sigma_data", ".evaluation"),
        cost=costs.evaluate,
    ),
)
