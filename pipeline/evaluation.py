# SPDX-License-Identifier: Apache-2.0
"""Measuring sets of images: one pass through the networks of all feature spaces, every number from it, nothing computed twice.

What was measured lies below `runs/<scale>/.cache/evaluation`, under a key made of all that it depends on (see `Subject.facts`): a point that
is asked for again, by the same job, another one, or `python -m pipeline evaluate`, is read. A set that was cut short goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import canonical, read_json, sha256_text, write_json
from pipeline.params import Evaluation
from pipeline.provenance import meaning_of
from pipeline.spaces import load_extractor
from pipeline.subjects import Subject
from pipeline.sweep import Point
from scm_core.evaluate import Reference, load_reference
from scm_core.evaluate.manifold import precision_recall
from scm_core.evaluate.protocol import evaluate
from scm_core.evaluate.resampling import grouped_jackknife
from scm_core.evaluate.store import FeatureStore, fill
from scm_core.train.distributed import SINGLE, Ranks

METRICS_CODE = ("scm_core/evaluate/*.py",)


class Evaluator:
    """Measures points of a subject in feature spaces, against the reference of each.

    `cache` is the folder of what was measured. Several processes (`ranks`) share the sampling of a set; the first one computes the numbers.
    `progress` is told how many samples of the running set are there.
    """

    def __init__(
        self,
        subject: Subject,
        references: Mapping[str, Reference],
        inputs: Mapping[str, Path],
        how: Evaluation,
        cache: Path,
        progress: Callable[[int], None] = lambda done: None,
        ranks: Ranks = SINGLE,
        device: torch.device | None = None,
    ) -> None:
        self.subject, self.references, self.how, self.cache = subject, references, how, cache
        self.progress, self.ranks = progress, ranks
        self.extractors = {space: load_extractor(space, inputs, device or ranks.device) for space in references}
        for space, extractor in self.extractors.items():
            references[space].require(extractor.identity)
        self.code = meaning_of(*METRICS_CODE)

    def manifest(self, point: Point) -> dict[str, Any]:
        """All that the features of a point depend on, but the number of samples: more of them extend what is there."""
        return {
            "subject": self.subject.facts(point),
            "first_index": point.first_index,
            "chunk": self.how.batch,
            "spaces": {space: extractor.identity.to_json() for space, extractor in self.extractors.items()},
        }

    def filled(self, point: Point) -> FeatureStore:
        """The features of a point, made where they are not there."""
        store = FeatureStore(self.cache, self.manifest(point), point.samples, self.how.batch)
        fill(store, self.subject.images(point), self.extractors, progress=self.progress)
        return store

    def known(self, point: Point) -> bool:
        """Whether all numbers of a point were measured before."""
        manifest = self.manifest(point)
        return all(self._file(manifest, point, space).is_file() for space in self.references)

    def measure(self, point: Point) -> dict[str, dict[str, Any]]:
        """The numbers of a point by space: see `pipeline.sweep.NUMBERS`, and nfe and key."""
        manifest = self.manifest(point)
        kept = {space: self._file(manifest, point, space) for space in self.references}
        if not self.known(point):
            store = self.filled(point)
            self.ranks.wait()
            if self.ranks.first:
                for space, file in kept.items():
                    features = store.features(space, point.samples)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_json(file, numbers(features, self.references[space], self.how))
                if not self.how.keep_features:
                    store.drop()
            self.ranks.wait()
        self.progress(point.samples)
        shared = {"nfe": self.subject.nfe(point), "key": sha256_text(canonical(manifest))[:16]}
        return {space: {**shared, **_read(file)} for space, file in kept.items()}

    def _file(self, manifest: Mapping[str, Any], point: Point, space: str) -> Path:
        reference = self.references[space]
        compared = {
            "space": space,
            "samples": point.samples,
            "reference": reference.sha256,
            "neighbours": self.how.neighbours,
            "groups": self.how.groups,
            "code": self.code,
        }
        return self.cache / "numbers" / f"{sha256_text(canonical({**manifest, **compared}))[:40]}.json"


def _read(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise PipelineError(f"{file}: is no JSON object; remove it, and it will be measured again")
    return found


def numbers(features: Tensor, reference: Reference, how: Evaluation) -> dict[str, float | None]:
    """Every number of generated features (N, D) against a reference, with the errors of precision and recall if asked for."""
    found = evaluate(features, reference, how.neighbours)
    errors: Sequence[float | None] = (None, None)
    if how.groups:
        errors = grouped_jackknife(
            lambda part: precision_recall(reference.features, part, how.neighbours), features, how.groups
        )
    result = {key: value for key, value in found._asdict().items() if key != "samples"}
    return {**result, "precision_se": errors[0], "recall_se": errors[1]}


def load_references(spaces: Sequence[str], folder: Path, dataset: str | None = None) -> dict[str, Reference]:
    """The references of a slot's spaces in the output of its reference job; ValueError for those of another data set."""
    return {space: load_reference(folder / space, dataset=dataset) for space in spaces}


def reference_of(
    path: Path, extractors: Mapping[str, Extractor], how: Evaluation, cache: Path
) -> dict[str, Reference]:
    """A reference in each space from a folder of PNG files."""
    folder = ImageFolder(path)
    manifest = {
        "subject": {"folder": folder.digest},
        "first_index": 0,
        "chunk": how.batch,
        "spaces": {space: extractor.identity.to_json() for space, extractor in extractors.items()},
    }
    store = FeatureStore(cache, manifest, len(folder), how.batch)
    fill(store, folder.images, extractors)
    name = f"folder {path.name}"
    references = {
        space: reference_from(store.features(space, len(folder)), name, folder.digest, extractor.identity)
        for space, extractor in extractors.items()
    }
    store.drop()
    return references
