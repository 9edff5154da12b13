# SPDX-License-Identifier: Apache-2.0
"""Measuring sets of images: one pass through the networks of all feature spaces, every number from it, nothing computed twice.

What was measured lies below `runs/<scale>/.cache/evaluation`, under a key made of all that it depends on (see `Subject.manifest`). A
point that is asked for again, by the same job, another one, or `python -m pipeline evaluate`, is read. A set that was cut short goes on
where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import Lock, canonical, read_json, sha256_text, write_json
from pipeline.params import Evaluation
from pipeline.provenance import meaning_of
from pipeline.spaces import load_extractor
from pipeline.subjects import Subject, images_manifest
from pipeline.sweep import Numbers, Point
from scm_core.evaluate import Reference, Subset, load_reference
from scm_core.evaluate.extractors import Extractor
from scm_core.evaluate.folder import ImageFolder
from scm_core.evaluate.manifest import identities
from scm_core.evaluate.protocol import evaluate
from scm_core.evaluate.protocol import reference_of as make
from scm_core.evaluate.store import FeatureStore, StoreInUseError

METRICS_CODE = ("scm_core/evaluate/*.py",)


class Evaluator:
    """Measures points of a subject in feature spaces, against the reference of each.

    `cache` is the folder of what was measured, `device` where images and features are computed. Several processes may measure the same
    points at a time: they share the sampling. Those that were started for it wait for each other in `together`, before one of them
    removes the features. `progress` is told how many samples of the running set are there.
    """

    def __init__(
        self,
        subject: Subject,
        references: Mapping[str, Reference],
        inputs: Mapping[str, Path],
        how: Evaluation,
        cache: Path,
        progress: Callable[[int], None] = lambda done: None,
        device: torch.device | None = None,
        together: Callable[[], None] = lambda: None,
    ) -> None:
        self.subject, self.references, self.how, self.cache = subject, references, how, cache
        self.progress, self.together, self.device = progress, together, device
        self.extractors = {space: load_extractor(space, inputs, device) for space in references}
        for space, extractor in self.extractors.items():
            references[space].require(extractor.identity)
        self.code = meaning_of(*METRICS_CODE)

    def store(self, point: Point) -> FeatureStore:
        """Where the features of a point are kept."""
        manifest = self.subject.manifest(point, self.how.batch, identities(self.extractors))
        return FeatureStore(self.cache / "features", manifest, point.samples, self.how.batch)

    def filled(self, point: Point, keep_images: Path | None = None) -> FeatureStore:
        """The features of a point, made where they are not there; its images as PNG files in a folder, if one is given."""
        store = self.store(point)
        images = self.subject.images(point)
        store.fill(images, self.extractors, progress=self.progress, keep_images=keep_images)
        return store

    def known(self, point: Point) -> bool:
        """Whether all numbers of a point were measured before."""
        return _all_there(self._files(point, self.store(point).key))

    def measure(self, point: Point) -> Numbers:
        """The numbers of a point by space: see `pipeline.sweep.NUMBERS`, and nfe and key. Its features go, unless they are to stay."""
        store = self.store(point)
        files = self._files(point, store.key)
        if not _all_there(files):
            self.filled(point)
        self.together()  # also where all is known: another process may have looked before somebody's numbers were there
        folder = self.cache / "numbers"
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / f".{store.key[:40]}.lock")
        with lock.held():  # of several processes one computes, and the others find it done
            if not _all_there(files):
                self.filled(point)  # takes no time, unless somebody has removed them meanwhile
                for space, file in files.items():
                    write_json(file, numbers(store.features(space), self.references[space], self.how, self.device))
            if not self.how.keep_features:
                forget(store)
        self.progress(point.samples)
        shared = {"nfe": self.subject.nfe(point), "key": store.key[:16]}
        return {space: {**shared, **_read(file)} for space, file in files.items()}

    def _files(self, point: Point, key: str) -> dict[str, Path]:
        """Where the numbers of a point are kept, by space: under a name made of all that they depend on."""
        compared = {
            "features": key,
            "samples": point.samples,
            "neighbours": self.how.neighbours,
            "groups": self.how.groups,
            "code": self.code,
        }
        return {
            space: self.cache / "numbers" / f"{sha256_text(canonical({**compared, space: reference.key}))[:40]}.json"
            for space, reference in self.references.items()
        }


def _all_there(files: Mapping[str, Path]) -> bool:
    return all(file.is_file() for file in files.values())


def forget(store: FeatureStore) -> None:
    """Remove features whose numbers were taken, unless somebody is adding to them."""
    if store.bytes():
        with contextlib.suppress(StoreInUseError):
            store.drop()


def _read(file: Path) -> dict[str, Any]:
    found = read_json(file)
    if not isinstance(found, dict):
        raise PipelineError(f"{file}: is no JSON object; remove it, and it will be measured again")
    return found


def numbers(
    features: Tensor, reference: Reference, how: Evaluation, device: torch.device | None = None
) -> dict[str, float | None]:
    """Every number of generated features (N, D) against a reference, with the errors of precision and recall if asked for."""
    found = evaluate(features, reference, how.neighbours, device=device, groups=how.groups)
    return {key: value for key, value in found._asdict().items() if key != "samples"}


def load_references(spaces: Sequence[str], folder: Path, dataset: str | None = None) -> dict[str, Reference]:
    """The references of a slot's spaces in the output of its reference job; ValueError for those of another data set."""
    return {space: load_reference(folder / space, dataset=dataset) for space in spaces}


def reference_of(
    path: Path, extractors: Mapping[str, Extractor], how: Evaluation, cache: Path, subset: Subset | None = None
) -> dict[str, Reference]:
    """A reference in each space from a folder of PNG files."""
    folder = ImageFolder(path)
    manifest = images_manifest(folder, how.batch, identities(extractors))
    store = FeatureStore(cache / "features", manifest, len(folder), how.batch)
    store.fill(folder, extractors)
    name = f"folder {path.resolve().name}"
    references = {
        space: make(store.parts(space), len(folder), name, folder.digest, extractor.identity, subset)
        for space, extractor in extractors.items()
    }
    if not how.keep_features:
        forget(store)
    return references
