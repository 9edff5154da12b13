# SPDX-License-Identifier: Apache-2.0
"""What `evaluate` and `compare` were asked to measure: a run or a folder of PNG files, in which spaces, against which reference."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline import manifest, paths, registry
from pipeline.errors import PipelineError, suggestion
from pipeline.job import REPORT_SLOT
from pipeline.params import Params, Slot
from pipeline.sample import find_trained, require_result
from pipeline.spaces import SPACES, load_extractor, subset_of

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.evaluation import Evaluator
    from pipeline.subjects import Subject
    from pipeline.sweep import Numbers, Point
    from scm_core.evaluate import Reference

MOST = 10_000  # numbers in a list of the command line


class Metric(NamedTuple):
    """A name of --metrics: the distance whose space it is about (None: every space that is asked for), and its columns."""

    distance: str | None
    columns: tuple[str, ...]


METRICS: Mapping[str, Metric] = {
    "fid": Metric("fid", ("fid", "fid_se", "fid_bias")),
    "fd_dinov2": Metric("fd_dinov2", ("fid", "fid_se", "fid_bias")),
    "prdc": Metric(None, ("precision", "precision_se", "recall", "recall_se", "density", "coverage")),
    "kid": Metric(None, ("kid",)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both commands have."""
    parser.add_argument(
        "--metrics",
        default="fid,prdc",
        metavar="LIST",
        help=f"of {', '.join(METRICS)} (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, help="of each set (default: evaluation.samples, or the whole folder)")
    parser.add_argument("--first", type=int, help="index of the first sample (default: evaluation.report_seed)")
    parser.add_argument("--slot", help="whose reference and networks a folder of images is measured with")
    parser.add_argument("--reference", metavar="FOLDER", type=Path, help="of PNG files, instead of the slot's data set")
    parser.add_argument("--scale", help="of params.yaml (default: the active one)")


@dataclass(frozen=True)
class Target:
    """Something to measure, and what it takes: the subject, the evaluator of its points, the slot, and names for the table."""

    subject: Subject
    evaluator: Evaluator
    slot: Slot
    names: Mapping[str, str]

    def measure(self, point: Point) -> Numbers:
        """The numbers of a point by space, with a bar on the way where there is a terminal."""
        from tqdm import tqdm

        with tqdm(total=point.samples, desc=self.subject.name, unit="img", leave=False, disable=None) as bar:
            self.evaluator.progress = lambda done: bar.update(done - bar.n)
            return self.evaluator.measure(point)

    def features(self, point: Point) -> dict[str, Tensor]:
        """The features of a point by space."""
        store = self.evaluator.filled(point)
        return {space: store.features(space) for space in self.evaluator.references}

    def keep_images(self, point: Point, folder: Path) -> None:
        """Write the images of a point to a folder, as PNG files named by their place in the set."""
        self.evaluator.filled(point, folder)

    def check_steps(self, run: str, steps: int) -> None:
        """PipelineError unless the subject samples in so many steps."""
        known = self.subject.steps
        if steps not in known:
            raise PipelineError(f"--steps: {run} samples in {' or '.join(map(str, known))} steps, got {steps}")

    def check_guidance(self, run: str, scales: Sequence[float]) -> None:
        """PipelineError for scales that are none, or beyond those that the subject was trained on."""
        low, high = self.subject.guidance_range or (0, math.inf)
        for scale in scales:
            if not low <= scale <= high or math.isinf(scale):
                known = (
                    f"takes scales of at least {low:g}"
                    if math.isinf(high)
                    else f"was trained on scales {low:g} to {high:g}"
                )
                raise PipelineError(f"--guidance: {run} {known}, got {scale:g}")

    def check_samples(self, run: str, count: int) -> None:
        """PipelineError for fewer samples than the metrics need, or more than there are."""
        how = self.slot.evaluation
        if count > len(self.subject):
            raise PipelineError(f"--samples: {run} holds {len(self.subject)} images, {count} are asked for")
        if count <= how.neighbours:
            raise PipelineError(f"--samples: must be above evaluation.neighbours ({how.neighbours}), got {count}")
        if how.groups and (count < how.groups or count - math.ceil(count / how.groups) <= how.neighbours):
            raise PipelineError(
                f"--samples: {count} are too few for errors from evaluation.groups ({how.groups}) and evaluation.neighbours "
                f"({how.neighbours}); measure more"
            )

    @property
    def default_samples(self) -> int:
        """How many are measured unless told."""
        return len(self.subject) if self.subject.is_folder else self.slot.evaluation.samples


class Asked:
    """The options of a command line, checked; `target` turns a RUN into something to measure."""

    def __init__(self, params: Params, options: argparse.Namespace) -> None:
        self.params, self.options = params, options
        self._known: dict[str, dict[str, Reference]] = {}  # references from the folder of --reference, by slot
        self.metrics = [METRICS[self._metric(name)] for name in words(options.metrics, "--metrics")]
        for name in ("samples", "first"):
            value = getattr(options, name)
            if value is not None and value < (name == "samples") * 2:
                raise PipelineError(f"--{name}: must be at least {2 if name == 'samples' else 0}, got {value}")

    def _metric(self, name: str) -> str:
        if name not in METRICS:
            raise PipelineError(f"--metrics: {name}: {suggestion(name, METRICS, 'metrics')}")
        return name

    @property
    def columns(self) -> list[str]:
        """The columns of the chosen metrics."""
        return list(dict.fromkeys(column for metric in self.metrics for column in metric.columns))

    def spaces(self, slot: Slot, name: str) -> list[str]:
        """The feature spaces of a slot that the metrics are about."""
        wanted = {metric.distance for metric in self.metrics if metric.distance is not None}
        known = {SPACES[space].distance: space for space in slot.evaluation.spaces}
        for distance in sorted(wanted - known.keys()):
            others = [space for space, declared in SPACES.items() if declared.distance == distance]
            raise PipelineError(
                f"{distance}: slot {name} is not measured in its features; add {' or '.join(others)} to evaluation.spaces of params.yaml"
            )
        return [known[distance] for distance in known if not wanted or distance in wanted]

    def target(self, run: str) -> Target:
        """The model or the folder that RUN names; PipelineError if it is neither, or if something that it needs is not made yet."""
        from pipeline.evaluation import Evaluator
        from pipeline.subjects import FolderSubject, ModelSubject
        from scm_core.train.distributed import own_device

        folder, device = Path(run), own_device()
        slots = self.params.active.slots
        subject: Subject
        if folder.is_dir() and not (folder / paths.MANIFEST).is_file():
            axes = {"slot": self._slot()}
            reference = registry.find(self.params, "reference", axes)
            inputs = self._made({**reference.inputs, "reference": reference.outputs[0]})
            subject = FolderSubject(folder)
            self._check_size(run, subject.size, slots[axes["slot"]])
        else:
            trained = find_trained(run, self.params)
            require_result(run, trained)
            axes = {"method": "teacher", **trained.axes}
            inputs = self._made(registry.find(self.params, "evaluate", axes).inputs)
            subject = ModelSubject(slots[axes["slot"]], axes["size"], axes["method"], inputs, device)
        slot = slots[axes["slot"]]
        names = {"subject": subject.name, **{key: axes.get(key, "") for key in ("slot", "size", "method")}}
        references = self._references(slot, axes["slot"], inputs)
        cache = paths.evaluation_cache(self.params.scale)
        evaluator = Evaluator(subject, references, inputs, slot.evaluation, cache, device=device)
        return Target(subject, evaluator, slot, names)

    def _check_size(self, run: str, size: tuple[int, int], slot: Slot) -> None:
        """Networks that resize would measure a folder of any size against images of another."""
        side = slot.dataset.resolution
        if self.options.reference is None and size != (side, side):
            raise PipelineError(
                f"{run}: its images are {size[1]}×{size[0]}, those of the slot's data set {side}×{side}; resize them, name another --slot, "
                "or give a --reference"
            )

    def _slot(self) -> str:
        slots = self.params.active.slots
        name = self.options.slot or (REPORT_SLOT if REPORT_SLOT in slots else next(iter(slots)))
        if name not in slots:
            raise PipelineError(f"--slot: {name}: {suggestion(name, slots, 'slots')}")
        return str(name)

    def _made(self, outputs: Mapping[str, Path]) -> dict[str, Path]:
        """Where published outputs lie; PipelineError with the command that makes it for one that is not there."""
        for output in outputs.values():
            made = manifest.read(paths.root() / output / paths.MANIFEST)
            maker = next(job for job in registry.jobs(self.params) if output in job.outputs)
            if made is None:
                raise PipelineError(f"{output}: not made yet; run it with: {maker.command}")
            if wrong := manifest.fault(maker, made):
                raise PipelineError(f"{wrong}; make it again with: {maker.command}, then `make sync`")
        return {name: paths.root() / output for name, output in outputs.items()}

    def _references(self, slot: Slot, name: str, inputs: Mapping[str, Path]) -> dict[str, Reference]:
        from pipeline.evaluation import load_references, reference_of
        from scm_core.train.distributed import own_device

        spaces = self.spaces(slot, name)
        if self.options.reference is None:
            return load_references(spaces, inputs["reference"])
        if name not in self._known:
            extractors = {space: load_extractor(space, inputs, own_device()) for space in spaces}
            subset = subset_of(slot.evaluation, self.params.active.seed)
            cache = paths.evaluation_cache(self.params.scale)
            self._known[name] = reference_of(self.options.reference, extractors, slot.evaluation, cache, subset)
        return self._known[name]


def words(text: str, option: str) -> list[str]:
    """The words of a comma-separated list."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise PipelineError(f"{option}: expected a list such as a,b, got {text!r}")
    return found


def numbers(text: str, option: str) -> list[float]:
    """Numbers from a list 1.0,1.5 or a range 1.0:2.0:0.1 with its ends, exact in decimal."""
    try:
        parts = [Decimal(part) for part in text.split(":")]
    except InvalidOperation:
        parts = []
    if len(parts) == 3 and all(part.is_finite() for part in parts):
        low, high, step = parts
        if step <= 0 or high < low or (high - low) / step >= MOST:
            raise PipelineError(
                f"{option}: expected low:high:step with low ≤ high, step > 0 and at most {MOST} numbers, got {text}"
            )
        return [float(low + i * step) for i in range(int((high - low) / step) + 1)]
    try:
        found = [float(word) for word in words(text, option)]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise PipelineError(f"{option}: expected numbers such as 1.0,1.5 or 1.0:2.0:0.1, got {text}")
    return sorted(set(found))


def whole_numbers(text: str, option: str) -> list[int]:
    """The same for whole numbers."""
    found = numbers(text, option)
    if any(value != int(value) for value in found):
        raise PipelineError(f"{option}: expected whole numbers such as 1,2, got {text}")
    return [int(value) for value in found]
