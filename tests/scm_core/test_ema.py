# SPDX-License-Identifier: Apache-2.0
"""Averages of weights: their factors, their state, and snapshots in files. (Closed forms and reconstruction: tests/theory/test_ema.py.)"""

import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scm_core import ema as module
from scm_core.ema import (
    Average,
    HalfLifeEma,
    PowerEma,
    Snapshot,
    combine,
    half_life_beta,
    load_snapshots,
    power_beta,
    reconstruct,
    save_snapshot,
    sigma_rel_to_gamma,
)


class Scalar(nn.Module):
    """One parameter in double precision."""

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


def test_half_life_halves() -> None:
    """Without ramp-up, 2^{−Δn/H}: after H images in any number of steps half of the old average is left."""
    assert half_life_beta(10_000, 500, 500, None) == pytest.approx(0.5)
    net = Scalar(1.0)
    ema = HalfLifeEma(net, half_life=500, rampup=None)
    net.set(0.0)
    for seen in range(20, 501, 20):
        ema.update(10_000 + seen, 20)
    assert float(ema.average["p"]) == pytest.approx(0.5, rel=1e-12)


def test_ramp_up_of_the_half_life() -> None:
    """H(n) = min(H, ratio · images before the step): the first step replaces the initial weights, later ones reach H and stay there."""
    assert half_life_beta(64, 64, 500_000, 0.05) == 0
    assert half_life_beta(1100, 100, 500_000, 0.05) == pytest.approx(0.5**2)  # H(n) = 0.05 · 1000
    assert half_life_beta(20_000_000, 512, 500_000, 0.05) == half_life_beta(20_000_000, 512, 500_000, None)
    net = Scalar(3.0)
    ema = HalfLifeEma(net, half_life=500_000)
    net.set(5.0)
    ema.update(64, 64)
    assert float(ema.average["p"]) == 5


@pytest.mark.parametrize(("half_life", "rampup", "name"), [(0, None, "half_life"), (5.0, -1.0, "rampup")])
def test_impossible_half_lives_are_named(half_life: float, rampup: float | None, name: str) -> None:
    """Half-life and ramp-up ratio must be positive."""
    with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
        HalfLifeEma(Scalar(), half_life, rampup)


KINDS: dict[str, Callable[[nn.Module], Average]] = {
    "power": lambda net: PowerEma(net, 0.05),
    "half-life": lambda net: HalfLifeEma(net, 100),
}


@pytest.mark.parametrize("kind", KINDS)
def test_average_is_separate_from_the_network_and_can_be_stored(kind: str) -> None:
    """The average neither shares memory with the weights nor gets gradients; `load` takes `state` over."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    ema = KINDS[kind](net)
    before = {name: value.clone() for name, value in ema.state().items()}
    assert before.keys() == dict(net.named_parameters()).keys()
    with torch.no_grad():
        net.weight.add_(1)
    assert all(torch.equal(ema.state()[name], value) for name, value in before.items())
    ema.update(100, 10)
    assert not torch.equal(ema.state()["weight"], before["weight"])
    assert not any(value.requires_grad for value in ema.state().values())
    other = KINDS[kind](nn.Linear(3, 2))
    other.load(ema.state())
    assert all(torch.equal(other.state()[name], value) for name, value in ema.state().items())
    other.state()["weight"].zero_()
    assert ema.state()["weight"].any()


# --- snapshots -----------------------------------------------------------------------------------------------------------------------


def snapshots() -> list[Snapshot]:
    """Averages of two widths at three times, of two parameters of different types."""
    generator = torch.Generator().manual_seed(0)
    return [
        Snapshot(
            nimg,
            width,
            {
                "a": torch.randn(2, 3, generator=generator),
                "b.c": torch.randn(4, generator=generator, dtype=torch.float64),
            },
        )
        for nimg in (1000, 2000, 3000)
        for width in (0.05, 0.10)
    ]


def test_reconstruction_is_the_linear_combination() -> None:
    """Parameter by parameter Σ c_i θ̂_i with the coefficients of `combine`, in the types of the snapshots."""
    stored = snapshots()
    coefficients = combine([(s.nimg, s.sigma_rel) for s in stored], 2500, 0.07).coefficients
    got = reconstruct(stored, 0.07, 2500)
    assert got.keys() == {"a", "b.c"}
    for name, value in got.items():
        expected = sum(c * s.weights[name].double() for c, s in zip(coefficients, stored, strict=True))
        assert value.dtype == stored[0].weights[name].dtype
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_order_of_the_snapshots_does_not_matter() -> None:
    """Coefficients belong to their snapshots."""
    stored = snapshots()
    forward, backward = reconstruct(stored, 0.07), reconstruct(stored[::-1], 0.07)
    torch.testing.assert_close(forward["b.c"], backward["b.c"], rtol=1e-9, atol=1e-9)


def test_dependent_snapshots_do_not_blow_up() -> None:
    """Widths that differ by 1e-9 make the system singular to float64; the coefficients stay moderate and the fit stays as good."""
    near = [(n, w) for n in (1000, 2000, 3000) for w in (0.05, 0.05 + 1e-9, 0.10)]
    apart = [(n, w) for n in (1000, 2000, 3000) for w in (0.05, 0.10)]
    got, expected = combine(near, 3000, 0.07), combine(apart, 3000, 0.07)
    assert max(map(abs, got.coefficients)) <= max(map(abs, expected.coefficients)) * (1 + 1e-6)
    assert got.error == pytest.approx(expected.error, rel=1e-5)


def test_snapshots_in_files_give_the_same_bits(tmp_path: Path) -> None:
    """Written in any order under any name, found by nimg and width, and read one at a time."""
    stored = snapshots()
    for i, s in enumerate(reversed(stored)):
        save_snapshot(tmp_path / f"{i}.safetensors", s.nimg, s.sigma_rel, s.weights)
    found = load_snapshots(tmp_path)
    assert [(s.nimg, s.sigma_rel) for s in found] == [(s.nimg, s.sigma_rel) for s in stored]
    got, expected = reconstruct(found, 0.07), reconstruct(stored, 0.07)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_weights_in_files_are_read_when_needed_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_snapshots` reads headers alone; `reconstruct` holds the weights of one file at a time."""
    for i, s in enumerate(snapshots()):
        save_snapshot(tmp_path / f"{i}.safetensors", s.nimg, s.sigma_rel, s.weights)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    load = module.load_described

    def watched(path: Path, kind: str):  # type: ignore[no-untyped-def]
        nonlocal most
        result = load(path, kind)
        alive.append(weakref.ref(result.tensors["a"]))
        most = max(most, sum(ref() is not None for ref in alive))
        return result

    monkeypatch.setattr(module, "load_described", watched)
    found = load_snapshots(tmp_path)
    assert not alive
    reconstruct(found, 0.07)
    assert len(alive) == 6
    assert most == 1


def with_weights(index: int, **weights: torch.Tensor) -> list[Snapshot]:
    changed = snapshots()
    changed[index] = changed[index]._replace(weights=weights)
    return changed


@pytest.mark.parametrize(
    ("stored", "sigma_rel", "nimg", "message"),
    [
        ([], 0.07, None, "snapshots: expected at least one, got none"),
        (snapshots(), 0.3, None, "sigma_rel: expected a relative width in (0, 0.28), got 0.3"),
        (snapshots(), 0.07, 3001, "nimg: expected 1 to 3000, the last snapshot's, got 3001"),
        (snapshots(), 0.07, 0, "nimg: expected 1 to 3000, the last snapshot's, got 0"),
        (
            [*snapshots(), snapshots()[2]],
            0.07,
            None,
            "snapshots: expected one for each nimg and sigma_rel, got several at nimg 2000, sigma_rel 0.05",
        ),
        ([Snapshot(0, 0.05, {})], 0.07, None, "snapshots: expected nimg >= 1, got 0 (sigma_rel 0.05)"),
        (
            with_weights(3, a=torch.zeros(2, 3)),
            0.07,
            None,
            "snapshots: nimg 2000, sigma_rel 0.1: parameter 'b.c' is not in all snapshots; expected those of one network",
        ),
        (
            with_weights(3, **{"a": torch.zeros(2, 4), "b.c": torch.zeros(4)}),
            0.07,
            None,
            "snapshots: nimg 2000, sigma_rel 0.1: parameter 'a': expected the shape (2, 3) of the first snapshot, got (2, 4)",
        ),
    ],
)
def test_impossible_reconstructions_are_named(
    stored: list[Snapshot], sigma_rel: float, nimg: int | None, message: str
) -> None:
    """No snapshots, two of the same, of different networks, and targets that they say nothing of."""
    with pytest.raises(ValueError, match=re.escape(message)):
        reconstruct(stored, sigma_rel, nimg)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    """An empty folder, a file of something else, and a truncated one."""
    with pytest.raises(ValueError, match=r"expected snapshots \(\*\.safetensors\), got none"):
        load_snapshots(tmp_path)
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match=r"other\.safetensors: expected a file of format scm-snapshot-1, got None"):
        load_snapshots(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"other\.safetensors: truncated or not a safetensors file"):
        load_snapshots(tmp_path)
