# SPDX-License-Identifier: Apache-2.0
"""Warnings, in words, when a training run goes wrong: a loss that jumps, tangents that die or explode, gradients that are gone.

Each scalar of a log interval is compared with those before it, never with a number given in advance: losses with adaptive weighting are
often negative, and tangents differ by orders of magnitude between methods.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from scm_core.validate import check_positive

ROBUST = 1.4826 / math.sqrt(2)  # standard deviation of Gaussian noise over the median distance of two of its values
RECENT = 7  # intervals whose median follows a rising trend that the whole window's lags behind
SMALLEST = 1e-3  # the least spread, as a share of the values: a constant loss that rounding moves does not jump


@dataclass
class Series:
    """One scalar so far: its last finite values, the median of its first ones, zeros in a row, and the events that go on, each with the
    number of calm intervals since it was last seen."""

    last: list[float] = field(default_factory=list)
    start: float | None = None
    zeros: int = 0
    events: dict[str, int] = field(default_factory=dict)


class Monitor:
    """Watches the loss, `tangent_norm` and `grad_norm` of a run, and those of its companions (`phi/loss`).

    Each value is compared with the last `window` intervals; the first `warm_up` ones are only remembered.

    - `spike`: a loss above their median by more than this many robust standard deviations. Level and sign do not matter. Nor does a trend:
      the deviation is that of neighbouring values (1.05 times their median distance, exact for a Gaussian), and the median of the last
      few counts where it is the higher one. 10 gives no false alarm in 10,000 intervals of Gaussian noise, 1 of Student's t with 5 degrees
      of freedom, and 6 with 3, whatever the trend.
    - `vanish`, `floor`: a tangent norm below this share of their median or, for one that fades slowly, of the median of the first ones.
    - `explode`: a tangent norm above their median times this.
    - `dead`: this many intervals in a row whose mean gradient norm is exactly 0 (half precision underflows).

    One warning for each event, which ends after `calm` intervals in a row that are clear of it (by half the deviation, or a factor of 2). A
    level that stays becomes the normal one. Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        window: int = 50,
        warm_up: int = 10,
        spike: float = 10.0,
        vanish: float = 1e-3,
        floor: float = 1e-4,
        explode: float = 100.0,
        dead: int = 3,
        calm: int = 3,
    ) -> None:
        if not 3 <= warm_up <= window:
            raise ValueError(f"warm_up: expected 3 intervals to window = {window}, got {warm_up}")
        check_positive("spike", spike)
        for name, share in {"vanish": vanish, "floor": floor}.items():
            if not 0 < share < 0.5:
                raise ValueError(f"{name}: expected a share in (0, 0.5), got {share}")
        if not (math.isfinite(explode) and explode > 2):
            raise ValueError(f"explode: expected a factor > 2, got {explode}")
        for name, count in {"dead": dead, "calm": calm}.items():
            if count < 1:
                raise ValueError(f"{name}: expected a number of intervals >= 1, got {count}")
        self.window, self.warm_up, self.spike, self.vanish = window, warm_up, spike, vanish
        self.floor, self.explode, self.dead, self.calm = floor, explode, dead, calm
        self._series: dict[str, Series] = {}

    def update(self, iteration: int, scalars: Mapping[str, float]) -> list[str]:
        """What is wrong with the log interval that ends at `iteration` and was not yet said; `scalars` are its means by name."""
        checks = {"loss": self._loss, "tangent_norm": self._tangent, "grad_norm": self._gradient}
        found: list[str] = []
        for key, value in scalars.items():
            check = checks.get(key.rpartition("/")[2])
            if check is None:
                continue
            series = self._series.setdefault(key, Series())
            series.zeros = series.zeros + 1 if value == 0 else 0
            if len(series.last) >= self.warm_up:
                found += [f"iteration {iteration}: {key} {value:.4g}: {text}" for text in check(series, value)]
            if math.isfinite(value):
                series.last = [*series.last, float(value)][-self.window :]
                if series.start is None and len(series.last) == self.warm_up:
                    series.start = median(series.last)
        return found

    def state(self) -> dict[str, Any]:
        """What `update` remembers, for JSON: a monitor that takes it over says what this one would have said."""
        return {key: asdict(series) for key, series in self._series.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state()` of another monitor; a shorter window keeps the newest values. ValueError for what is no such state."""
        try:
            made = {key: Series(**value) for key, value in state.items()}
        except TypeError as error:
            raise ValueError(f"state: expected what Monitor.state() gives, got {state!r:.200}: {error}") from None
        for series in made.values():  # copies, and of this window
            series.last, series.events = series.last[-self.window :], dict(series.events)
        self._series = made

    def _loss(self, series: Series, value: float) -> list[str]:
        middle = max(median(series.last), median(series.last[-RECENT:]))
        spread = ROBUST * median(abs(a - b) for a, b in pairwise(series.last))
        spread = max(spread, SMALLEST * median(abs(x) for x in series.last))
        wrong = not value <= middle + self.spike * spread  # NaN too
        far = f"{(value - middle) / spread:.0f} robust standard deviations" if spread else "far"
        text = f"a spike, {far} above the median {middle:.4g} of the intervals before"
        return self._event(series, "spike", wrong, value <= middle + self.spike / 2 * spread, text)

    def _tangent(self, series: Series, value: float) -> list[str]:
        middle, start = median(series.last), series.start or 0.0
        low, high = max(self.vanish * middle, self.floor * start), self.explode * middle
        before = f"the median of the last {len(series.last)} intervals is {middle:.4g}"
        return [
            *self._event(
                series,
                "vanish",
                value < low,
                value > 2 * low,
                f"tangents are dying; {before}, at first it was {start:.4g}",
            ),
            # 0: a student that starts equal to its teacher has no tangent before the warmup begins
            *self._event(
                series, "explode", not value <= high and middle > 0, value < high / 2, f"tangents explode; {before}"
            ),
        ]

    def _gradient(self, series: Series, value: float) -> list[str]:
        text = f"for {series.zeros} intervals in a row: nothing is learned; in half precision, gradients underflow"
        return self._event(series, "dead", series.zeros >= self.dead, value != 0, text)

    def _event(self, series: Series, name: str, wrong: bool, clear: bool, text: str) -> list[str]:
        """`text` where an event begins; one that goes on is not told again."""
        if name not in series.events:
            if wrong:
                series.events[name] = 0
            return [text] if wrong else []
        series.events[name] = series.events[name] + 1 if clear else 0
        if series.events[name] >= self.calm:
            del series.events[name]
        return []
