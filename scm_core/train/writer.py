# SPDX-License-Identifier: Apache-2.0
"""What writes a checkpoint while the training goes on: copies in memory used again, one thread, one pass over the data.

Whatever takes long here (copying, hashing, writing, fsync) releases Python's global lock, so that steps go on meanwhile.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 4 << 20  # bytes hashed and written at a time: they are still in the processor's cache when they are written
# Bytes after which what was written is brought to the disk and dropped from the page cache: gigabytes of it would leave the kernel to look
# for memory whenever a training step asks for some.
FLUSH = 256 << 20
DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write a safetensors file (8 bytes: length of the header; header in JSON; data), fsync it, and return its SHA-256.

    The digest is of what was in memory, found in the same pass: nothing is read back. Raises ValueError for a type of number that
    the format does not have, and OSError.
    """
    # wide types first: every tensor then starts at a multiple of its element's size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r}: expected one of {', '.join(DTYPES.values())}, got {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    flushed = 0
    with open(path, "wb", buffering=1 << 20) as file:  # gathers the small ones; larger pieces pass it by

        def put(data: bytes | memoryview) -> None:
            nonlocal flushed
            digest.update(data)
            file.write(data)
            if file.tell() - flushed >= FLUSH:
                file.flush()
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), flushed, file.tell() - flushed, os.POSIX_FADV_DONTNEED)
                flushed = file.tell()

        put(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), CHUNK):
                put(data[start : start + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class Buffers:
    """CPU copies of named tensors, in memory that is kept from one filling to the next: once the size of the state."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Copy `tensors` into `self.tensors`; the returned function waits until copies from a GPU have arrived.

        Those go into pinned memory on the current stream: between the step before and the one after, without waiting for either.
        """
        old, self.tensors = self.tensors, {}
        for name, tensor in tensors.items():
            buffer = old.pop(name, None)
            if (
                buffer is None
                or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype)
                or (tensor.is_cuda and not buffer.is_pinned())
            ):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.tensors[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        events = []
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)

        def arrived() -> None:
            for event in events:
                event.synchronize()

        return arrived


class Background:
    """One piece of work at a time in a thread; what it raises is raised at the next `check` or `wait`, once."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin `work`; what was begun before must have ended (`wait`)."""

        def run() -> None:
            try:
                work()
            except BaseException as error:  # whatever it is: it belongs to the caller
                self._error = error

        # not a daemon: an interpreter that exits lets the checkpoint be completed
        self._thread = threading.Thread(target=run, name="checkpoint-writer")
        self._thread.start()

    def busy(self) -> bool:
        """Whether work is going on."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of work that has failed; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the end of the work; its error stays for `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait for the end of the work and raise its error."""
        self.join()
        self.check()
