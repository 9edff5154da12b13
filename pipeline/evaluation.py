# SPDX-License-Identifier: Apache-2.0
"""The guidance sweep of one model: select on one set of samples, measure again on a fresh one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pipeline.context import Context
from pipeline.files import read_json, write_json
from pipeline.generation import noise_of, samples, student_of_job
from pipeline.modelling import CLASSIFIER_FILE, MODEL, load_decoder
from scm_core.data import set_name
from scm_core.evaluate import load_reference
from scm_core.evaluate.extractors import CLASSIFIER, create_extractor
from scm_core.evaluate.protocol import evaluate, extract
from scm_core.nn.build import Model, load_model
from scm_core.sampling import diffusion_nfe

SELECT, REPORT = "select", "report"
FIELDS = ("phase", "steps", "guidance", "nfe", "samples", "first_index", "fid", "fid_se", "precision", "recall")


@dataclass(frozen=True)
class Point:
    """One number to measure: `steps` of the model's sampler at a guidance scale (None: the model has none)."""

    phase: str
    steps: int
    guidance: float | None
    samples: int
    first_index: int

    @property
    def key(self) -> str:
        """A file name for its result."""
        return f"{self.phase}-{self.steps}-{self.guidance}-{self.samples}-{self.first_index}"


Measure = Callable[[Point], dict[str, float]]


def sweep(
    steps: Sequence[int],
    grid: Sequence[float] | None,
    select: tuple[int, int],
    report: tuple[int, int],
    measure: Measure,
) -> list[dict]:
    """All rows of one model: every scale of the grid on the selecting samples, then the best and scale 1 on fresh ones.

    The best has the lowest FID; the choice is made for each number of steps. `select` and `report` are (number of samples,
    first index)."""
    rows = []
    for n in steps:
        reported: Iterable[float | None] = [None]
        if grid is not None:
            selecting = [Point(SELECT, n, s, *select) for s in grid]
            results = [measure(point) for point in selecting]
            rows += [{**asdict(point), **result} for point, result in zip(selecting, results, strict=True)]
            best = grid[min(range(len(grid)), key=lambda i: results[i]["fid"])]
            reported = sorted({1.0, best})
        for s in reported:
            point = Point(REPORT, n, s, *report)
            rows.append({**asdict(point), **measure(point)})
    return rows


def reported(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """What stands for a model, by number of steps: FID at the selected scale, and the one without guidance beside it."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["phase"] != REPORT:
            continue
        entry = found.setdefault(f"{row['steps']}-step", {})
        if row["guidance"] == 1.0:
            entry["fid_without_guidance"] = row["fid"]
        if row["guidance"] != 1.0 or "fid" not in entry:  # scale 1 stands for the model where it is the best
            entry |= {"fid": row["fid"], "fid_se": row["fid_se"]}
            if row["guidance"] is not None:
                entry["guidance"] = row["guidance"]
    return found


def count_points(steps: Sequence[int], grid: Sequence[float] | None, select: int, report: int) -> int:
    """The most samples that `sweep` may ask for, for a progress display."""
    return len(steps) * (len(grid) * select + 2 * report if grid is not None else report)


class Evaluator:
    """Measures points of one model: noise and label from each sample's index, generate, decode, round, features, metrics.

    Finished points are kept in the job's working folder, so that a killed evaluation goes on where it was; those of
    other code are left aside.
    """

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.how = ctx, ctx.slot.evaluation
        self.student = student_of_job(ctx.slot, ctx.job.axes["size"], ctx.job.axes["method"])
        self.model: Model = load_model(ctx.inputs["student" if self.student else "teacher"] / MODEL)
        self.decode = load_decoder(ctx.inputs)
        self.extractor = create_extractor(CLASSIFIER, ctx.inputs["features"] / CLASSIFIER_FILE)
        data = set_name(ctx.slot.dataset.source, ctx.slot.dataset.resolution)
        self.reference = load_reference(ctx.inputs["reference"], self.extractor.identity, data)
        self.steps = self.student.steps if self.student else (self.how.teacher.steps,)
        guidable = self.model.config["guidance_input"] if self.student else ctx.slot.dataset.labels > 0
        self.grid = self.how.guidance if guidable else None
        config = self.model.config
        self.shape = (config["channels"], config["resolution"], config["resolution"])
        most = count_points(self.steps, self.grid, self.how.select_samples, self.how.samples)
        self.progress, self.done = ctx.progress(most, "img"), 0

    def nfe(self, point: Point) -> int:
        """Forward passes of the network for one sample; classifier-free guidance doubles the teacher's."""
        if self.student is None:
            return diffusion_nfe(self.how.teacher.solver, point.steps, guidance=point.guidance not in (None, 1.0))
        return point.steps

    def generate(self, indices: range, point: Point) -> Tensor:
        """uint8 images of the samples with these indices."""
        labels = torch.tensor([i % max(self.ctx.slot.dataset.labels, 1) for i in indices])
        noise = noise_of(self.student, indices, self.shape, point.steps)
        return self.decode(samples(self.ctx.slot, self.student, self.model.net, noise, labels, point.guidance))

    def measure(self, point: Point) -> dict[str, float]:
        """nfe, fid, fid_se, precision and recall at one point."""
        kept = self.ctx.work / f"points-{self.ctx.code[:16]}" / f"{point.key}.json"
        result = read_json(kept)
        if result is not None:
            self.progress.start(self.done + point.samples)
        else:
            features = []
            for first in range(0, point.samples, self.how.batch):
                indices = range(
                    point.first_index + first, point.first_index + min(first + self.how.batch, point.samples)
                )
                features.append(extract(self.extractor, self.generate(indices, point)))
                self.progress.update(self.done + first + len(indices))
            numbers = evaluate(torch.cat(features), self.reference, self.how.neighbours)
            result = {
                "nfe": self.nfe(point),
                **{key: getattr(numbers, key) for key in ("fid", "fid_se", "precision", "recall")},
            }
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, result)
        self.done += point.samples
        self.progress.update(self.done, fid=result["fid"])
        name = f"{point.phase}/{point.steps}-step"
        step = round(
            100 * (point.guidance or 1.0)
        )  # MLflow's steps are whole numbers: hundredths of the guidance scale
        self.ctx.tracker.log_metrics(
            step, {f"{name}/{key}": result[key] for key in ("fid", "fid_se", "precision", "recall")}
        )
        return result

    def run(self) -> list[dict]:
        """All rows of the sweep."""
        select, report = (self.how.select_samples, self.how.select_seed), (self.how.samples, self.how.report_seed)
        rows = sweep(self.steps, self.grid, select, report, self.measure)
        self.progress.close()
        return rows
