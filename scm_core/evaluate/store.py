# SPDX-License-Identifier: Apache-2.0
"""The features of one image set on disk: computed once, by any number of processes, in chunks that survive what kills them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scm_core.claims import work_off
from scm_core.disk import StoreError, failure, replace_file, warn
from scm_core.evaluate.chunks import Chunks, Layout
from scm_core.evaluate.filling import STAYS, Filler, Images
from scm_core.evaluate.folder import KeptImages
from scm_core.evaluate.manifest import FeatureExtractor, identities, manifest_json, manifest_key
from scm_core.train.lock import HeldError, exclusive
from scm_core.train.resume import changes

__all__ = ["FeatureStore", "StoreError", "StoreInUseError"]

MANIFEST, CLAIMS = "manifest.json", "claims"


class StoreInUseError(StoreError):
    """Another process is filling the store."""


class FeatureStore:
    """The features of the image set that `manifest` describes, below `folder` in a folder named `manifest_key(manifest)`.

    `manifest` (JSON values: `SampleManifest.to_json()` or `ImagesManifest.to_json()`) holds `chunk`, `extractors` by name with their
    identities and, if the set ends, its `size`; not `count`, the number of samples wanted now: more samples extend a store. Chunk c
    holds samples c·chunk … (c + 1)·chunk − 1. Whole chunks are computed and cut on loading, also where `count` ends within one,
    so that the digits of the first N samples do not depend on N; only the end of a set makes a chunk short.

    Raises ValueError for arguments that disagree, StoreError (a ValueError) if the folder is that of another manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Mapping[str, Any],
        count: int,
        chunk: int,
        warn: Callable[[str], None] = warn,
    ) -> None:
        self.manifest: dict[str, Any] = json.loads(manifest_json(manifest))
        self.key = manifest_key(self.manifest)
        self.path, self.warn = Path(folder) / self.key, warn
        described, known = self.manifest.get("chunk"), self.manifest.get("extractors")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1 or chunk != described:
            raise ValueError(f"chunk: expected a whole number ≥ 1, that of the manifest ({described!r}), got {chunk!r}")
        if not isinstance(known, dict) or not known:
            raise ValueError(f"manifest.extractors: expected the extractors' identities by name, got {known!r}")
        self.chunk, self.size = chunk, self.manifest.get("size")
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise ValueError(f"manifest.size: expected the number of images of the set, got {self.size!r}")
        self.chunks = Chunks(self.path, self.key, tuple(sorted(known)))
        self.count = self._checked_count(count)
        self._require_manifest()

    def fill(
        self,
        images: Images,
        extractors: Mapping[str, FeatureExtractor],
        *,
        shard: tuple[int, int] = (0, 1),
        progress: Callable[[int], None] | None = None,
        keep_images: str | Path | None = None,
    ) -> None:
        """Compute what is missing of the first `count` samples; returns when all of it is there and verified.

        `images(range)` gives a chunk's uint8 images (B, 1 or 3, H, W), counted from 0 (a manifest's `first_index` is the caller's to
        add); every extractor sees them as one batch. Any number of processes may fill one store: each takes the next chunk that is
        neither there nor being made, those with index ≡ rank modulo ranks (`shard`: rank, ranks) first, and waits for what others
        are making. A chunk is claimed by a lock that ends with its process: what a killed one left is taken over. Locks (flock) hold
        between the processes of a machine, and between machines where the file system passes them on (NFS 4, NFS 3 with its
        lock daemon, Lustre mounted with `flock`). Where they end at a machine, or an NFS client's listing is seconds old, two may
        make the same chunk, one in vain: it is renamed into place whole, to the same name if the digits agree, and refused if not.

        A damaged chunk is set aside with a warning and computed again. `progress` gets the number of samples done. `keep_images` is a
        folder for the images of the first `count` samples as PNG; they are made again where only the features are there.

        Raises ValueError for images or features of a wrong kind, or not finite, before anything of that chunk is written, and
        StoreError if writing fails; the chunks that are there stay.
        """
        self._require_extractors(extractors)
        self._prepare()
        kept = None if keep_images is None else KeptImages(keep_images, self.key)
        filler = Filler(self.chunks, self.path / CLAIMS, images, extractors, kept, self.count, self.warn)
        done = 0

        def settle(index: int) -> str | None:
            nonlocal done
            samples = self._samples(index)
            holder = filler.settle(index, samples)
            if holder is None:
                done += min(samples.stop, self.count) - samples.start
                if progress is not None:
                    progress(done)
            return holder

        def waiting(index: int, holder: str) -> None:
            self.warn(f"{self.path}: waiting for chunk {index}, which {holder} is making")

        work_off(self._chunks(self.count), settle, shard, waiting)

    def features(self, name: str, count: int | None = None) -> Tensor:
        """Features (N, D) float32 of the first `count` samples (the store's own if None) by the extractor `name`, in order.

        Needs the result's memory and one chunk's. Raises as `parts`.
        """
        count = self.count if count is None else self._checked_count(count)
        result, start = None, 0
        for part in self.parts(name, count):
            if result is None:
                result = torch.empty(count, part.shape[1])
            result[start : start + len(part)] = part
            start += len(part)
        assert result is not None, "a count is at least 1"
        return result

    def parts(self, name: str, count: int | None = None) -> Iterator[Tensor]:
        """The same chunk by chunk, (rows, D) each, verified one by one, in the memory of one.

        Raises ValueError for a name that is not in the manifest, StoreError for chunks that are missing, damaged or do not go together.
        """
        count = self.count if count is None else self._checked_count(count)
        if name not in self.chunks.names:
            raise ValueError(
                f"{self.path}: has no features {name!r}; the manifest names {', '.join(self.chunks.names)}"
            )
        there = self.chunks.published()
        missing = [index for index in range(self._chunks(count)) if index not in there]
        if missing:
            raise StoreError(
                f"{self.path}: of the {self._chunks(count)} chunks of {count} samples {len(missing)} are missing, from {missing[0]} on; "
                "fill the store"
            )
        layout: Layout | None = None
        for index in range(self._chunks(count)):
            samples = self._samples(index)
            try:
                chunk = self.chunks.read(index, there[index], len(samples))
            except StoreError as error:
                raise StoreError(f"{error}; fill the store again, which sets it aside and computes it anew") from error
            if layout not in (None, chunk.layout):
                raise StoreError(
                    f"{there[index]}: a chunk of {chunk.layout}, where those before have {layout}; delete the store and fill it from "
                    "one set"
                )
            layout = chunk.layout
            yield chunk.features[name][: count - samples.start]

    def drop(self) -> int:
        """Remove all features, whose results were taken, leave the manifest, and return the bytes freed.

        Raises StoreInUseError, and removes nothing, while a process is filling the store; StoreError if removing fails.
        """
        freed = self.bytes()
        with contextlib.ExitStack() as stack:
            try:
                claims = list((self.path / CLAIMS).glob("*.lock"))
                for claim in claims:
                    stack.enter_context(exclusive(claim))
                for path in (*self._files(), *claims):
                    path.unlink(missing_ok=True)
            except HeldError as error:
                raise StoreInUseError(
                    f"{self.path}: is being filled by {error}; wait for it and drop it then"
                ) from None
            except OSError as error:
                raise failure(self.path, error, "removing features", "what is left is valid") from error
        return freed

    def bytes(self) -> int:
        """What `drop` would free."""
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        """Everything but the manifest and the claims: chunks, those set aside, and what killed writers left."""
        return [path for pattern in ("chunk-*", "bad-*", ".*.tmp") for path in self.path.glob(pattern)]

    def _chunks(self, count: int) -> int:
        return -(-count // self.chunk)

    def _samples(self, index: int) -> range:
        stop = (index + 1) * self.chunk
        return range(index * self.chunk, stop if self.size is None else min(stop, self.size))

    def _checked_count(self, count: int) -> int:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count: expected a number of samples ≥ 1, got {count!r}")
        if self.size is not None and count > self.size:
            raise ValueError(f"count: expected at most the {self.size} images of the set, got {count}")
        return count

    def _require_extractors(self, extractors: Mapping[str, FeatureExtractor]) -> None:
        words = changes(self.manifest["extractors"], json.loads(manifest_json(identities(extractors))))
        if words:
            raise ValueError(
                f"extractors: expected those of the manifest, got others ({'; '.join(words)}); make the manifest with `identities` of these"
            )

    def _require_manifest(self) -> bool:
        """Whether there is a manifest; StoreError if it is another."""
        file = self.path / MANIFEST
        try:
            text = file.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise failure(file, error, "reading the manifest", STAYS) from error
        try:
            stored = json.loads(text)
            same = manifest_json(stored) == manifest_json(self.manifest)
        except ValueError as error:
            raise StoreError(f"{file}: damaged ({error}); delete {self.path} and fill it again") from error
        if not same:
            words = "; ".join(changes(stored, self.manifest)) if isinstance(stored, dict) else "it is no object"
            raise StoreError(
                f"{file}: is the manifest of another set ({words}); delete {self.path}, or restore its manifest"
            )
        return True

    def _prepare(self) -> None:
        try:
            (self.path / CLAIMS).mkdir(parents=True, exist_ok=True)
            if self._require_manifest():
                return
            text = json.dumps(self.manifest, indent=1, sort_keys=True) + "\n"
            replace_file(self.path / MANIFEST, text.encode(), durable=True)
        except OSError as error:
            raise failure(self.path, error, "opening the store", STAYS) from error
