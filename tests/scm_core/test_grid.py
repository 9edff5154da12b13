# SPDX-License-Identifier: Apache-2.0
"""Constants of the objectives: one copy for each device, and the times around t."""

import torch

from scm_core.guidance import data_velocity
from scm_core.objectives.discrete import DiscreteObjective, interval_times
from scm_core.objectives.grid import Ascending, Copies
from scm_core.objectives.multistep import MultistepObjective

F64 = torch.float64
META = torch.device("meta")
OPTIONS = {"P_mean": -1.0, "P_std": 1.4, "warmup": 0}


def test_a_device_gets_one_copy() -> None:
    """The second call gives what the first one made; types and devices do not mix, and the original stays."""
    own = Copies(torch.tensor([0.1, 0.2], dtype=F64))
    assert own.on(META, torch.float32) is own.on(META, torch.float32)
    assert own.on(META, F64).dtype == F64
    assert own.on(torch.device("cpu"), torch.float32).tolist() == torch.tensor([0.1, 0.2]).tolist()
    assert own.numbers.tolist() == [0.1, 0.2]


def test_times_around_t() -> None:
    """On the grid, between its times, below and beyond it."""
    grid = Ascending(torch.tensor([0.0, 0.5, 1.0]))
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
    assert grid.before(t).tolist() == [0, 0, 0, 0.5, 0.5, 1.0]
    assert grid.rounded_up(t).tolist() == [0, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert grid.before(t.double()).dtype == F64


def test_a_discrete_objective_has_no_order_of_calls() -> None:
    """`tangent` works on a device where `times` has not been, and leaves the others alone; float64 has the unrounded grid."""
    own = DiscreteObjective(lambda x, t: x, None, data_velocity, 0.5, intervals=8, **OPTIONS)  # type: ignore[arg-type]
    x, t = torch.ones(3, 2), torch.full((3,), 0.7)
    elsewhere = x.to(META)
    assert own.tangent(lambda x, t: torch.tanh(x), elsewhere, t.to(META), elsewhere, 1.0).g.device == META
    assert torch.isfinite(own.tangent(lambda x, t: torch.tanh(x), x, t, x, 1.0).g).all()
    drawn = own.times(100, torch.Generator().manual_seed(0), F64)
    assert torch.isin(drawn, interval_times(8, 0.5)).all()
    assert not torch.isin(drawn, interval_times(8, 0.5).float().double()).all()


def test_nothing_is_before_zero() -> None:
    """t = 0 does not wrap around to the grid's last time: its tangent is not a number, which training counts as a bad step."""
    own = DiscreteObjective(lambda x, t: x, None, data_velocity, 0.5, intervals=8, **OPTIONS)  # type: ignore[arg-type]
    x = torch.ones(2, 3)
    g = own.tangent(lambda x, t: torch.tanh(x), x, torch.tensor([0.0, 0.7]), x, 1.0).g
    assert torch.isnan(g[0]).all()
    assert torch.isfinite(g[1]).all()


def test_segments_end_where_they_are_asked_for() -> None:
    """The ends of segments are looked up on the device and in the type of t, from one copy each."""
    own = MultistepObjective(lambda x, t: x, None, data_velocity, 0.5, segments=4, **OPTIONS)  # type: ignore[arg-type]
    t = torch.tensor([0.1, 1.0])
    for _ in range(2):
        assert own.end(t.to(META)).device == META
        assert own.end(t).dtype == torch.float32
        assert own.end(t.double()).dtype == F64
    assert len(own.ends.copies) == 3
