# SPDX-License-Identifier: Apache-2.0
"""The section `hardware` of a scale: what its jobs run on, as far as their requests and the estimates of `plan` depend on it.

Nothing that a result is known by: a job does not run again when it changes.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.sections import Count, Model, Positive


class Hardware(Model):
    """Nodes with GPUs. A scale without this section runs on one CPU thread a job."""

    gpu: str
    """The GPU, by the name that torch gives it."""
    memory_gb: Positive
    """Its memory."""
    peak_tflops: Positive
    """Its dense peak in 16 bit, in TFLOP/s."""
    utilisation: Annotated[float, Field(gt=0, le=1)]
    """The share of the peak that model FLOPs reach in training and sampling."""
    gpus_per_node: Count
    """The most GPUs of one job."""
    cpus_per_gpu: Count
    """Cores that a job asks for beside each GPU."""
    host_memory_per_gpu_gb: Positive
    """Memory that a job asks for beside each GPU."""
    time_limit_hours: Positive
    """The most that a job asks for at once; a longer training goes on from its checkpoint."""

    @property
    def flops(self) -> float:
        """FLOP/s that are reckoned with, of one GPU."""
        return 1e12 * self.peak_tflops * self.utilisation
