# SPDX-License-Identifier: Apache-2.0
"""The power-function average: its exponent, and its weights against the closed form and brute force."""

import math

import pytest
import torch
from torch import nn

from scm_core.ema import PowerEma, power_beta, sigma_rel_to_gamma


class Scalar(nn.Module):
    """One parameter in double precision, which follows a given path."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.p.fill_(value)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.01, 96.99), (0.05, 16.97), (0.10, 6.94)])
def test_known_exponents(sigma_rel: float, gamma: float) -> None:
    """The three widths that EDM2 names."""
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, abs=0.01)


@pytest.mark.parametrize("sigma_rel", [0.005, 0.03, 0.1, 0.2, 0.27])
def test_exponent_gives_the_relative_width(sigma_rel: float) -> None:
    """σ_rel is the standard deviation of τ under the weight (γ+1) τ^γ on [0, 1], by its moments."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    first, second = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(second - first**2) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, math.nan])
def test_impossible_widths_are_named(sigma_rel: float) -> None:
    """There is no such average for a width outside (0, 0.28)."""
    with pytest.raises(ValueError, match="sigma_rel: expected a relative width"):
        sigma_rel_to_gamma(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_average_of_a_polynomial_path(sigma_rel: float, power: int) -> None:
    """θ(τ) = τ^k averages to ∫₀¹ (γ+1) τ^γ τ^k dτ = (γ+1)/(γ+k+1), with an error that falls with the step."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    expected = (gamma + 1) / (gamma + power + 1)
    errors = []
    for steps in (500, 1000):
        net = Scalar(17.0)  # a first value that must be forgotten
        ema = PowerEma(net, sigma_rel)
        for step in range(1, steps + 1):
            net.set((step / steps) ** power)
            ema.update(nimg=step * 8, batch=8)
        errors.append(abs(float(ema.average["p"]) - expected))
    assert errors[1] < 3e-3
    assert errors[1] < 0.6 * errors[0] + 1e-12


def test_average_is_the_brute_force_weighting() -> None:
    """With unequal batches each value weighs (n_i/n)^{γ+1} − (n_{i−1}/n)^{γ+1}: the integral of the power over its images."""
    batches = [8, 8, 16, 4, 4, 32, 1, 8]
    values = [0.3, -1.0, 2.0, 0.7, 0.1, 5.0, -3.0, 1.0]
    net = Scalar(99.0)
    ema = PowerEma(net, 0.1)
    seen = 0
    for batch, value in zip(batches, values, strict=True):
        seen += batch
        net.set(value)
        ema.update(seen, batch)
    edges = [sum(batches[:i]) / seen for i in range(len(batches) + 1)]
    weights = [edges[i + 1] ** (ema.gamma + 1) - edges[i] ** (ema.gamma + 1) for i in range(len(batches))]
    assert sum(weights) == pytest.approx(1)
    assert float(ema.average["p"]) == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)), rel=1e-12)


def test_beta_is_its_formula() -> None:
    """β(n) = (1 − Δn/n)^{γ+1}; the first update replaces the initial weights entirely."""
    assert power_beta(1000, 10, 6.94) == pytest.approx(0.99**7.94)
    assert power_beta(64, 64, 6.94) == 0
    net = Scalar(3.0)
    ema = PowerEma(net, 0.1)
    net.set(5.0)
    ema.update(64, 64)
    assert float(ema.average["p"]) == 5


def test_average_is_separate_from_the_network_and_can_be_stored() -> None:
    """The average neither shares memory with the weights nor gets gradients; `load` takes `state` over."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    ema = PowerEma(net, 0.05)
    before = {name: value.clone() for name, value in ema.state().items()}
    assert before.keys() == dict(net.named_parameters()).keys()
    with torch.no_grad():
        net.weight.add_(1)
    assert all(torch.equal(ema.average[name], value) for name, value in before.items())
    ema.update(100, 10)
    assert not any(value.requires_grad for value in ema.state().values())
    other = PowerEma(nn.Linear(3, 2), 0.05)
    other.load(ema.state())
    assert all(torch.equal(other.average[name], value) for name, value in ema.state().items())
    other.average["weight"].zero_()
    assert ema.average["weight"].any()
