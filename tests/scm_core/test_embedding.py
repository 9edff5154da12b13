# SPDX-License-Identifier: Apache-2.0
"""Embeddings of time: frequencies, noise inputs, derivatives, and what they refuse (§4.1, App. G)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core.engines import value_and_jvp
from scm_core.nn.dual import Dual
from scm_core.nn.embedding import FourierEmbedding, PositionalEmbedding, TimeEmbedding

F64 = torch.float64


def test_positional_embedding_frequencies() -> None:
    """ω_k = (1/10000)^{k/(K−1)} falls from 1 to 1e-4; the embedding is √2 (cos ω t, sin ω t) of exactly unit mean square."""
    embedding = PositionalEmbedding(16)
    t = torch.linspace(0, math.pi / 2, 7, dtype=F64)
    y = embedding(t)
    assert y.shape == (7, 16)
    for k in range(8):
        omega = 10000 ** (-k / 7)
        torch.testing.assert_close(y[:, k], math.sqrt(2) * torch.cos(omega * t), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y[:, 8 + k], math.sqrt(2) * torch.sin(omega * t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.square().mean(1), torch.ones(7, dtype=F64))
    assert embedding.frequencies[0] == 1
    assert float(embedding.frequencies[-1]) == pytest.approx(1e-4)
    assert not list(embedding.state_dict())  # nothing to store


def test_time_derivative_of_the_embedding_is_at_most_root_two() -> None:
    """|∂_t emb_k| ≤ √2 ω_k ≤ √2: the reason for these frequencies (§4.1)."""
    embedding = PositionalEmbedding(64)
    t = torch.linspace(0, math.pi / 2, 50, dtype=F64)
    _, derivative = torch.func.jvp(embedding, (t,), (torch.ones_like(t),))
    assert derivative.abs().max() <= math.sqrt(2)


@pytest.mark.parametrize("channels", [0, 2, 7])
def test_embedding_of_a_wrong_width_is_named(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels: expected an even number >= 4, got {channels}"):
        PositionalEmbedding(channels)


@pytest.mark.parametrize("scale", [0.02, 1.0, 16.0])
def test_fourier_embedding_draws_frequencies_and_phases(scale: float) -> None:
    """√2 cos(2π s f c + φ) with f ~ N(0, 1) and φ ~ U[0, 2π]: unit mean square at every c, the frequencies' spread is 2π s."""
    embedding = FourierEmbedding(20_000, scale)
    assert float(embedding.frequencies.std()) == pytest.approx(2 * math.pi * scale, rel=0.02)
    assert float(embedding.frequencies.mean()) == pytest.approx(0, abs=0.2 * scale)
    assert float(embedding.phases.mean()) == pytest.approx(math.pi, abs=0.05)
    c = torch.tensor([0.0, 0.3, 1.5], dtype=F64)
    y = embedding(c)
    torch.testing.assert_close(y.square().mean(1), torch.ones(3, dtype=F64), rtol=0, atol=0.03)
    for row, k in ((1, 0), (2, 77)):
        phase = float(embedding.frequencies[k]) * float(c[row]) + float(embedding.phases[k])
        assert float(y[row, k]) == pytest.approx(math.sqrt(2) * math.cos(phase), abs=1e-12)


def test_fourier_embedding_is_a_function_of_its_seed() -> None:
    """Model files have no buffers: the seed alone gives the frequencies, whatever the global generator and the device."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = FourierEmbedding(8, 1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.device("meta"):
        second = FourierEmbedding(8, 1.0, seed=3)
    assert torch.equal(first.frequencies, second.frequencies)
    assert torch.equal(first.phases, second.phases)
    assert not torch.equal(first.frequencies, FourierEmbedding(8, 1.0, seed=4).frequencies)
    assert not list(first.state_dict())


def test_given_waves() -> None:
    """√2 cos(ω c + φ) of the frequencies and phases that are given, in radians."""
    frequencies, phases = [3.0, -50.0, 0.25], [0.0, 1.0, 6.0]
    c = torch.tensor([-1.0, 0.4])
    y = FourierEmbedding(3, 1.0, waves=[frequencies, phases])(c)
    for i, row in enumerate(c.tolist()):
        for j in range(3):
            assert y[i, j].item() == pytest.approx(math.sqrt(2) * math.cos(frequencies[j] * row + phases[j]), abs=1e-6)


def test_fourier_phases_of_hundreds_of_radians_are_exact_in_float32() -> None:
    """Scale 16 in float32 agrees with float64 to rounding of the result, value and derivative."""
    embedding = FourierEmbedding(64, 16.0)
    c = torch.linspace(0, 1.5, 40)
    F, dF = embedding(Dual(c, torch.ones_like(c)))
    exact, dexact = embedding(Dual(c.double(), torch.ones_like(c, dtype=F64)))
    assert (F.dtype, dF.dtype) == (torch.float32, torch.float32)
    assert (F - exact).abs().max() < 2e-7
    assert (dF - dexact).abs().max() < 2e-7 * dexact.abs().max()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"c_noise": "edm"},
    {"embedding": "fourier", "fourier_scale": 0.02},
    {"embedding": "fourier", "fourier_scale": 16.0, "c_noise": "edm"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tangent_of_the_time_embedding(options: dict[str, Any]) -> None:
    """dual = func = central differences with Richardson's extrapolation, from t = 1e-3 to arctan(160)."""

    class OfTime(TimeEmbedding):
        supports_dual = True

        def forward(self, x: Any, t: Any) -> Any:
            return super().forward(t)

    net = OfTime(16, **options)
    t = torch.tensor([1e-3, 0.1, 0.8, 1.5, math.atan(160)], dtype=F64)
    x, dt = t[:, None], torch.cos(t) * torch.sin(t)
    F, dF = value_and_jvp(net, x, t, x, dt, "dual")
    expected, jvp = value_and_jvp(net, x, t, x, dt, "func")
    torch.testing.assert_close(F, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dF, jvp, rtol=1e-11, atol=1e-12)
    k = 1 if options.get("fourier_scale") == 16.0 else 50
    near, far = (value_and_jvp(net, x, t, x, k * m * dt, "finite_difference")[1] / (k * m) for m in (1, 2))
    torch.testing.assert_close(dF, (4 * near - far) / 3, rtol=1e-8, atol=1e-8)
    assert (dF.abs().amax(dim=1) > 1e-4).all()


def test_noise_inputs() -> None:
    """c_noise(t) = t, or EDM's ¼ ln σ with σ = σ_d tan t."""
    t = torch.tensor([0.01, 0.7, math.atan(160)], dtype=F64)
    plain = PositionalEmbedding(8)
    assert torch.equal(TimeEmbedding(8)(t), plain(t))
    c = torch.log(0.3 * torch.tan(t)) / 4
    torch.testing.assert_close(TimeEmbedding(8, c_noise="edm", sigma_data=0.3)(t), plain(c), rtol=1e-13, atol=1e-13)


def test_a_larger_fourier_scale_makes_the_time_derivative_larger() -> None:
    """What the paper changes (§4.1): ∂_t grows with the scale, and EDM's c_noise makes it grow without bound at the ends."""

    def size(t: float, **options: Any) -> float:
        at = torch.tensor([t], dtype=F64)
        return float(
            torch.func.jvp(TimeEmbedding(256, **options), (at,), (torch.ones_like(at),))[1].square().mean().sqrt()
        )

    positional, small, large = (
        size(0.8),
        size(0.8, embedding="fourier", fourier_scale=0.02),
        size(0.8, embedding="fourier", fourier_scale=16.0),
    )
    assert large > 50 * positional
    assert small == pytest.approx(2 * math.pi * 0.02, rel=0.2)
    assert size(1e-3, c_noise="edm") > 100 * size(0.8, c_noise="edm")
    assert size(1e-3) < 2 * positional


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"embedding": "sine"}, "embedding: expected 'positional' or 'fourier', got 'sine'"),
        ({"c_noise": "sigma"}, "c_noise: expected 't' or 'edm', got 'sigma'"),
        ({"embedding": "fourier", "fourier_scale": 0.0}, "scale: expected a positive number, got 0.0"),
        ({"sigma_data": -1.0}, "sigma_data: expected a positive number, got -1.0"),
        ({"channels": 7}, "channels: expected an even number >= 4, got 7"),
        ({"channels": 0, "embedding": "fourier"}, "channels: expected a positive number, got 0"),
        ({"waves": [[1.0] * 8] * 2}, "waves: expected None for embedding 'positional', got some"),
        ({"waves": [[1.0] * 8, [1.0] * 7], "embedding": "fourier"}, "waves: expected 8 frequencies and as many phases"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TimeEmbedding(**{"channels": 8, **arguments})


def test_time_keeps_its_format() -> None:
    """float32 in, float32 out, also through the float64 phases."""
    t = torch.rand(3)
    for options in OPTIONS:
        y: Tensor = TimeEmbedding(8, **options)(t)
        assert y.dtype == torch.float32
