# SPDX-License-Identifier: Apache-2.0
"""Figure 3's tangent errors compare methods at the same points: one draw of times for all, which discrete time rounds up to its grid."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import toy as module
from pipeline.params import load
from pipeline.toy import Toy
from scm_core.objectives.discrete import interval_times

ROOT = Path(__file__).resolve().parents[2]
COUNTS = (8, 64, 4096)


def test_tangent_errors_are_measured_at_one_draw_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of dsCD are the first of its grid that are not below those of sCD; x0 and z are the same."""
    plan = load(ROOT / "params.yaml", scale="smoke").active.figure3
    assert plan is not None
    toy = Toy(plan, seed=0)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    diffuse = module.diffuse

    def spy(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        seen.append((x0, z, t))
        return diffuse(x0, z, t)

    monkeypatch.setattr(module, "diffuse", spy)
    net = toy.network()
    torch.nn.init.ones_(net.out_gain)
    errors = [toy.tangent_error(net, "fp32", n) for n in (None, *COUNTS)]
    x0, z, t = seen[0]
    for n, (own_x0, own_z, own_t) in zip(COUNTS, seen[1:], strict=True):
        assert torch.equal(own_x0, x0)
        assert torch.equal(own_z, z)
        grid = interval_times(n, plan.sigma_data).float()
        expected = torch.stack([grid[grid >= value].min() if value <= grid[-1] else grid[-1] for value in t])
        assert torch.equal(own_t, expected)
    assert errors[0] < 1e-5
    assert errors[1] > errors[2] > errors[3] > errors[0]
