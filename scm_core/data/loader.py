# SPDX-License-Identifier: Apache-2.0
"""Batches that are ready, and on the device, when training asks for them."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from scm_core.objectives import Batch

GRACE_S = 1.0  # how long `close` waits for a batch that is being made; the thread ends after it either way


class _Made(NamedTuple):
    """What the thread leaves for an iteration: a batch and the event after its copy (None: no stream to wait for), or an exception."""

    batch: Batch | None = None
    event: torch.cuda.Event | None = None
    error: BaseException | None = None


class Prefetcher:
    """The batch of an iteration, `at(iteration)` with x0 and labels on `device`; its indices stay on the CPU.

    A thread, which starts at the first call, makes the batches of iterations k + 1 … k + `depth` while the caller works on that of k. On a
    GPU they are copied from pinned memory on a stream of their own, which the caller's current stream waits for and the host does not.
    `depth` 0 makes each batch at its call, in the caller's thread: a batch costs the thread about 0.1 ms beside its making, and the making
    itself takes its share of the processor, so that on a CPU only data that are read or decoded slowly gain from it.

    `at` must be a function of the iteration alone. It is called in one thread at a time, and ahead of need: up to `depth` calls are for
    iterations that training does not come to. They may be asked for in any order, by one thread; one that is not next (a run that resumes)
    has the batches made in advance thrown away. An exception of `at` is raised at the call of its iteration, as it is.

    Raises ValueError for a negative depth, and for a call after `close`.
    """

    def __init__(self, at: Callable[[int], Batch], device: torch.device | str = "cpu", depth: int = 2) -> None:
        if depth < 0:
            raise ValueError(f"depth: expected a number of batches >= 0, got {depth}")
        self.at, self.device, self.depth = at, torch.device(device), depth
        self._changed = threading.Condition()
        self._made: dict[int, _Made] = {}
        self._next = self._end = 0  # what the thread makes next, and where it stops for now
        self._making: int | None = None
        self._jumps = 0  # what was begun before a jump is not wanted after it
        self._thread: threading.Thread | None = None
        self._closed = False

    def __call__(self, iteration: int) -> Batch:
        if self._closed:
            raise ValueError(f"iteration: expected no call after close(), got {iteration}")
        if not self.depth:
            return to_device(self.at(iteration), self.device)
        if self._thread is None:
            self._start()
        with self._changed:
            for passed in [k for k in self._made if k < iteration]:
                del self._made[passed]
            if iteration not in self._made and iteration not in (self._making, self._next):
                self._made.clear()
                self._next, self._making, self._jumps = iteration, None, self._jumps + 1
            self._end = iteration + 1 + self.depth
            self._changed.notify_all()
            while iteration not in self._made:
                self._changed.wait()
            made = self._made.pop(iteration)
        return self._deliver(made)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and drop what it has made; a batch that is just being made is waited for, for at most a second."""
        with self._changed:
            self._closed = True
            self._made.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(GRACE_S)
            atexit.unregister(self.close)

    def _start(self) -> None:
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            # `at` may read what the caller has just put there
            stream.wait_stream(torch.cuda.current_stream(self.device))
        self._thread = threading.Thread(target=self._run, args=(stream,), name="prefetcher", daemon=True)
        self._thread.start()
        # A daemon, so that a read that hangs does not keep the process; yet none should run torch's code while the interpreter goes down.
        atexit.register(self.close)

    def _run(self, stream: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            while self._advance(stream):
                pass

    def _advance(self, stream: torch.cuda.Stream | None) -> bool:
        """Make one batch; False when closed. A function of its own, so that the waiting thread holds no batch."""
        with self._changed:
            while not self._closed and self._next >= self._end:
                self._changed.wait()
            if self._closed:
                return False
            iteration, jumps = self._next, self._jumps
            self._making, self._next = iteration, iteration + 1
        made = self._make(iteration, stream)
        with self._changed:
            if jumps == self._jumps and not self._closed:
                self._made[iteration], self._making = made, None
                self._changed.notify_all()
        return True

    def _make(self, iteration: int, stream: torch.cuda.Stream | None) -> _Made:
        try:
            batch = to_device(self.at(iteration), self.device)
            return _Made(batch, None if stream is None else stream.record_event())
        except BaseException as error:  # not ours to judge: the caller gets it
            return _Made(error=error)

    def _deliver(self, made: _Made) -> Batch:
        if made.error is not None:
            raise made.error
        assert made.batch is not None
        if made.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(made.event)
            for tensor in (made.batch.x0, made.batch.labels):
                if tensor is not None:
                    # or its memory, which belongs to the other stream's pool, could be given away while in use here
                    tensor.record_stream(stream)
        return made.batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with x0 and labels on `device`; on a GPU by a copy from pinned memory, in the order of the current stream."""

    def moved(tensor: Tensor) -> Tensor:
        if device.type == "cuda" and tensor.device.type == "cpu":
            # the allocator gives the pinned memory to nobody else until it is copied
            return tensor.pin_memory().to(device, non_blocking=True)
        return tensor.to(device)

    return Batch(moved(batch.x0), None if batch.labels is None else moved(batch.labels), batch.indices)
