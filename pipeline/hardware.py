# SPDX-License-Identifier: Apache-2.0
"""The section `hardware` of a scale: what its jobs run on, as far as their requests and the estimates of `plan` depend on it.

Nothing that a result is known by: a job does not run again when it changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pipeline.autoencoders import PretrainedVae
from pipeline.sections import Count, Model, Positive, problem

if TYPE_CHECKING:
    from pipeline.models import Slot


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
    """GPUs of one node, each of which a process of a job may have; a training with more processes takes several nodes."""
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


def check_nodes(key: str, slot: Slot, hardware: Hardware | None) -> None:
    """That the processes of a slot's jobs can be laid out on nodes. Raises a validation error that names the key below `key`."""
    most = hardware.gpus_per_node if hardware else None
    alone = {"evaluation": slot.evaluation.processes}
    if isinstance(slot.vae, PretrainedVae):
        alone["vae.engine"] = slot.vae.engine.processes
    for name, processes in alone.items():
        if most is not None and processes > most:
            what = f"must be at most hardware.gpus_per_node ({most}), as this job runs on one node, got {processes}"
            raise problem(f"{key}.{name}.processes", what)
    for size, own in slot.sizes.items():
        processes, wanted = own.engine.processes, own.engine.processes_per_node
        if most is not None and wanted is not None and wanted > most:
            what = f"must be at most hardware.gpus_per_node ({most}), as each process has a GPU, got {wanted}"
            raise problem(f"{key}.sizes.{size}.engine.processes_per_node", what)
        limit = wanted or most or processes
        if processes > limit and processes % limit:
            what = f"{'processes_per_node' if wanted else 'hardware.gpus_per_node'} ({limit})"
            what = f"must be at most {what} or a multiple of it, as each node of a job has as many, got {processes}"
            raise problem(f"{key}.sizes.{size}.engine.processes", what)
