# SPDX-License-Identifier: Apache-2.0
"""Checks of what callers bring, for the boundary of the library: entry points and constructors, never a training step.

Whatever looks at a tensor's values (`check_times`, `check_labels`) waits for the device and is for entry points; shapes, dtypes, devices
and Python numbers (the others) cost nothing anywhere.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
EDGE = 1e-6  # float32 rounds π/2 up by 4e-8


def check_like(name: str, value: Tensor, reference: Tensor, reference_name: str) -> None:
    """ValueError unless `value` has the shape and the device of `reference`."""
    if value.shape != reference.shape:
        raise ValueError(
            f"{name}: expected the shape {tuple(reference.shape)} of {reference_name}, got {tuple(value.shape)}"
        )
    check_device(name, value, reference, reference_name)


def check_device(name: str, value: Tensor, reference: Tensor, reference_name: str) -> None:
    """ValueError unless `value` is on the device of `reference`."""
    if value.device != reference.device:
        raise ValueError(f"{name}: expected the device {reference.device} of {reference_name}, got {value.device}")


def check_sample(name: str, value: Tensor) -> None:
    """ValueError unless `value` is a batch (B, …) in float32 or float64: times take its type, and half precision cannot hold them."""
    if value.ndim < 2:
        raise ValueError(f"{name}: expected a batch of shape (B, …), got shape {tuple(value.shape)}")
    if not value.is_floating_point() or value.dtype in HALF:
        raise ValueError(f"{name}: expected float32 or float64, got {value.dtype}; convert inside the network")


def check_time_dtype(t: Tensor, name: str = "t") -> None:
    """ValueError for integer or half-precision t: bfloat16 turns tan(t_max) = 160 into 120."""
    if not t.is_floating_point() or t.dtype in HALF:
        raise ValueError(
            f"{name}: expected float32 or float64, got {t.dtype}; convert the network's input, not the time"
        )


def check_dtype(name: str, value: Tensor, reference: Tensor, reference_name: str) -> None:
    """ValueError unless `value` has the dtype of `reference`."""
    if value.dtype != reference.dtype:
        raise ValueError(f"{name}: expected the type {reference.dtype} of {reference_name}, got {value.dtype}")


def check_times(t: Tensor, name: str = "t") -> None:
    """ValueError unless every t is a TrigFlow time, 0 ≤ t ≤ π/2 radians, in float32 or float64."""
    check_time_dtype(t, name)
    wrong = ~((t >= 0) & (t <= math.pi / 2 + EDGE))
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected times in [0, π/2] radians, got {t[wrong][0].item():g}")


def check_labels(labels: Tensor, count: int) -> None:
    """ValueError unless labels are integers in −1 … count − 1 (−1: no label)."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels: expected int64, got {labels.dtype}")
    wrong = (labels < -1) | (labels >= count)
    if bool(wrong.any()):
        raise ValueError(f"labels: expected -1 (none) to {count - 1}, got {labels[wrong][0].item()}")


def check_channels(name: str, channels: int, multiple: int = 2) -> None:
    """ValueError unless a number of channels is positive and divisible by `multiple`."""
    if channels < 1 or channels % multiple:
        raise ValueError(f"{name}: expected a positive multiple of {multiple}, got {channels}")


def check_positive(name: str, value: float) -> None:
    """ValueError unless a number is positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number, got {value}")


def check_finite(name: str, value: float) -> None:
    """ValueError unless a number is finite."""
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_fraction(name: str, value: float) -> None:
    """ValueError unless a number is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_descending(name: str, times: Sequence[float]) -> None:
    """ValueError unless `times` are finite and descend strictly within (0, π/2], up to float32's rounding of π/2."""
    inside = all(0 < t <= math.pi / 2 + EDGE for t in times)
    if not len(times) or not inside or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"{name}: expected descending numbers in (0, π/2], got {tuple(times)}")


def check_grid(name: str, times: Sequence[float]) -> None:
    """ValueError unless `times` are two or more finite numbers that descend strictly within [0, π/2]: the ends of a solver's steps."""
    inside = all(0 <= t <= math.pi / 2 + EDGE for t in times)
    if len(times) < 2 or not inside or any(a <= b for a, b in pairwise(times)):
        raise ValueError(f"{name}: expected two or more descending numbers in [0, π/2], got {tuple(times)}")
