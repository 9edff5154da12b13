# SPDX-License-Identifier: Apache-2.0
"""What can be measured: the samples of a trained model, or a folder of PNG files."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.files import sha256_file
from pipeline.generation import noise_of, samples, student_of_job
from pipeline.modelling import MODEL, Decoder
from pipeline.params import Slot
from pipeline.provenance import meaning_of
from pipeline.sweep import Point
from scm_core.ema import load_snapshots, reconstruct
from scm_core.evaluate.folder import ImageFolder
from scm_core.nn.build import Model, load_model
from scm_core.nn.layers import normalized
from scm_core.sampling import diffusion_nfe

SNAPSHOTS = "snapshots"
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

    def facts(self, point: Point) -> dict[str, Any]:
        """What the images of a point depend on, as JSON values, the number of samples and their first index left out."""

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
        self.folder = inputs["student" if self.student else "teacher"]
        self.model: Model = load_model(self.folder / MODEL)
        self.model.net.to(self.device)
        self.name = str(self.model.info["run"])
        self.decode = Decoder(inputs, self.device)
        self.made_by = {"model": sha256_file(self.folder / MODEL), "decoder": self.decode.facts, "code": meaning_of(*CODE)}
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

    def __len__(self) -> int:
        return sys.maxsize

    def facts(self, point: Point) -> dict[str, Any]:
        teacher = None if self.student else {"solver": self.how.teacher.solver}
        average = {} if point.ema is None and point.nimg is None else {"snapshots": self._snapshots_digest()}
        return {
            **self.made_by,
            **average,
            "teacher": teacher,
            "method": self.student.method if self.student else None,
            "steps": point.steps,
            "t_mid": self.how.t_mid if self.student and point.steps > 1 else None,
            "guidance": point.guidance,
            "ema": point.ema,
            "nimg": point.nimg,
            "labels": self.slot.dataset.labels,
            "sigma_data": self.slot.sigma_data,
        }

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
                raise PipelineError(f"{self.name}: an earlier checkpoint needs the width of its average; add --ema 0.05")
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

    def _snapshots_digest(self) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in sorted(self._snapshots().glob("*.safetensors"))}


class FolderSubject:
    """A folder of PNG files, in the order of their names. A point's `samples` are the first ones."""

    is_folder = True
    steps = (0,)
    guidable = False
    guidance_range = None

    def __init__(self, path: Path) -> None:
        self.folder = ImageFolder(path)
        self.name = str(path)

    def __len__(self) -> int:
        return len(self.folder)

    def facts(self, point: Point) -> dict[str, Any]:
        return {"folder": self.folder.digest}

    def images(self, point: Point) -> Callable[[range], Tensor]:
        return lambda positions: self.folder(range(positions.start, min(positions.stop, len(self.folder))))

    def nfe(self, point: Point) -> int:
        """Nothing is sampled."""
        return 0

