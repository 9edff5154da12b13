# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: values computed by hand."""

import math

import pytest

from scm_core.train.schedule import Schedule


def test_constant() -> None:
    """Factor 1 throughout."""
    assert [Schedule()(i, 10) for i in (0, 5, 9)] == [1, 1, 1]


def test_ramp_up() -> None:
    """Linear from 1/50 at the first step to 1 at the fiftieth, whatever the rule."""
    schedule = Schedule(ramp_up=50)
    assert schedule(0, 1000) == pytest.approx(0.02)
    assert schedule(24, 1000) == pytest.approx(0.5)
    assert schedule(49, 1000) == schedule(50, 1000) == 1


def test_linear_decay() -> None:
    """The demo's: constant to 30%, then linear towards 3% at the end of the run."""
    schedule = Schedule("linear", ramp_up=10, start=0.3, final=0.03)
    assert schedule(4, 1000) == pytest.approx(0.5)
    assert schedule(299, 1000) == schedule(300, 1000) == 1
    assert schedule(650, 1000) == pytest.approx(0.515)  # half-way down: (1 + 0.03)/2
    assert schedule(1000, 1000) == pytest.approx(0.03)
    assert schedule(999, 1000) == pytest.approx(1 - 0.97 * 699 / 700)


def test_linear_decay_over_the_whole_run() -> None:
    """start = final = 0: from 1 to nearly 0, and never beyond."""
    schedule = Schedule("linear")
    assert [schedule(i, 4) for i in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert schedule(0, 1) == 1


def test_inverse_square_root() -> None:
    """EDM2: α/√max(i/t_ref, 1), constant until t_ref."""
    schedule = Schedule("inverse_sqrt", ramp_up=100, t_ref=1000)
    assert schedule(49, 10**6) == pytest.approx(0.5)
    assert schedule(999, 10**6) == schedule(1000, 10**6) == 1
    assert schedule(4000, 10**6) == pytest.approx(0.5)
    assert schedule(2000, 10**6) == pytest.approx(1 / math.sqrt(2))
    assert Schedule("inverse_sqrt")(10**9, 10) == 1  # no t_ref: constant


def test_unknown_rule_is_named() -> None:
    """A rule that does not exist is an error, not a constant."""
    with pytest.raises(ValueError, match=r"decay.rule: expected constant, linear, inverse_sqrt, got 'cosine'"):
        Schedule("cosine")(0, 1)  # type: ignore[arg-type]
