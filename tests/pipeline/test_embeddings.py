# SPDX-License-Identifier: Apache-2.0
"""Figure 4: the two parts of dF/dt against finite differences, and that embeddings do what they are drawn for."""

import math
from pathlib import Path

import pytest
import torch

from pipeline.embeddings import VARIANTS, embedding_of, measure, parts, times
from pipeline.figures import Figure4
from pipeline.params import load
from scm_core.nn.mlp import MLP

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan() -> Figure4:
    found = load(ROOT / "params.yaml", "smoke").active.figure4
    assert found is not None
    return found


def network(plan: Figure4, variant: str) -> MLP:
    """Untrained, with an output; in float64."""
    torch.manual_seed(1)
    net = MLP(2, plan.width, plan.blocks, **embedding_of(variant, plan, 0))
    torch.nn.init.ones_(net.out_gain)
    return net.double()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_are_those_of_the_derivative_along_the_path(plan: Figure4, variant: str) -> None:
    """A central difference along (dx/dt, 0) and (0, 1): x_t moves by σ_d F, the network's argument x_t/σ_d by F."""
    net, h = network(plan, variant), 1e-7
    x_t = plan.sigma_data * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((5,), 0.7, dtype=torch.float64)
    space, time = parts(net, x_t, t, plan.sigma_data)

    def F(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return net(x / plan.sigma_data, at)

    velocity = plan.sigma_data * F(x_t, t)
    moved = (F(x_t + h * velocity, t) - F(x_t - h * velocity, t)) / (2 * h)
    later = (F(x_t, t + h) - F(x_t, t - h)) / (2 * h)
    torch.testing.assert_close(space, moved.norm(dim=1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(time, later.norm(dim=1), rtol=1e-4, atol=1e-7)


def test_fourier_features_of_scale_16_move_fastest_with_time_even_untrained(plan: Figure4) -> None:
    """√2 cos(2π 16 f c): its derivative is a hundred times a positional embedding's, and EDM's dc/dt = 1/(4 sin t cos t) adds to it."""
    x_t = plan.sigma_data * torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((64,), 0.1, dtype=torch.float64)
    fourier, edm, trigflow = (float(parts(network(plan, v), x_t, t, plan.sigma_data)[1].mean()) for v in VARIANTS)
    assert fourier > 10 * edm > 10 * trigflow


def test_times_reach_from_the_smallest_to_the_largest_noise(plan: Figure4) -> None:
    found = times(plan)
    assert len(found) == plan.times
    assert float(found[0]) == pytest.approx(math.atan(0.002 / plan.sigma_data))
    assert float(found[-1]) == pytest.approx(math.atan(80 / plan.sigma_data))
    steps = torch.log(torch.tan(found)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(len(steps)))


def test_every_variant_is_trained_from_every_seed(plan: Figure4) -> None:
    short = plan.model_copy(update={"iterations": 2, "points": 4, "times": 2})
    heard: list[int] = []
    rows = measure(short, 0, heard.append)
    assert len(rows) == len(VARIANTS) * short.seeds * 2 * 2
    assert all(math.isfinite(row.value) for row in rows)
    assert heard == sorted(heard)
    assert heard[-1] == len(VARIANTS) * short.seeds * 2
    assert rows == measure(short, 0)
    by_seed = {row.seed: row.value for row in rows if (row.embedding, row.quantity) == ("edm_positional", "time")}
    assert by_seed[0] != by_seed[1]
