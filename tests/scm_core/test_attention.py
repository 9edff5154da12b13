# SPDX-License-Identifier: Apache-2.0
"""Attention on (value, tangent) pairs, against torch.func.jvp of the written-out formula in float64."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core.engines import value_and_jvp
from scm_core.nn import attention as module
from scm_core.nn.attention import attention
from scm_core.nn.dual import Dual

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def inputs(b: int, heads: int, length: int, keys: int, d: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and their tangents, float64."""
    shapes = [(b, heads, length, d), (b, heads, keys, d), (b, heads, keys, d)]
    return [normal(*s, seed=i) for i, s in enumerate(shapes)], [normal(*s, seed=10 + i) for i, s in enumerate(shapes)]


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v with the whole matrix; 0 for queries without a key."""
    x = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is None:
        return x.softmax(dim=-1) @ v
    keep = mask[:, None, None, :]
    e = torch.exp(x - x.detach().amax(dim=-1, keepdim=True)) * keep
    total = e.sum(dim=-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total) @ v


def expected(values: list[Tensor], tangents: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(lambda *x: formula(*x, mask), tuple(values), tuple(tangents))


def pairs(values: list[Tensor], tangents: list[Tensor], dtype: torch.dtype = F64) -> list[Dual]:
    return [Dual(v.to(dtype), t.to(dtype)) for v, t in zip(values, tangents, strict=True)]


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest error in units of the largest entry."""
    return ((found.to(F64) - wanted).abs().max() / wanted.abs().max()).item()


LENGTHS = [
    # B, heads, L, L_k, d
    (2, 3, 1, 1, 4),
    (2, 3, 2, 2, 5),
    (1, 2, 3, 3, 1),
    (2, 2, 17, 17, 7),
    (2, 2, 64, 64, 16),
    (2, 1, 100, 100, 40),
    (1, 2, 257, 257, 9),
    (1, 1, 1024, 1024, 8),
    (1, 1, 4096, 4096, 4),
    (2, 2, 1, 300, 8),
    (2, 2, 300, 1, 8),
    (1, 2, 70, 513, 8),
]


@pytest.mark.parametrize("shape", LENGTHS, ids=str)
def test_output_and_tangent_equal_the_formula(shape: tuple[int, int, int, int, int]) -> None:
    values, tangents = inputs(*shape)
    wanted = expected(values, tangents)
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 1e-5)):
        found = attention(*pairs(values, tangents, dtype), backend="chunked")
        assert relative(found.value, wanted[0]) <= tolerance
        if wanted[1].abs().max() > 0:
            assert relative(found.tangent, wanted[1]) <= tolerance
        else:
            assert found.tangent.abs().max() == 0  # one query feature and one key: p = 1 whatever moves
        assert found.tangent.dtype == dtype


@pytest.mark.parametrize(("block", "tile"), [(1, 1), (4, 64), (7, 200), (16, 10**6)])
def test_the_result_does_not_depend_on_the_tiles(block: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, tangents = inputs(2, 3, 13, 18, 5)
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[0, :9], mask[1, 11:] = False, False
    wanted = expected(values, tangents, mask)[1]
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "TILE", tile)
    assert relative(attention(*pairs(values, tangents), mask, "chunked").tangent, wanted) <= 1e-12


@pytest.mark.parametrize("moving", [m for m in itertools.product([True, False], repeat=3) if any(m)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_plain_tensors_beside_pairs_are_constants(moving: tuple[bool, bool, bool], masked: bool) -> None:
    values, tangents = inputs(2, 2, 5, 300, 6)
    mask = normal(2, 300, seed=30) > 0 if masked else None
    kept = [t if m else torch.zeros_like(t) for t, m in zip(tangents, moving, strict=True)]
    arguments = [Dual(x, t) if m else x for x, t, m in zip(values, tangents, moving, strict=True)]
    found = attention(*arguments, mask)
    wanted = expected(values, kept, mask)
    assert relative(found.value, wanted[0]) <= 1e-12
    assert relative(found.tangent, wanted[1]) <= 1e-12


def test_without_pairs_it_is_plain_attention() -> None:
    values, _ = inputs(2, 2, 9, 11, 6)
    mask = normal(2, 11, seed=31) > 0
    for m in (None, mask):
        found = attention(*values, m)
        assert isinstance(found, Tensor)
        assert relative(found, formula(*values, m)) <= 1e-12


def test_the_forward_mode_of_torch_gives_the_same() -> None:
    """Under torch.func.jvp (the engine `func`) plain attention agrees with the pairs' tangent."""
    w = [normal(4, 4, seed=40 + i) for i in range(3)]
    mask = normal(2, 12, seed=44) > -0.5

    def net(x: Tensor, t: Tensor) -> Tensor:
        q, k, v = (x @ m * (1 + t[:, None, None, None]) for m in w)
        return attention(q, k, v, mask)

    x, dx, t, dt = normal(2, 3, 12, 4, seed=50), normal(2, 3, 12, 4, seed=51), normal(2, seed=52), normal(2, seed=53)
    F, dF = value_and_jvp(net, x, t, dx, dt, engine="func")
    stretch, d_stretch = 1 + t[:, None, None, None], dt[:, None, None, None]
    found = attention(*(Dual(x @ m * stretch, dx @ m * stretch + x @ m * d_stretch) for m in w), mask)
    assert relative(found.value, F) <= 1e-12
    assert relative(found.tangent, dF) <= 1e-12


def test_the_value_has_the_gradients_of_the_formula_and_the_tangent_has_none() -> None:
    values, tangents = inputs(2, 2, 9, 300, 6)
    mask = normal(2, 300, seed=32) > 0
    upstream = normal(2, 2, 9, 6, seed=33)
    leaves = [[x.clone().requires_grad_() for x in values] for _ in range(2)]
    found = attention(*(Dual(x, t.clone().requires_grad_()) for x, t in zip(leaves[0], tangents, strict=True)), mask)
    assert not found.tangent.requires_grad
    ours = torch.autograd.grad((found.value * upstream).sum(), leaves[0])
    theirs = torch.autograd.grad((formula(*leaves[1], mask) * upstream).sum(), leaves[1])
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) <= 1e-12


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_padding_is_as_if_it_were_not_there(dtype: torch.dtype) -> None:
    """With padding on either side, whatever it holds, the result is that of the shorter sequence."""
    values, tangents = inputs(1, 2, 6, 700, 5)
    for start, stop in ((0, 400), (300, 700), (290, 291)):
        mask = torch.zeros(1, 700, dtype=torch.bool)
        mask[:, start:stop] = True
        short = [values[0], values[1][:, :, start:stop], values[2][:, :, start:stop]]
        short_tangents = [tangents[0], tangents[1][:, :, start:stop], tangents[2][:, :, start:stop]]
        padded, padded_tangents = [x.clone() for x in values], [x.clone() for x in tangents]
        for x in (*padded[1:], *padded_tangents[1:]):
            x[:, :, :start], x[:, :, stop:] = 1e4, -1e4
        found, wanted = attention(*pairs(padded, padded_tangents, dtype), mask), expected(short, short_tangents)
        assert relative(found.value, wanted[0]) <= 10 * torch.finfo(dtype).eps
        assert relative(found.tangent, wanted[1]) <= 100 * torch.finfo(dtype).eps


def test_a_query_without_any_key_gives_zero_and_no_gradient() -> None:
    values, tangents = inputs(2, 2, 4, 300, 5)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1] = False
    leaves = [x.requires_grad_() for x in values]
    for arguments in ([Dual(x, t) for x, t in zip(leaves, tangents, strict=True)], leaves):
        found = attention(*arguments, mask)
        value = found.value if isinstance(found, Dual) else found
        assert value[1].abs().max() == 0
        for grad in torch.autograd.grad(value.square().sum(), leaves):
            assert grad.isfinite().all()
            assert grad[1].abs().max() == 0
            assert grad[0].abs().max() > 0
        if isinstance(found, Dual):
            assert found.tangent[1].abs().max() == 0
            assert found.tangent[0].abs().max() > 0


def test_the_tangent_is_linear_in_its_inputs() -> None:
    values, first = inputs(2, 2, 20, 300, 5)
    second = [normal(*t.shape, seed=60 + i) for i, t in enumerate(first)]
    both = [2.5 * a - 0.3 * b for a, b in zip(first, second, strict=True)]
    one, two, sum_ = (attention(*pairs(values, t)).tangent for t in (first, second, both))
    assert relative(sum_, 2.5 * one - 0.3 * two) <= 1e-12


def test_large_scores_do_not_overflow() -> None:
    """Scores near ±1e4, where e^x overflows even in float64, in increasing order over the blocks of keys and in decreasing order."""
    values, tangents = inputs(1, 1, 8, 600, 4)
    ramp = torch.linspace(-1, 1, 600, dtype=F64)[None, None, :, None]
    for sign in (1, -1):
        steep = [200 * values[0].abs(), 50 * (values[1] * 0.01 + sign * ramp), values[2]]
        found, wanted = attention(*pairs(steep, tangents)), expected(steep, tangents)
        assert (steep[0] @ steep[1].mT).abs().max() > 1e4
        assert relative(found.value, wanted[0]) <= 1e-12
        assert relative(found.tangent, wanted[1]) <= 1e-11


def test_what_all_keys_share_costs_no_accuracy() -> None:
    """A score tangent of 1e6 that is common to all keys changes nothing in ẏ, and only by its own rounding in float32."""
    values, tangents = inputs(1, 2, 50, 600, 8)
    values[1] += 100.0
    tangents[0] *= 1e4
    values, tangents = ([x.float().to(F64) for x in group] for group in (values, tangents))
    found, wanted = attention(*pairs(values, tangents, torch.float32)), expected(values, tangents)
    dx = tangents[0] @ values[1].mT / math.sqrt(8)
    rounding = torch.finfo(torch.float32).eps * dx.abs().max() * values[2].abs().max()
    assert dx.abs().max() > 1e6
    assert (found.tangent - wanted[1]).abs().max() <= 4 * rounding


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_large_tangents_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Score tangents of 1e5 to 1e6 overflow float16; the tangent itself does not."""
    values, tangents = inputs(1, 2, 40, 300, 16)
    tangents = [2e4 * t / t.abs().max() for t in tangents]
    values = [x / 4 for x in values]
    values, tangents = ([x.to(dtype).to(F64) for x in group] for group in (values, tangents))
    found, wanted = attention(*pairs(values, tangents, dtype)), expected(values, tangents)
    assert found.tangent.dtype == dtype
    assert found.tangent.isfinite().all()
    assert relative(found.tangent, wanted[1]) <= tolerance


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD = [
    ((ones(2, 3, 4), ones(2, 3, 4), ones(2, 3, 4)), r"q: expected shape \(B, heads, L, d\), got \(2, 3, 4\)"),
    (
        (ones(2, 1, 3, 4), ones(1, 1, 3, 4), ones(1, 1, 3, 4)),
        r"k: expected shape \(2, 1, L_k, 4\).* got \(1, 1, 3, 4\)",
    ),
    ((ones(2, 1, 3, 4), ones(2, 1, 3, 4), ones(2, 1, 5, 4)), r"v: expected shape .* got \(2, 1, 5, 4\)"),
    ((ones(2, 1, 3, 4), ones(2, 1, 3, 4), ones(2, 1, 3, 5)), r"v: expected shape .* got \(2, 1, 3, 5\)"),
    (
        (ones(2, 1, 3, 4), ones(2, 1, 3, 4, dtype=F64), ones(2, 1, 3, 4)),
        r"k: expected torch.float32 on cpu like q, got torch.float64",
    ),
    ((*[ones(2, 1, 3, 4)] * 3, ones(2, 3)), r"key_mask: expected bool of shape \(2, 3\), got torch.float32"),
    ((*[ones(2, 1, 3, 4)] * 3, ones(2, 4) > 0), r"key_mask: expected bool .* got torch.bool of \(2, 4\)"),
    ((*[ones(2, 1, 0, 4)] * 3,), r"q: expected at least one position and one feature, got \(2, 1, 0, 4\)"),
    ((*[ones(2, 1, 3, 0)] * 3,), r"q: expected at least one position and one feature, got \(2, 1, 3, 0\)"),
    ((ones(2, 1, 3, 4), *[ones(2, 1, 0, 4)] * 2), r"k: expected at least one position, got \(2, 1, 0, 4\)"),
    ((*[ones(2, 1, 3, 4)] * 3, None, "flash"), r"backend: expected 'auto', 'chunked' or 'triton', got 'flash'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_what_does_not_match_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*arguments)


@pytest.mark.parametrize("backend", ["auto", "chunked", "triton"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("tangent", "words"),
    [
        (ones(1, 1, 3, 4), r"expected the shape \(2, 1, 3, 4\) of its value, got \(1, 1, 3, 4\)"),
        (ones(2, 1, 2, 4), r"expected the shape \(2, 1, 3, 4\) of its value, got \(2, 1, 2, 4\)"),
        (ones(2, 1, 3, 4).to("meta"), "expected the device cpu of its value, got meta"),
        (ones(2, 1, 3, 4, dtype=F64), "expected the type torch.float32 of its value, got torch.float64"),
    ],
    ids=["batch", "length", "device", "dtype"],
)
def test_a_tangent_unlike_its_value_is_refused(tangent: Tensor, words: str, name: str, backend: Any) -> None:
    """A kernel would read past the end of it."""
    value = ones(2, 1, 3, 4)
    arguments = [Dual(value, tangent if which == name else value) for which in "qkv"]
    with pytest.raises(ValueError, match=f"tangent of {name}: {words}"):
        attention(*arguments, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "d", "fits"),
    [(torch.float16, 256, True), (torch.bfloat16, 64, True), (torch.float16, 257, False), (torch.float32, 64, False)],
)
def test_auto_is_triton_for_half_precision_on_a_gpu(
    dtype: torch.dtype, d: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRITON", True)
    on_gpu = SimpleNamespace(dtype=dtype, shape=(1, 1, 2, d), is_cuda=True)
    assert module._triton_fits(on_gpu) is fits  # type: ignore[arg-type]
    assert not module._triton_fits(torch.ones(1, 1, 2, d, dtype=dtype))


def test_triton_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRITON", False)
    with pytest.raises(ValueError, match="'triton' needs the package triton"):
        attention(*pairs(*inputs(1, 1, 2, 2, 2)), backend="triton")


def test_the_library_loads_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"  # any import of it now fails
        "import torch, scm_core.nn.attention as a; from scm_core.nn.dual import Dual\n"
        "x = torch.ones(1, 1, 2, 2); print(a.attention(Dual(x, x), x, x).tangent.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2, 2" in done.stdout


def test_memory_grows_linearly_in_the_length() -> None:
    """Peak memory of one pair through `chunked` at 1k … 8k positions; the whole matrix at 4k shows that the measure sees it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import bench_attention  # what the published table is made with
    finally:
        sys.path.pop(0)
    ours = bench_attention.peak_memory("chunked", (1024, 2048, 4096, 8192), d=16)
    matrix = bench_attention.peak_memory("matrix", (1024, 4096), d=16)
    tensors = {length: 4 * 16 * length * 8 / 2**20 for length in ours}  # q, k, v, y and their tangents, MB
    assert matrix[4096] - matrix[1024] > 0.9 * 4 * (4096**2 - 1024**2) / 2**20, json.dumps(matrix)
    assert ours[8192] - ours[1024] < 2 * (tensors[8192] - tensors[1024]) + 16, json.dumps(ours)
    assert ours[8192] < 64, json.dumps(ours)
