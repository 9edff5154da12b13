# SPDX-License-Identifier: Apache-2.0
"""What a stage gets: its job, parameters, inputs, folders, tracker and progress."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.params import Params, Scale, Slot
    from pipeline.registry import Job


class Tracker(Protocol):
    """Where a stage's numbers go. None of these calls waits for a server, and none raises when it is away."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars; `step` is the number of images seen in training."""

    def log_model(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars about the model that this run measures: for this run, and for the one that made its primary input."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Records a small file (a grid, a table) as it is now."""

    def set_tag(self, key: str, value: str) -> None:
        """Records a fact about the run."""


@dataclass(frozen=True)
class Context:
    """One execution of a stage. What it writes into `out` becomes the output; `work` survives a kill."""

    job: "Job"
    params: "Params"
    inputs: Mapping[str, Path]  # absolute
    out: Path  # empty when the stage starts
    work: Path  # checkpoints: kept when the job dies, removed after publishing
    tracker: Tracker
    run_id: str  # `<job name>-<8 hex digits>`, the same wherever the same thing is computed
    input_runs: Mapping[str, str]  # name of an input -> run id that made it
    progress_file: Path
    log_progress: bool = True  # False: only progress.json, nothing on stdout
    code: str = ""  # digest of the sources: names what only the same code may find again in `work`

    @property
    def scale(self) -> "Scale":
        """The parameters of the job's scale."""
        return self.params.scales[self.job.scale]

    @property
    def note(self) -> str:
        """What readers of the scale's results must know, or nothing."""
        return self.params.note_of(self.job.scale)

    @property
    def slot(self) -> "Slot":
        """The parameters of the job's slot."""
        return self.scale.slots[self.job.axes["slot"]]

    def progress(self, total: int, unit: str) -> Progress:
        """A progress display of `total` units: a bar in a terminal, plain lines elsewhere, and progress.json."""
        return Progress(total, unit, self.progress_file, label=self.job.name, show=self.log_progress)
