"""Lineage (first step: nothing is sent yet)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.manifest import Input

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job


class Run:
    """The record of one execution."""

    run_id: str | None = None
    git: Mapping[str, Any] = {}

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records scalars."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Records a file."""

    def set_tag(self, key: str, value: str) -> None:
        """Records a tag."""

    def finish(self, made: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Ends the run well."""

    def fail(self, status: str, reason: str) -> None:
        """Ends the run badly."""


def open_run(job: "Job", params: "Params", inputs: Mapping[str, Input], mark: str, launcher: str, job_id: str) -> Run:
    """Opens the run of a job."""
    return Run()
