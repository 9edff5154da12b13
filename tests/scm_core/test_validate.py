# SPDX-License-Identifier: Apache-2.0
"""The checks at the boundary: what passes, what is refused, and the sentence that says so."""

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from scm_core import validate

half = torch.bfloat16
ACCEPTED: list[Callable[[], None]] = [
    lambda: validate.check_like("a", torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.float64), "b"),
    lambda: validate.check_sample("z", torch.zeros(4, 2, dtype=torch.float64)),
    lambda: validate.check_times(torch.tensor([0.0, 1.0, math.pi / 2])),  # float32 rounds π/2 up
    lambda: validate.check_times(torch.tensor([0.0, 1.0, math.pi / 2], dtype=torch.float64)),
    lambda: validate.check_labels(torch.tensor([-1, 0, 9]), 10),
    lambda: validate.check_labels(torch.tensor([3], dtype=torch.int32), 10),
    lambda: validate.check_channels("width", 8),
    lambda: validate.check_channels("width", 3, multiple=1),
    lambda: validate.check_positive("sigma_data", 1e-9),
    lambda: validate.check_descending("times", [math.pi / 2, 1.0, 1e-9]),
    lambda: validate.check_descending("times", [1.1]),
    lambda: validate.check_grid("times", [math.pi / 2, 0.0]),
    lambda: validate.check_descending("times", [float(torch.tensor(math.pi / 2)), 1.0]),  # float32 rounds π/2 up
    lambda: validate.check_grid("times", [float(torch.tensor(math.pi / 2)), 0.0]),
    lambda: validate.check_dtype("a", torch.zeros(2), torch.ones(3), "b"),
    lambda: validate.check_finite("P_mean", -1e9),
    lambda: validate.check_fraction("warmup", 0),
    lambda: validate.check_fraction("warmup", 1.0),
]
REFUSED: list[tuple[Callable[[], None], str]] = [
    (
        lambda: validate.check_like("dxdt", torch.zeros(2, 3), torch.zeros(2, 4), "x_t"),
        "dxdt: expected the shape (2, 4) of x_t, got (2, 3)",
    ),
    (
        lambda: validate.check_like("dxdt", torch.zeros(2, device="meta"), torch.zeros(2), "x_t"),
        "dxdt: expected the device cpu of x_t, got meta",
    ),
    (lambda: validate.check_sample("z", torch.zeros(4)), "z: expected a batch of shape (B, …), got shape (4,)"),
    (
        lambda: validate.check_sample("z", torch.zeros(4, 2, dtype=half)),
        "z: expected float32 or float64, got torch.bfloat16",
    ),
    (
        lambda: validate.check_sample("z", torch.zeros(4, 2, dtype=torch.uint8)),
        "z: expected float32 or float64, got torch.uint8",
    ),
    (
        lambda: validate.check_time_dtype(torch.zeros(2, dtype=torch.float16)),
        "t: expected float32 or float64, got torch.float16",
    ),
    (lambda: validate.check_time_dtype(torch.tensor([1])), "t: expected float32 or float64, got torch.int64"),
    (
        lambda: validate.check_times(torch.tensor([1.0, -1e-3])),
        "t: expected times in [0, π/2] radians, got -0.001",
    ),
    (lambda: validate.check_times(torch.tensor([1.5709])), "t: expected times in [0, π/2] radians, got 1.5709"),
    (lambda: validate.check_times(torch.tensor([math.nan])), "t: expected times in [0, π/2] radians, got nan"),
    (lambda: validate.check_labels(torch.tensor([0, 10]), 10), "labels: expected -1 (none) to 9, got 10"),
    (lambda: validate.check_labels(torch.tensor([-2]), 10), "labels: expected -1 (none) to 9, got -2"),
    (lambda: validate.check_labels(torch.zeros(2), 10), "labels: expected int64, got torch.float32"),
    (lambda: validate.check_channels("width", 7), "width: expected a positive multiple of 2, got 7"),
    (lambda: validate.check_channels("width", 0), "width: expected a positive multiple of 2, got 0"),
    (lambda: validate.check_channels("width", 96, 64), "width: expected a positive multiple of 64, got 96"),
    (lambda: validate.check_positive("sigma_data", 0.0), "sigma_data: expected a positive number, got 0.0"),
    (lambda: validate.check_positive("sigma_data", math.nan), "sigma_data: expected a positive number, got nan"),
    (lambda: validate.check_positive("sigma_data", math.inf), "sigma_data: expected a positive number, got inf"),
]
REFUSED += [
    (
        lambda: validate.check_dtype("a", torch.zeros(2), torch.zeros(2, dtype=half), "b"),
        "a: expected the type torch.bfloat16 of b, got torch.float32",
    ),
    (
        lambda: validate.check_times(torch.tensor([-1.0]), "t_prev"),
        "t_prev: expected times in [0, π/2] radians, got -1",
    ),
    (lambda: validate.check_finite("P_mean", math.inf), "P_mean: expected a finite number, got inf"),
    (lambda: validate.check_fraction("warmup", 1.01), "warmup: expected a number in [0, 1], got 1.01"),
    (lambda: validate.check_fraction("warmup", -1), "warmup: expected a number in [0, 1], got -1"),
    (lambda: validate.check_fraction("warmup", math.nan), "warmup: expected a number in [0, 1], got nan"),
]
REFUSED += [
    (
        partial(validate.check_descending, "times", times),
        f"times: expected descending numbers in (0, π/2], got {tuple(times)}",
    )
    for times in ([], [1.0, 1.0], [0.5, 1.0], [1.0, 0.0], [1.6], [math.nan], [1.0, math.nan])
]
REFUSED += [
    (
        partial(validate.check_grid, "times", times),
        f"times: expected two or more descending numbers in [0, π/2], got {tuple(times)}",
    )
    for times in ([], [1.0], [1.0, 1.0], [0.5, 1.0], [1.0, -0.1], [1.6, 0.0], [1.0, math.nan])
]


@pytest.mark.parametrize("check", ACCEPTED)
def test_good_input_passes(check: Callable[[], None]) -> None:
    """Values inside the range and on its edges."""
    check()


@pytest.mark.parametrize(("check", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_input_is_named(check: Callable[[], None], message: str) -> None:
    """A ValueError that names the argument, what was expected, and what came."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check()


def test_free_checks_look_at_no_values() -> None:
    """On the meta device, where tensors have no values, the checks that are allowed within a step work; the others cannot."""
    t, x = torch.zeros(2, device="meta"), torch.zeros(2, 3, device="meta")
    validate.check_time_dtype(t)
    validate.check_like("x", x, x, "x")
    validate.check_sample("x", x)

    def looks(function: Callable[..., None], *arguments: Tensor | int) -> bool:
        try:
            function(*arguments)
        except (NotImplementedError, RuntimeError):
            return True
        return False

    assert looks(validate.check_times, t)
    assert looks(validate.check_labels, torch.zeros(2, dtype=torch.int64, device="meta"), 3)
