# SPDX-License-Identifier: Apache-2.0
"""Spread over seeds and the bias of a minimum, against known constants."""

import math
import statistics

import pytest

from scm_core.evaluate.selection import expected_minimum, minimum, spread


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, 0.0),
        (2, -1 / math.sqrt(math.pi)),
        (3, -3 / (2 * math.sqrt(math.pi))),
        (4, -6 / math.sqrt(math.pi) * math.atan(math.sqrt(2)) / math.pi),
        (5, -5 / math.sqrt(math.pi) * (1.5 / math.pi * math.asin(1 / 3) + 0.25)),
        (10, -1.5387527308351728),  # tables of normal order statistics
        (100, -2.507593636),
    ],
)
def test_the_expected_minimum_of_normals(count: int, expected: float) -> None:
    assert expected_minimum(count) == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_spread_and_minimum_of_values() -> None:
    values = [2.06, 2.01, 2.1]
    assert spread(values) == (pytest.approx(statistics.mean(values)), pytest.approx(statistics.stdev(values)), 3)
    assert str(spread(values)) == "2.057 ± 0.045 (3 seeds)"
    least = minimum(values)
    assert (least.value, least.seeds) == (2.01, 3)
    assert least.bias == pytest.approx(-0.8462843753 * statistics.stdev(values))
    assert str(least) == "2.01 (minimum of 3, expected -0.038 beside the mean)"


def test_less_than_two_values_have_no_spread() -> None:
    for function in (spread, minimum):
        with pytest.raises(ValueError, match="at least two values, got 1"):
            function([2.0])
    with pytest.raises(ValueError, match="count must be ≥ 1"):
        expected_minimum(0)
