# SPDX-License-Identifier: Apache-2.0
"""Training by several processes, each with the same weights and its part of every batch (data parallel).

`DistributedDataParallel` averages the gradients. It wraps the whole loss, not the network: inside, the tangent is carried through the bare
module, and DDP sees no more than that a loss came out and that its backward reached the weights. Whatever the processes decide together
(apply a step? stop?) they decide on a number that all of them have.

A process learns its place from the variables that `torchrun` sets: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scm_core.objectives import Batch, Objective, Terms

TIMEOUT_S = 600.0  # of a collective: a process that is gone is noticed at once by gloo, and by NCCL after this


@dataclass(frozen=True)
class Ranks:
    """This process's place among `count` of them, and its device. Without others every method is the identity."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host: Any = None  # the group for tensors on the CPU; None: the default group

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, batch: int) -> tuple[int, int]:
        """This process's part of a batch of that size: its first sample, and how many. ValueError unless all get the same."""
        if batch % self.count:
            raise ValueError(f"batch: expected a multiple of the {self.count} processes, got {batch}")
        return self.rank * (batch // self.count), batch // self.count

    def largest(self, x: Tensor) -> Tensor:
        """The largest over the processes of each element of x, in place; on a GPU without waiting for it."""
        if self.count > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self._group(x))
        return x

    def from_first(self, x: Tensor) -> Tensor:
        """The first process's x, in place of this one's."""
        if self.count > 1:
            dist.broadcast(x, 0, group=self._group(x))
        return x

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over the processes of each number; all of them must have the same names."""
        if self.count == 1:
            return dict(values)
        names = sorted(values)
        numbers = torch.tensor([values[name] for name in names], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.host)
        return dict(zip(names, (numbers / self.count).tolist(), strict=True))

    def agree(self, value: str) -> str:
        """What the first process says."""
        said = [value]
        if self.count > 1:
            dist.broadcast_object_list(said, src=0, group=self.host)
        return said[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier(group=self.host)

    def to_first(self, tensor: Tensor, owner: int) -> Tensor:
        """A tensor of process `owner`, another than the first, brought to the first; called by these two, with a tensor of its shape."""
        tensor = tensor.contiguous()
        if self.first:
            dist.recv(tensor, owner, group=self._group(tensor))
        else:
            dist.send(tensor, 0, group=self._group(tensor))
        return tensor

    def _group(self, x: Tensor) -> Any:
        return None if x.is_cuda else self.host


SINGLE = Ranks()


def own_device() -> torch.device:
    """Where this process computes: on the GPU of its place on the machine (LOCAL_RANK), or on the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    # A launcher may also show each process nothing but its own.
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else place)


@contextmanager
def connected(timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """The place that the environment describes, with the processes connected: NCCL where there are GPUs, gloo where there are none.

    Without WORLD_SIZE, or if it is 1, this process is alone. ValueError for variables that are missing.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count == 1:
        yield Ranks(device=device)
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"{name}: WORLD_SIZE is {count}, but {name} is not set; start the processes with torchrun")
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        host = dist.new_group(backend="gloo", timeout=timeout)  # of its own: its order does not depend on DDP's
        yield Ranks(dist.get_rank(), count, device, host)
    finally:
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the connection to another process broke, as when that one has died."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


class Loss(nn.Module):
    """An objective as a module that holds the weights it trains, and nothing else of what it uses, such as a teacher."""

    def __init__(self, trained: Mapping[str, nn.Module], objective: Objective) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(trained)
        self.objective = [objective]  # in a list: an objective that is a module must not become a part of this one

    def forward(self, batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        return self.objective[0](batch, generator, iteration)


def synchronized(objective: Objective, trained: Mapping[str, nn.Module], ranks: Ranks) -> Objective:
    """The objective, whose backward now averages the gradients of `trained` over the processes. The first process's weights go to all."""
    if ranks.count == 1:
        return objective
    loss = Loss(trained, objective)
    return DistributedDataParallel(loss, forward_sync_buffers=False, gradient_as_bucket_view=True)


def accumulating(objective: Objective, more: bool) -> AbstractContextManager[None]:
    """Within it a backward keeps its gradients for this process if `more` of the batch is to come."""
    return objective.no_sync() if more and isinstance(objective, DistributedDataParallel) else nullcontext()


class StopVote:
    """Whether any process was asked to stop, known to all at the same step: each step's answers travel while the next one computes."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.work: Any = None

    def __call__(self, wanted: bool) -> bool:
        """Put in this process's wish, and learn the common one of the step before; alone, at once."""
        if self.ranks.count == 1:
            return wanted
        stop = False
        if self.work is not None:
            self.work.wait()
            stop = bool(self.flag)
        if not stop:  # the last vote needs no successor
            self.flag.fill_(int(wanted))
            self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.ranks.host, async_op=True)
        return stop
