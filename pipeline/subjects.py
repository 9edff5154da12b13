# SPDX-License-Identifier: Apache-2.0
"""What can be measured: the samples of a trained model, or a folder of PNG files."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.files import canonical, sha256_file, sha256_text
from pipeline.generation import consistency_times, noise_of, samples, student_of_job
from pipeline.modelling import MODEL, Decoder
from pipeline.params import Slot
from pipeline.provenance import meaning_of
from pipeline.students import MultistepTraining
from pipeline.sweep import Point
from scm_core.ema import load_snapshots, reconstruct
from scm_core.evaluate.folder import ImageFolder
from scm_core.evaluate.manifest import ImagesManifest, SampleManifest
from scm_core.nn.build import Model, load_model
from scm_core.nn.layers import normalized
from scm_core.sampling import diffusion_nfe

SNAPSHOTS = "snapshots"
Identities = Mapping[str, Mapping[str, Any]]  # of extractors, by space
# what a sample depends on beside weights and settings
CODE = ("scm_core/*.py", "scm_core/nn/*.py", "scm_core/data/*.py", "pipeline/generation.py", "pipeline/modelling.py")


class Subject(Protocol):
    """Images by index, and all that they depend on."""

    name: str
    is_folder: bool

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of sampling steps that it can be measured at."""

    @property
    def guidable(self) -> bool:
        """Whether guidance does anything to it."""

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The scales that it was trained on, where they are an input of it."""

    def __len__(self) -> int:
        """How many images there are at most."""

    def manifest(self, point: Point, chunk: int, extractors: Identities) -> dict[str, Any]:
        """All that the features of a point depend on, as JSON values, but the number of samples: more of them extend what is there."""

    def images(self, point: Point) -> Callable[[range], Tensor]:
        """A function from positions in the set (0 is the point's first) to uint8 images (B, C, H, W)."""

    def nfe(self, point: Point) -> int:
        """Forward passes of the network for one sample."""


class ModelSubject:
    """A teacher or a student, sampled as params.yaml describes it. `inputs` are those of its evaluate job."""

    is_folder = False

    def __init__(
        self, slot: Slot, size: str, method: str, inputs: Mapping[str, Path], device: torch.device | None = None
    ) -> None:
        self.slot, self.how, self.device = slot, slot.evaluation, device or torch.device("cpu")
        self.student = student_of_job(slot, size, method)
        self.training = self.student or slot.teacher_for(size)
        self.folder = inputs["student" if self.student else "teacher"]
        self.model: Model = load_model(self.folder / MODEL)
        self.model.net.to(self.device)
        self.name = str(self.model.info["run"])
        self.decode = Decoder(slot, inputs, self.device)
        self.weights, self.code = sha256_file(self.folder / MODEL), meaning_of(*CODE)
        self._variant: tuple[tuple[float | None, int | None], nn.Module] = ((None, None), self.model.net)

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of sampling steps that it is measured at."""
        return self.student.steps if self.student else (self.how.teacher.steps,)

    @property
    def guidable(self) -> bool:
        """Whether guidance does anything to it."""
        return bool(self.model.config["guidance_input"]) if self.student else self.slot.dataset.labels > 0

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return self.student.guidance if self.student else None

    @property
    def averages(self) -> list[float]:
        """The relative widths of other averages that params.yaml asks for; none of a training that keeps no snapshots."""
        known = self.training.ema_sigma_rel
        return [width for width in self.how.averages if width != known] if self.training.snapshots else []

    @property
    def checkpoints(self) -> list[tuple[float, int]]:
        """Width and images seen of the earlier checkpoints that params.yaml asks for; none of a training that keeps no snapshots.

        The width is the published average's, or where that has none (a half-life) the first of the snapshots'.
        """
        training = self.training
        if training.snapshots is None or not training.snapshots.measured:
            return []
        width = training.ema_sigma_rel or training.snapshots.sigma_rel[0]
        return [(width, n * training.batch) for n in self.how.checkpoints if n < training.iterations]

    def __len__(self) -> int:
        return sys.maxsize

    def manifest(self, point: Point, chunk: int, extractors: Identities) -> dict[str, Any]:
        labels = self.slot.dataset.labels
        sampler, times = self._sampler(point.steps)
        return SampleManifest(
            model_sha256=self._digest(point),
            sampler=sampler,
            steps=point.steps,
            times=times,
            guidance=point.guidance,
            sigma_data=self.slot.sigma_data,
            noise="sample_noise",
            first_index=point.first_index,
            labels=f"index mod {labels}" if labels else "none",
            decoder_sha256=sha256_text(canonical(self.decode.facts)) if self.decode.facts else None,
            dtype=str(self.model.config.get("precision", "fp32")),
            code=self.code,
            chunk=chunk,
            extractors=extractors,
        ).to_json()

    def _sampler(self, steps: int) -> tuple[str, tuple[float, ...] | None]:
        """The sampler's name, and its times where it does not choose them itself."""
        if self.student is None:
            return self.how.teacher.solver, None
        if isinstance(self.student, MultistepTraining):
            return "multistep", None
        return "consistency", consistency_times(self.slot, steps)

    def _digest(self, point: Point) -> str:
        """SHA-256 of the weights, or of what another average of them is made of."""
        if point.ema is None and point.nimg is None:
            return self.weights
        average = {"model": self.weights, "stored": self._stored, "ema": point.ema, "nimg": point.nimg}
        return sha256_text(canonical(average))

    @functools.cached_property
    def _stored(self) -> dict[str, str]:
        """The digests of the snapshots."""
        return {path.name: sha256_file(path) for path in sorted(self._snapshots().glob("*.safetensors"))}

    def images(self, point: Point) -> Callable[[range], Tensor]:
        net = self._net(point.ema, point.nimg)
        config = self.model.config
        shape = (config["channels"], config["resolution"], config["resolution"])

        def at(positions: range) -> Tensor:
            indices = range(point.first_index + positions.start, point.first_index + positions.stop)
            labels = torch.tensor([i % max(self.slot.dataset.labels, 1) for i in indices], device=self.device)
            noise = [z.to(self.device) for z in noise_of(self.student, indices, shape, point.steps)]
            return self.decode(samples(self.slot, self.student, net, noise, labels, point.guidance)).cpu()

        return at

    def nfe(self, point: Point) -> int:
        """Classifier-free guidance doubles the teacher's."""
        if self.student is None:
            return diffusion_nfe(self.how.teacher.solver, point.steps, guidance=point.guidance not in (None, 1.0))
        return point.steps

    def _net(self, ema: float | None, nimg: int | None) -> nn.Module:
        """The network with the average that was asked for; the last one stays in memory."""
        if (ema, nimg) == (None, None):
            return self.model.net
        if self._variant[0] != (ema, nimg):
            stored = load_snapshots(self._snapshots())
            if ema is None:
                raise PipelineError(
                    f"{self.name}: an earlier checkpoint needs the width of its average; add --ema 0.05"
                )
            weights = normalized(self.model.net, reconstruct(stored, ema, nimg))
            net = copy.deepcopy(self.model.net)
            net.load_state_dict(weights, strict=False)
            self._variant = ((ema, nimg), net.to(self.device))
        return self._variant[1]

    def _snapshots(self) -> Path:
        folder = self.folder / SNAPSHOTS
        if not folder.is_dir():
            raise PipelineError(
                f"{self.name}: has no snapshots to make another average of; give its training a section `snapshots` in params.yaml"
            )
        return folder


class FolderSubject:
    """A folder of PNG files, in the order of their names. A point's `samples` are the first ones."""

    is_folder = True
    steps = (0,)
    guidable = False
    guidance_range = None

    def __init__(self, path: Path) -> None:
        self.folder = ImageFolder(path)
        self.name, self.size = str(path), self.folder.shape[1:]

    def __len__(self) -> int:
        return len(self.folder)

    def manifest(self, point: Point, chunk: int, extractors: Identities) -> dict[str, Any]:
        return images_manifest(self.folder, chunk, extractors)

    def images(self, point: Point) -> Callable[[range], Tensor]:
        return self.folder

    def nfe(self, point: Point) -> int:
        """Nothing is sampled."""
        return 0


def images_manifest(folder: ImageFolder, chunk: int, extractors: Identities) -> dict[str, Any]:
    """All that the features of a folder's images depend on."""
    return ImagesManifest(images_sha256=folder.digest, size=len(folder), chunk=chunk, extractors=extractors).to_json()
