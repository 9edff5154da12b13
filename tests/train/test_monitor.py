# SPDX-License-Identifier: Apache-2.0
"""Planted failures are seen, once each; series without any are left alone, however noisy, negative or steep."""

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from scm_core.train.monitor import Monitor

Noise = Callable[[np.random.Generator, int], np.ndarray]
N = 200
NOISES: dict[str, Noise] = {
    "gaussian": lambda rng, n: rng.standard_normal(n),
    "student5": lambda rng, n: rng.standard_t(5, n),
    "student3": lambda rng, n: rng.standard_t(3, n),
    "correlated": lambda rng, n: correlated(rng.standard_normal(n), 0.95),
}
at = np.arange(N)
TRENDS = {
    "flat": 0.0 * at,
    "negative": 0.0 * at - 1000,
    "falling": -0.3 * at,
    "rising": 0.3 * at,
    "learning": 30 * np.exp(-at / 15) - 6,
    "warmup": 20 * np.minimum(1, at / 150) - 5,
    "schedule": np.where(at > 100, -4.0, 0.0),
}


def correlated(steps: np.ndarray, share: float) -> np.ndarray:
    """AR(1) noise of unit variance."""
    values = [steps[0]]
    for step in steps[1:]:
        values.append(share * values[-1] + math.sqrt(1 - share**2) * step)
    return np.array(values)


def heard(monitor: Monitor, values: Iterable[float], key: str = "loss", first: int = 0) -> list[tuple[int, str]]:
    """(interval, warning) for a series of one scalar."""
    return [(i, text) for i, value in enumerate(values, first) for text in monitor.update(i, {key: float(value)})]


def when(values: Iterable[float], key: str = "loss", **options: Any) -> list[int]:
    """The intervals at which a new monitor warns."""
    return [i for i, _ in heard(Monitor(**options), values, key)]


def noisy(seed: int = 0, n: int = N, level: float = 0.0) -> np.ndarray:
    return level + np.random.default_rng(seed).standard_normal(n)


@pytest.mark.parametrize("trend", TRENDS)
def test_a_spike_is_seen_where_it_is(trend: str) -> None:
    """25 standard deviations of the noise above a series that may fall, rise, or have any level; nothing else is said."""
    for seed in range(20):
        values = TRENDS[trend] + noisy(seed)
        place = 60 + 6 * seed
        values[place] += 25
        assert when(values) == [place]


@pytest.mark.parametrize(("noise", "most"), [("gaussian", 1), ("correlated", 10), ("student5", 3), ("student3", 20)])
def test_false_alarms_are_rare(noise: str, most: int) -> None:
    """Of 14,000 intervals of each noise, 10 runs of each trend: at most 1.5 in 1,000 for Student's t with 3 degrees of freedom, whose
    variance barely exists."""
    rng = np.random.default_rng(1)
    alarms = sum(len(when(trend + NOISES[noise](rng, N))) for trend in TRENDS.values() for _ in range(10))
    assert alarms <= most


def test_a_spike_is_measured_in_robust_standard_deviations() -> None:
    """Alternating 4 and 6: median 5 of an even number of them, neighbours 2 apart, so that `spike` = 4 is 5 + 4 · 2 · 1.4826/√2 = 13.39.
    The last seven alone have the median 6, and 14.39."""
    values = [4.0, 6.0] * 10
    assert when([*values, 14.38], spike=4) == []
    assert when([*values, 14.39], spike=4) == [20]
    [(_, text)] = heard(Monitor(spike=4), [*values, 6 + 2 * 14.826 / math.sqrt(2)])
    assert text == (
        "iteration 20: loss 26.97: a spike, 10 robust standard deviations above the median 6 of the intervals before"
    )


def test_the_robust_deviation_is_that_of_gaussian_noise() -> None:
    """Over many windows: the warning begins at `spike` true standard deviations on average, of a loss that falls, too."""
    begins = []
    for seed in range(100):
        monitor = Monitor(spike=6.0)
        values = noisy(seed, 60) - 0.05 * np.arange(60)
        heard(monitor, values[:50])
        state = monitor.state()
        middle = max(np.median(values[:50]), np.median(values[43:50]))

        def warns(value: float, state: dict[str, Any] = state) -> bool:
            other = Monitor(spike=6.0)
            other.restore(json.loads(json.dumps(state)))
            return bool(other.update(50, {"loss": value}))

        low, high = float(middle), float(middle) + 100
        for _ in range(20):
            half = (low + high) / 2
            low, high = (low, half) if warns(half) else (half, high)
        begins.append(low - middle)
    assert np.mean(begins) == pytest.approx(6, rel=0.05)


@pytest.mark.parametrize("slope", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("curve", [lambda x: x, np.sqrt, lambda x: -x, lambda x: 1 - np.exp(-x / 20)])
def test_a_trend_without_noise_is_no_spike(slope: float, curve: Callable[[np.ndarray], np.ndarray]) -> None:
    assert when(slope * curve(at.astype(float)), spike=4.0) == []


@pytest.mark.parametrize("level", [0.5, -7.0])
def test_a_constant_loss(level: float) -> None:
    """Rounding is no spike; a tenth more is."""
    values = level * (1 + 1e-7 * noisy())
    assert when(values) == []
    values[120] += 0.1 * abs(level)
    assert when(values) == [120]
    assert when([level] * 20 + [level * (1 + math.copysign(1e-3, level))]) == []
    assert when([0.0] * 100) == []


def test_one_warning_for_an_event() -> None:
    values = noisy()
    values[80:83] += 40  # lasts
    values[85] += 40  # flickers: two calm intervals end nothing
    values[150] += 40  # another one
    assert when(values) == [80, 150]
    assert when(values, calm=2) == [80, 85, 150]


def test_an_event_ends_well_below_where_it_began() -> None:
    """At half the deviation, or a factor of 2: what only just left it has not ended it."""
    for key, before, event, near, away in (
        ("loss", [4.0, 6.0] * 20, 40.0, 21.0, 13.0),  # 10 deviations: 26.97, 5: 16.48
        ("tangent_norm", [1.0] * 40, 1e3, 70.0, 40.0),  # 100, 50
        ("tangent_norm", [1.0] * 40, 1e-5, 1.5e-3, 3e-3),  # 1e-3, 2e-3
    ):
        assert when([*before, event, near, event], key, calm=1) == [40]
        assert when([*before, event, away, event], key, calm=1) == [40, 42]


def test_a_level_that_stays_becomes_the_normal_one() -> None:
    values = noisy(n=300)
    values[100:] += 50
    assert when(values) == [100]
    values[250] += 40
    assert when(values) == [100, 250]


def test_falling_is_no_spike() -> None:
    values = noisy()
    values[100:] -= 1000
    assert when(values) == []


def test_nothing_is_said_at_first() -> None:
    values = [1.0, 100.0, -3.0, 50.0, 2.0, 1e5, 1.0, 1e6, 0.0, 1e7]
    for key in ("loss", "tangent_norm"):
        assert when(values, key) == []
    assert when([*[1.0] * 9, 1e9]) == []  # the tenth
    assert when([*[1.0] * 10, 1e9]) == [10]
    assert when([0.0] * 9, "grad_norm") == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_said_and_not_remembered(bad: float) -> None:
    for key in ("loss", "tangent_norm"):
        values = [*noisy(level=10), bad, bad, *noisy(1, n=10, level=10)]
        monitor = Monitor()
        assert [i for i, _ in heard(monitor, values, key)] == [N]
        json.dumps(monitor.state(), allow_nan=False)


def tangents(seed: int = 0, n: int = N) -> np.ndarray:
    """Norms that scatter by a factor of e^±0.5."""
    return 3 * np.exp(0.5 * noisy(seed, n))


def test_tangents_that_die() -> None:
    """At once, to nothing or next to it; slowly, by 10% each interval, which a running median follows: then the start is what counts."""
    for share in (1e-5, 0.0):
        values = tangents()
        values[100:] *= share
        [(place, text)] = heard(Monitor(), values, "tangent_norm")
        assert place == 100
        assert "tangents are dying; the median of the last 50 intervals is 3" in text
    slow = 3 * 0.9**at
    expected = next(i for i in range(N) if slow[i] < 1e-4 * np.median(slow[:10]))
    assert when(slow, "tangent_norm") == [expected]
    assert when(slow, "tangent_norm", window=10) == [expected]  # its start is not the window's
    assert when(slow, "tangent_norm", floor=1e-30) == []
    grown = 1e-6 * np.minimum(1e6, 1.1 ** np.arange(300.0))  # far above its start
    grown[280:] *= 1e-4
    assert when(grown, "tangent_norm") == [280]


def test_tangents_that_explode() -> None:
    values = tangents()
    values[120:123] *= 1e4
    [(place, text)] = heard(Monitor(), values, "tangent_norm")
    assert place == 120
    assert "tangents explode; the median of the last 50 intervals is" in text
    assert when(1.3**at, "tangent_norm") != []
    assert when(values, "tangent_norm", explode=1e6) == []


def test_tangents_that_are_well() -> None:
    """Scattering, fading to a tenth, growing with the warmup from nothing, where a student equals its teacher."""
    for seed in range(30):
        values = tangents(seed)
        for factor in (1.0, 0.1 ** (at / N), at / N):
            assert when(factor * values, "tangent_norm") == []
    assert when([0.0] * 15 + [1.0] * 5, "tangent_norm") == []


def test_gradients_that_are_gone() -> None:
    values = np.abs(noisy()) + 0.1
    values[50:52] = 0  # two intervals are not yet three
    values[100:120] = 0
    values[140:143] = 0
    found = heard(Monitor(), values, "grad_norm")
    assert [i for i, _ in found] == [102, 142]
    assert found[0][1] == (
        "iteration 102: grad_norm 0: for 3 intervals in a row: nothing is learned; in half precision, gradients underflow"
    )
    assert when(values, "grad_norm", dead=2) == [51, 101, 141]
    assert when([0.0] * 30, "grad_norm") == [10]  # never alive: said after the first intervals
    assert when(values * 1e-30, "grad_norm") == [102, 142]  # tiny is not 0


def test_companions_are_watched_and_other_scalars_are_not() -> None:
    monitor = Monitor()
    for i in range(20):
        assert monitor.update(i, {"phi/loss": 1.0, "phi/grad_norm": 1.0, "loss": 1.0, "images_per_second": 1.0}) == []
    said = monitor.update(20, {"phi/loss": 9.0, "loss": 1.0, "images_per_second": 1e9, "lr": 1e9})
    assert len(said) == 1
    assert said[0].startswith("iteration 20: phi/loss 9: a spike")
    both = monitor.update(21, {"loss": 9.0, "phi/loss": 9.0})
    assert len(both) == 1  # the companion's goes on
    assert both[0].startswith("iteration 21: loss 9: a spike")


def test_a_resumed_run_warns_the_same() -> None:
    """Through JSON, wherever it was cut: in the first intervals, between events and in the midst of one."""
    rng = np.random.default_rng(3)
    rows = [
        {"loss": a, "tangent_norm": b, "grad_norm": c}
        for a, b, c in zip(rng.standard_t(3, N), tangents(), np.abs(noisy(5)), strict=True)
    ]
    for i in range(90, 100):
        rows[i] = {"loss": 60.0 + i, "tangent_norm": 1e-9, "grad_norm": 0.0}
    whole = Monitor()
    expected = [text for i, row in enumerate(rows) for text in whole.update(i, row)]
    assert len(expected) >= 3
    for cut in (0, 5, 11, 91, 92, 95, 101, 150):
        first, second = Monitor(), Monitor()
        said = [text for i, row in enumerate(rows[:cut]) for text in first.update(i, row)]
        second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
        said += [text for i, row in enumerate(rows[cut:], cut) for text in second.update(i, row)]
        assert said == expected
        assert second.state() == whole.state()


def test_a_state_is_a_copy() -> None:
    monitor = Monitor()
    heard(monitor, [*noisy(n=20), 99.0])
    state = monitor.state()
    other = Monitor(window=12)
    other.restore(state)
    assert other.state()["loss"]["last"] == state["loss"]["last"][-12:]
    before = json.dumps(state)
    heard(monitor, noisy(1), first=21)
    heard(other, noisy(1), first=21)
    assert json.dumps(state) == before
    assert len(other.state()["loss"]["last"]) == 12


@pytest.mark.parametrize("state", [{"loss": 3}, {"loss": {"last": [], "more": 1}}])
def test_a_state_of_something_else_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"state: expected what Monitor\.state\(\) gives, got \{'loss'"):
        Monitor().restore(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_up": 2}, "warm_up: expected 3 intervals to window = 50, got 2"),
        ({"window": 5}, "warm_up: expected 3 intervals to window = 5, got 10"),
        ({"spike": 0.0}, "spike: expected a positive number, got 0.0"),
        ({"vanish": 1.0}, "vanish: expected a share in (0, 0.5), got 1.0"),
        ({"floor": 0.0}, "floor: expected a share in (0, 0.5), got 0.0"),
        ({"explode": 2.0}, "explode: expected a factor > 2, got 2.0"),
        ({"dead": 0}, "dead: expected a number of intervals >= 1, got 0"),
        ({"calm": 0}, "calm: expected a number of intervals >= 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Monitor(**options)
