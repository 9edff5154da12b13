# SPDX-License-Identifier: Apache-2.0
"""What the reader of pickles makes of the names that data and networks import: tensors and arrays from raw numbers, modules as `Stored`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TORCH_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NUMPY_KINDS = "fiub"  # numbers; no objects, no strings


class RefusedError(ValueError):
    """Something in a file that this reader does not take, or cannot."""


@dataclass
class Stored:
    """A module of a pickle: the name of its class, and what it held. `source`: whether code of its own came along (it is not kept)."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)
    source: bool = False


@dataclass(frozen=True)
class Name:
    """A name that a pickle imports. It stands for itself: nothing is imported."""

    text: str


@dataclass(frozen=True)
class Storage:
    """The numbers of a tensor, flat."""

    values: Tensor


class Type:
    """A NumPy type on its way: name, then byte order."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(f"[{NUMPY_KINDS}][1248]", name):
            raise RefusedError("has NumPy data of a type that is no number's")
        self.dtype = np.dtype(name)

    def order(self, state: tuple[Any, ...]) -> None:
        if len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise RefusedError("is damaged: a NumPy type without byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A NumPy array on its way: empty, then filled."""

    value: np.ndarray[Any, Any] | None = None

    def fill(self, state: tuple[Any, ...]) -> None:
        match state:
            case (int(), tuple(shape), Type(dtype=dtype), bool() | int() as by_column, bytes() | str() as data):
                raw = data.encode("latin-1") if isinstance(data, str) else data  # a string in pickles of Python 2
                self.value = np.frombuffer(raw, dtype).reshape(shape, order="F" if by_column else "C")
            case _:
                raise RefusedError("is damaged: a NumPy array without its numbers")


def empty() -> dict[str, Any]:
    """A dictionary that is filled by later instructions."""
    return {}


def scalar(dtype: Type, data: bytes) -> float | int | bool:
    """A NumPy number, from its bytes."""
    if not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        raise RefusedError("is damaged: a NumPy number of another size than its type's")
    value: float | int | bool = np.frombuffer(data, dtype.dtype)[0].item()
    return value


def tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """torch's _rebuild_tensor_v2: a view of a storage, which must lie within it and not be larger than it."""
    if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise RefusedError("is damaged: a tensor without a storage, or of a shape that is none")
    if len(size) != len(stride):
        raise RefusedError(f"is damaged: a tensor of shape {size} with strides {stride}")
    held, count = len(storage.values), math.prod(int(n) for n in size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset
    if count > held or (count and last >= held):
        raise RefusedError(f"has a tensor of shape {size} that does not fit its {held} numbers")
    return storage.values.as_strided(size, stride, offset)


def parameter(data: Tensor, *_: Any) -> Tensor:
    """torch's _rebuild_parameter: the tensor itself."""
    if not isinstance(data, Tensor):
        raise RefusedError("is damaged: a parameter without a tensor")
    return data


def persistent(meta: dict[str, Any]) -> Stored:
    """An object with the source code of its class: class_name and state are taken, the code is left."""
    match meta:
        case {"type": "class", "module_src": str(), "class_name": str(kind), "state": dict(state)}:
            return Stored(kind, state, source=True)
    raise RefusedError("is damaged: a persistent object without class_name or state")


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and after NumPy 2
CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": empty,
    "builtins.set": lambda items: list(items) if isinstance(items, list) else [],
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": parameter,
    "torch_utils.persistence._reconstruct_persistent_obj": persistent,
    "numpy.dtype": Type,
    **{f"{module}.scalar": scalar for module in _NUMPY},
    **{f"{module}._reconstruct": lambda *_: Array() for module in _NUMPY},
}
PLAIN: dict[str, type] = {  # classes whose objects are made empty and then given their state
    "dnnlib.util.EasyDict": dict,
    "collections.OrderedDict": dict,
    "torch.nn.modules.container.ModuleDict": Stored,
    "torch.nn.modules.container.ModuleList": Stored,
    "torch.nn.modules.container.Sequential": Stored,
}
LOAD = "torch.storage._load_from_bytes"  # which the reader has itself: a storage's bytes hold pickles
# The imports that a host of such files lists for them ("Detected Pickle imports" at huggingface.co/nvidia/DirectDiscriminativeOptimization,
# which has networks of both formats), and their neighbours.
NAMES = {*CALLS, *PLAIN, LOAD, "numpy.ndarray"}
