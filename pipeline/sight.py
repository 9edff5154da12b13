# SPDX-License-Identifier: Apache-2.0
"""What one sees of a training: progress, metrics in the tracker, a JSONL log beside the job's log, warnings, FLOPs and memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import paths
from scm_core.train.flops import count_flops, memory, utilisation
from scm_core.train.gradient import gradient
from scm_core.train.log import JsonlLog
from scm_core.train.loop import Hooks

if TYPE_CHECKING:
    import torch

    from pipeline.context import Context
    from scm_core.objectives import Batch, Objective
    from scm_core.train.state import TrainState

MACHINE = ("time", "images_per_second", "memory_gb", "teraflops_per_second", "utilisation")  # no property of the result
SHOWN = ("loss", "tangent_norm", "images_per_second", "memory_gb")


class Sight:
    """The hooks of a training. Only the first process shows and records."""

    def __init__(
        self, ctx: Context, state: TrainState, objective: Objective, companions: Mapping[str, Objective]
    ) -> None:
        self.ctx, self.state, self.objective, self.companions = ctx, state, objective, companions
        self.progress = ctx.progress(state.settings.iterations, "it")
        self.log = JsonlLog(paths.log_file(ctx.job).with_suffix(".jsonl")) if state.ranks.first else None
        self.flops = 0  # of a step, all processes together
        self.warnings = 0

    def count(self, data: Callable[[int], Batch]) -> None:
        """Count the FLOPs of a step by its losses and their backward passes; their gradients are thrown away."""
        batch = data(self.state.iteration)

        def step() -> None:
            self.state.train()
            gradient(self.state, self.objective, batch)
            for name, other in self.state.companions.items():
                gradient(other, self.companions[name], batch)

        self.flops = count_flops(step) * self.state.ranks.count

    def hooks(self, sample: Callable[[TrainState], None]) -> Hooks:
        """What `scm_core.train.loop.train` calls."""
        return Hooks(start=self._start, log=self._log, progress=self._progress, sample=sample, warn=self._warn)

    def close(self) -> None:
        """Show where it ended, and write its curves into the output."""
        self.progress.close()
        if self.log is not None:
            write_curve(self.log.path, self.ctx.out / paths.CURVE)

    def _start(self, iteration: int) -> None:
        self.progress.start(iteration)
        if self.log is not None:
            self.log.start(iteration)

    def _log(self, nimg: int, scalars: dict[str, float]) -> None:
        seconds = self.state.settings.batch / scalars["images_per_second"]  # a step's
        held = memory()
        scalars["memory_gb"] = held.get("cuda_peak", held["rss"]) / 1e9
        scalars["teraflops_per_second"] = self.flops / seconds / 1e12
        share = utilisation(self.flops, seconds, self.state.ranks.device, self._dtype(), self.state.ranks.count)
        if share is not None:
            scalars["utilisation"] = share
        self.ctx.tracker.log_metrics(nimg, scalars)
        if self.log is not None:
            self.log.write(self.state.iteration, nimg, scalars)

    def _dtype(self) -> torch.dtype:
        trunk: torch.dtype | None = getattr(self.state.net, "trunk", None)
        return trunk or next(self.state.net.parameters()).dtype

    def _progress(self, done: int, scalars: dict[str, float]) -> None:
        self.progress.update(done, **{key: scalars[key] for key in SHOWN if key in scalars})

    def _warn(self, nimg: int, text: str) -> None:
        self.warnings += 1
        print(f"warning: {text}", flush=True)
        self.ctx.tracker.set_tag("scm.warning", text)
        self.ctx.tracker.log_metrics(nimg, {"warnings": float(self.warnings)})


def write_curve(log: Path, file: Path) -> None:
    """The scalars of a log as a CSV file, a row for each log interval, without those that say how fast it went: equal trainings give equal
    bytes, resumed or not."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    columns = dict.fromkeys(key for row in rows for key in row if key not in MACHINE)
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(columns), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
