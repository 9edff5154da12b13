# SPDX-License-Identifier: Apache-2.0
"""Averages of weights against closed forms, and post-hoc reconstruction against averages made by brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from scm_core.ema import HalfLifeEma, PowerEma, Snapshot, combine, reconstruct, sigma_rel_to_gamma

F64 = torch.float64
BATCH = 8


class Path(nn.Module):
    """Weights that follow a given path, in double precision."""

    def __init__(self, first: np.ndarray) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.from_numpy(first.copy()))

    def set(self, value: np.ndarray) -> None:
        with torch.no_grad():
            self.p.copy_(torch.from_numpy(value))


# --- closed forms --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10])
def test_polynomial_paths_to_first_order_in_the_step(sigma_rel: float) -> None:
    """θ(n) = n^p averages to n^p (γ+1)/(γ+1+p); the recursion's error is of first order in Δn (measured slope 1 ± 0.05)."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    powers = np.array([0.0, 0.5, 1.0, 2.0, 3.0])
    expected = (gamma + 1) / (gamma + 1 + powers)
    counts, errors = [400, 800, 1600], []
    for steps in counts:
        net = Path(np.full(5, 17.0))  # a first value that must be forgotten
        ema = PowerEma(net, sigma_rel)
        for step in range(1, steps + 1):
            net.set((step / steps) ** powers)
            ema.update(step * BATCH, BATCH)
        errors.append(np.abs(ema.average["p"].numpy() - expected))
    table = np.array(errors)
    assert table[:, 0].max() < 1e-12  # a constant path has no error
    for k in range(1, len(powers)):
        slope = -np.polyfit(np.log(counts), np.log(table[:, k]), 1)[0]
        assert slope == pytest.approx(1, abs=0.05)
    assert table[-1].max() < 3 / counts[-1]


def test_half_life_average_of_a_linear_path() -> None:
    """Without ramp-up the average of θ(n) = n lags by H/ln 2, the mean age under 2^{−age/H}, up to a step."""
    H, steps = 400.0, 2000
    net = Path(np.zeros(1))
    ema = HalfLifeEma(net, H, rampup=None)
    for step in range(1, steps + 1):
        net.set(np.array([step * BATCH], dtype=float))
        ema.update(step * BATCH, BATCH)
    assert steps * BATCH - float(ema.average["p"]) == pytest.approx(H / math.log(2), abs=BATCH)


def test_ramp_up_is_a_power_function_average() -> None:
    """While H(n) = ratio · n, β = 2^{−Δn/(ratio n)} ≈ (1 − Δn/n)^{ln 2/ratio}: the power-function average with γ + 1 = ln 2/ratio."""
    ratio, steps = 0.05, 4000
    net = Path(np.zeros(1))
    ema = HalfLifeEma(net, 1e12, rampup=ratio)
    for step in range(1, steps + 1):
        net.set(np.array([step / steps]))
        ema.update(step * BATCH, BATCH)
    exponent = math.log(2) / ratio
    assert float(ema.average["p"]) == pytest.approx(exponent / (exponent + 1), abs=2 / steps)


# --- reconstruction ------------------------------------------------------------------------------------------------------------------


def profile(t: float, n: float, sigma_rel: float) -> float:
    """p(t) = (γ+1) t^γ / n^{γ+1} on [0, n] (EDM2, Eq. 119)."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    return (gamma + 1) / n * (t / n) ** gamma if t <= n else 0.0


def test_combination_is_the_least_squares_fit_of_the_profiles() -> None:
    """The residual is orthogonal to each stored profile, and the stated error its norm: by numerical integration."""
    stored, target = [(50, 0.05), (100, 0.05), (100, 0.10), (200, 0.10)], (180, 0.07)
    result = combine(stored, *target)

    def residual(t: float) -> float:
        return profile(t, *target) - sum(
            c * profile(t, n, s) for c, (n, s) in zip(result.coefficients, stored, strict=True)
        )

    def integral(function) -> float:  # type: ignore[no-untyped-def]
        return quad(function, 0, 200, points=[50, 100, 180], epsabs=1e-13, limit=200)[0]

    norm = integral(lambda t: profile(t, *target) ** 2)
    for n, s in stored:
        assert abs(integral(lambda t, n=n, s=s: residual(t) * profile(t, n, s))) < 1e-9 * norm
    assert result.error == pytest.approx(math.sqrt(integral(lambda t: residual(t) ** 2) / norm), rel=1e-6)
    assert 0.01 < result.error < 1


STORED_WIDTHS = (0.05, 0.10)
SNAPSHOTS = 32
STEPS = 4096


@pytest.fixture(scope="module")
def run() -> tuple[list[Snapshot], dict[float, np.ndarray]]:
    """A training run: weights with a trend 1 + √(n/N) and Ornstein-Uhlenbeck noise (standard deviation 0.3, correlation over 1% of the
    run), averaged at σ_rel 0.05 and 0.10 with 32 snapshots, and at other widths by brute force."""
    rng = np.random.default_rng(0)
    keep = math.exp(-1 / (0.01 * STEPS))
    shocks = 0.3 * math.sqrt(1 - keep**2) * rng.standard_normal((STEPS, 64))
    noise = np.zeros((STEPS, 64))
    for i in range(1, STEPS):
        noise[i] = keep * noise[i - 1] + shocks[i]
    fraction = np.arange(1, STEPS + 1)[:, None] / STEPS
    path = 1 + np.sqrt(fraction) + noise
    net = Path(np.zeros(64))
    averages = [PowerEma(net, width) for width in STORED_WIDTHS]
    snapshots = []
    for i, value in enumerate(path, 1):
        net.set(value)
        for ema in averages:
            ema.update(i * BATCH, BATCH)
            if i % (STEPS // SNAPSHOTS) == 0:
                snapshots.append(Snapshot(i * BATCH, ema.sigma_rel, {"p": ema.average["p"].clone()}))
    brute = {}
    for width in (0.03, 0.04, 0.05, 0.06, 0.075, 0.10, 0.12, 0.15, 0.20):
        weights = np.diff(np.concatenate([[0.0], fraction[:, 0]]) ** (sigma_rel_to_gamma(width) + 1))
        brute[width] = weights @ path
    return snapshots, brute


def relative(a: torch.Tensor, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.numpy() - b) / np.linalg.norm(b))


def test_stored_widths_come_back(run: tuple[list[Snapshot], dict[float, np.ndarray]]) -> None:
    """Asked for a snapshot that is stored, the combination is that snapshot: at the end, by default, and at any other."""
    snapshots, brute = run
    for width in STORED_WIDTHS:
        last = next(s for s in reversed(snapshots) if s.sigma_rel == width)
        got = reconstruct(snapshots, width)["p"]
        torch.testing.assert_close(got, last.weights["p"], rtol=1e-10, atol=0)
        assert relative(got, brute[width]) < 1e-10
    middle = snapshots[SNAPSHOTS]
    assert middle.nimg < STEPS * BATCH
    got = reconstruct(snapshots, middle.sigma_rel, middle.nimg)["p"]
    torch.testing.assert_close(got, middle.weights["p"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("width", [0.03, 0.04, 0.06, 0.075, 0.12, 0.15, 0.20])
def test_other_widths_match_brute_force(run: tuple[list[Snapshot], dict[float, np.ndarray]], width: float) -> None:
    """Widths between and beyond the stored ones agree with averages that were kept at that width, to 1e-3.

    With 32 snapshots of both widths the range is 0.03 to 0.20 (4e-4 at 0.03, 2e-5 between the stored ones); 16 reach 0.04 to 0.15.
    """
    snapshots, brute = run
    assert relative(reconstruct(snapshots, width)["p"], brute[width]) < 1e-3
    nearest = min(STORED_WIDTHS, key=lambda stored: abs(stored - width))
    assert relative(torch.from_numpy(brute[nearest]), brute[width]) > 3e-3  # the nearest stored one does not
