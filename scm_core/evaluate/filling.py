# SPDX-License-Identifier: Apache-2.0
"""How a feature store's chunks are made, each by one of several processes: claim, look again, compute, check, publish."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from scm_core.claims import claimed
from scm_core.disk import StoreError, failure
from scm_core.evaluate.chunks import Chunk, Chunks, Layout
from scm_core.evaluate.folder import KeptImages
from scm_core.evaluate.manifest import FeatureExtractor
from scm_core.train.lock import HeldError

STAYS = "the chunks that are there stay"
SHOWN = 10  # samples named in an error

Images = Callable[[range], Tensor]


class Filler:
    """Makes the chunks of a store from images and extractors; `claims` is the locks' folder, `kept` takes the images below `count`."""

    def __init__(
        self,
        chunks: Chunks,
        claims: Path,
        images: Images,
        extractors: Mapping[str, FeatureExtractor],
        kept: KeptImages | None,
        count: int,
        warn: Callable[[str], None],
    ) -> None:
        self.chunks, self.claims, self.images, self.extractors = chunks, claims, images, extractors
        self.kept, self.count, self.warn = kept, count, warn
        self.layout: Layout | None = None  # of the chunks seen so far

    def settle(self, index: int, samples: range) -> str | None:
        """See to it that chunk `index` of these samples is there and verified: None, or who is making it now.

        Raises as `FeatureStore.fill`.
        """
        path = self.chunks.find(index)
        if path is not None and self._problem(index, path, samples) is None and not self._lacks_images(samples):
            return None
        try:
            with claimed(self.claims / f"chunk-{index:08d}.lock", f"chunk {index}", STAYS):
                path = self.chunks.find(index)  # again: who held the claim may have made it meanwhile
                problem = None if path is None else self._problem(index, path, samples)
                if path is not None and problem is not None:
                    self._set_aside(path, problem)
                    path = None
                if path is None or self._lacks_images(samples):
                    self._make(index, samples, features=path is None)
        except HeldError as error:
            return str(error)
        return None

    def _lacks_images(self, samples: range) -> bool:
        return self.kept is not None and self.kept.missing(self._wanted(samples))

    def _wanted(self, samples: range) -> range:
        return range(samples.start, min(samples.stop, self.count))

    def _problem(self, index: int, path: Path, samples: range) -> str | None:
        """What is wrong with a chunk's file, or None; StoreError if it is sound, and of other images than those before."""
        try:
            chunk = self.chunks.read(index, path, len(samples))
        except StoreError as error:
            return str(error)
        self._require_layout(chunk.layout, f"{path}: a chunk", "delete the store and fill it from one set")
        return None

    def _require_layout(self, layout: Layout, what: str, remedy: str) -> None:
        if self.layout is None:
            self.layout = layout
        elif layout != self.layout:
            raise StoreError(f"{what} of {layout}, where the chunks before have {self.layout}; {remedy}")

    def _set_aside(self, path: Path, problem: str) -> None:
        # Renamed, not deleted, one for each chunk: whoever looks for the cause needs it.
        aside = path.with_name(f"bad-{path.name}")
        try:
            os.replace(path, aside)
        except OSError as error:
            raise failure(path, error, "setting a damaged chunk aside", STAYS) from error
        self.warn(f"{problem}; kept as {aside.name}, and computed again")

    def _make(self, index: int, samples: range, features: bool) -> None:
        words = f"samples {samples.start}…{samples.stop - 1}"
        batch = checked_images(self.images(samples), len(samples), f"images of {words}")
        image = tuple(batch.shape[1:])
        chunk = None
        if features:
            chunk = Chunk(
                {
                    name: checked_features(extractor(batch), samples, f"features {name} of {words}")
                    for name, extractor in self.extractors.items()
                },
                image,
            )
            layout = chunk.layout
        else:
            assert self.layout is not None, "a chunk without features to compute has been read"
            layout = self.layout._replace(image=image)
        self._require_layout(layout, f"images and features of {words} are", "give all samples of a set one size")
        if self.kept is not None:
            wanted = self._wanted(samples)
            self.kept.write(wanted, batch[: len(wanted)])
        if chunk is not None:
            try:
                self.chunks.write(index, chunk)
            except OSError as error:
                raise failure(self.chunks.path, error, f"writing chunk {index}", STAYS) from error


def checked_images(batch: Tensor, rows: int, what: str) -> Tensor:
    """The images, if they are uint8 (rows, 1 or 3, H, W); else ValueError, which says what they are."""
    if not isinstance(batch, Tensor):
        raise StoreError(f"{what}: expected a tensor, got {type(batch).__name__}")
    if batch.dtype != torch.uint8:
        low_high = f" in {float(batch.min()):.3g}…{float(batch.max()):.3g}" if batch.numel() else ""
        raise StoreError(f"{what}: expected uint8 in 0…255, got {batch.dtype}{low_high}; round them with to_uint8")
    if batch.ndim != 4 or len(batch) != rows or batch.shape[1] not in (1, 3) or batch.numel() == 0:
        raise StoreError(
            f"{what}: expected shape ({rows}, 1 or 3, H, W), got {tuple(batch.shape)}; give one image for each index"
        )
    return batch


def checked_features(features: Tensor, samples: range, what: str) -> Tensor:
    """The features on the CPU, if they are finite float32 (rows, D); else ValueError, which names samples that are not finite."""
    if features.ndim != 2 or len(features) != len(samples) or features.shape[1] < 1 or features.dtype != torch.float32:
        raise StoreError(
            f"{what}: expected float32 ({len(samples)}, D), got {features.dtype} {tuple(features.shape)}; mend the extractor"
        )
    features = features.detach().cpu()
    bad = (~torch.isfinite(features)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(str(samples[i]) for i in bad[:SHOWN]) + (
            f" and {len(bad) - SHOWN} more" if bad[SHOWN:] else ""
        )
        raise StoreError(f"{what}: NaN or infinite for {named}; look at these images and at the extractor's dtype")
    return features
