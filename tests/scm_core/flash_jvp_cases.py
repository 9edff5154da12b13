# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the written-out formula in float64; test_flash_jvp.py runs this file in a process of its own."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from scm_core.nn.attention import MAX_HEAD_DIM, attention
from scm_core.nn.dual import Dual

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# errors in units of the largest entry: a few roundings of the dtype
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def inputs(b: int, heads: int, length: int, keys: int, d: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and their tangents: numbers that `dtype` holds exactly, as float64."""
    shapes = [(b, heads, length, d), (b, heads, keys, d), (b, heads, keys, d)]
    return tuple([normal(*s, seed=at + i).to(dtype).to(F64) for i, s in enumerate(shapes)] for at in (0, 10))


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v with the whole matrix; 0 for queries without a key."""
    x = q @ k.mT / math.sqrt(q.shape[-1])
    keep = torch.ones_like(x) if mask is None else mask[:, None, None, :]
    e = torch.exp(x - x.detach().amax(dim=-1, keepdim=True)) * keep
    total = e.sum(dim=-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total) @ v


def expected(values: list[Tensor], tangents: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(lambda *x: formula(*x, mask), tuple(values), tuple(tangents))


def triton(values: list[Tensor], tangents: list[Tensor], dtype: torch.dtype, mask: Tensor | None = None) -> Dual:
    moving = [Dual(v.to(DEVICE, dtype), t.to(DEVICE, dtype)) for v, t in zip(values, tangents, strict=True)]
    return attention(*moving, None if mask is None else mask.to(DEVICE), "triton")


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest error in units of the largest entry."""
    return ((found.cpu().to(F64) - wanted).abs().max() / wanted.abs().max()).item()


SHAPES = [
    # B, heads, L, L_k, d
    (2, 1, 1, 1, 16),
    (1, 2, 2, 2, 5),
    (1, 2, 3, 17, 1),
    (1, 1, 64, 64, 64),
    (1, 1, 70, 50, 40),
    (1, 1, 5, 133, 24),
    (1, 1, 133, 3, 8),
    (1, 1, 20, 20, 100),
    (1, 1, 33, 40, 200),
]


@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, t) for s in SHAPES for t in TOLERANCE if s[-1] <= MAX_HEAD_DIM[t]], ids=str
)
def test_output_and_tangent_equal_the_formula(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    values, tangents = inputs(*shape, dtype)
    found, wanted = triton(values, tangents, dtype), expected(values, tangents)
    assert (found.value.dtype, found.tangent.dtype) == (dtype, dtype)
    assert relative(found.value, wanted[0]) <= TOLERANCE[dtype]
    assert relative(found.tangent, wanted[1]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("moving", [m for m in itertools.product([True, False], repeat=3) if any(m)], ids=str)
def test_plain_tensors_beside_pairs_are_constants(moving: tuple[bool, bool, bool]) -> None:
    values, tangents = inputs(2, 2, 10, 20, 16, torch.float32)
    mask = normal(2, 20, seed=30) > 0
    kept = [t if m else torch.zeros_like(t) for t, m in zip(tangents, moving, strict=True)]
    arguments = [
        Dual(x.float().to(DEVICE), t.float().to(DEVICE)) if m else x.float().to(DEVICE)
        for x, t, m in zip(values, tangents, moving, strict=True)
    ]
    found, wanted = attention(*arguments, mask.to(DEVICE), "triton"), expected(values, kept, mask)
    assert relative(found.value, wanted[0]) <= 5e-6
    assert relative(found.tangent, wanted[1]) <= 5e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_value_has_the_gradients_of_the_formula_and_the_tangent_has_none(dtype: torch.dtype) -> None:
    heads, length = (2, 20) if dtype == torch.float32 else (1, 70)  # more than one tile
    values, tangents = inputs(2, heads, length, 43, 20, dtype)
    mask = normal(2, 43, seed=32) > 0
    mask[1, :35] = False
    upstream = normal(2, heads, length, 20, seed=33).to(dtype).to(F64)
    ours = [x.to(DEVICE, dtype).requires_grad_() for x in values]
    theirs = [x.clone().requires_grad_() for x in values]
    pairs = [Dual(x, t.to(DEVICE, dtype).requires_grad_()) for x, t in zip(ours, tangents, strict=True)]
    found = attention(*pairs, mask.to(DEVICE), "triton")
    assert not found.tangent.requires_grad
    found = torch.autograd.grad((found.value * upstream.to(DEVICE, dtype)).sum(), ours)
    wanted = torch.autograd.grad((formula(*theirs, mask) * upstream).sum(), theirs)
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= TOLERANCE[dtype]


def test_what_is_masked_has_no_influence_and_no_key_gives_zero() -> None:
    values, tangents = inputs(3, 1, 10, 50, 16, torch.float32)
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[0, :37], mask[1, 20:], mask[2] = False, False, False
    wanted = expected(values, tangents, mask)
    for x in (*values[1:], *tangents[1:]):
        x.masked_fill_(~mask[:, None, :, None], 1e4)
    leaves = [x.float().to(DEVICE).requires_grad_() for x in values]
    found = attention(
        *(Dual(x, t.float().to(DEVICE)) for x, t in zip(leaves, tangents, strict=True)), mask.to(DEVICE), "triton"
    )
    assert relative(found.value, wanted[0]) <= 5e-6
    assert relative(found.tangent, wanted[1]) <= 5e-6
    assert found.value[2].abs().max() == 0
    assert found.tangent[2].abs().max() == 0
    for grad in torch.autograd.grad(found.value.square().sum(), leaves):
        assert grad.isfinite().all()
        assert grad[2].abs().max() == 0
    masked_keys = torch.autograd.grad(
        attention(*(Dual(x, x.detach()) for x in leaves), mask.to(DEVICE), "triton").value.sum(), leaves[1:]
    )
    for grad in masked_keys:
        assert grad[~mask[:, None, :, None].expand_as(grad)].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peak", [1.0, 1e4, 6e4])
def test_large_tangents_in_half_precision(dtype: torch.dtype, peak: float) -> None:
    """p ⊙ ẋ of up to 1e5 overflows float16; the tangent itself does not, and is as accurate as for small tangents."""
    values, tangents = inputs(1, 2, 40, 150, 16, dtype)
    tangents = [(peak * t / t.abs().max()).to(dtype).to(F64) for t in tangents]
    values = [x.to(dtype).to(F64) for x in (2 * values[0], 2 * values[1], values[2] / 8)]
    x, dx = values[0] @ values[1].mT / 4, (tangents[0] @ values[1].mT + values[0] @ tangents[1].mT) / 4
    found, wanted = triton(values, tangents, dtype), expected(values, tangents)
    assert peak < 5e4 or (torch.exp(x - x.amax(-1, keepdim=True)) * dx).abs().max() > 65504
    assert wanted[1].abs().max() < 65504
    assert found.tangent.isfinite().all()
    assert relative(found.tangent, wanted[1]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_all_keys_share_costs_no_accuracy(dtype: torch.dtype) -> None:
    """A component common to all keys adds the same number, here about 300 times larger than the rest, to each query's score tangents."""
    values, tangents = inputs(1, 2, 40, 150, 16, dtype)
    tangents[1] += 256 * torch.sign(normal(16, seed=70))
    values, tangents = ([x.to(dtype).to(F64) for x in group] for group in (values, tangents))
    found, wanted = triton(values, tangents, dtype), expected(values, tangents)
    assert relative(found.tangent, wanted[1]) <= TOLERANCE[dtype]


def test_large_scores_do_not_overflow() -> None:
    values, tangents = inputs(1, 1, 8, 150, 16, torch.float32)
    ramp = torch.linspace(-1, 1, 150, dtype=F64)[None, None, :, None]
    for sign in (1, -1):
        steep = [(100 * values[0].abs()).float(), (25 * (values[1] * 0.01 + sign * ramp)).float(), values[2].float()]
        steep = [x.to(F64) for x in steep]
        assert (steep[0] @ steep[1].mT).abs().max() > 1e4
        found, wanted = triton(steep, tangents, torch.float32), expected(steep, tangents)
        # scores of 1e4 are themselves rounded to 1e-3 in float32
        assert relative(found.value, wanted[0]) <= 1e-2
        assert relative(found.tangent, wanted[1]) <= 1e-2


def test_inputs_need_not_be_contiguous() -> None:
    values, tangents = inputs(1, 3, 18, 18, 16, torch.float32)
    wanted = expected(values, tangents)
    apart = [[x.transpose(1, 2).contiguous().transpose(1, 2) for x in group] for group in (values, tangents)]
    found = triton(*apart, torch.float32)
    assert relative(found.value, wanted[0]) <= 5e-6
    assert relative(found.tangent, wanted[1]) <= 5e-6


@pytest.mark.parametrize(("dtype", "d"), [(F64, 2), (torch.float32, 129), (torch.float16, 257)], ids=str)
def test_what_no_kernel_takes_is_refused(dtype: torch.dtype, d: int) -> None:
    x = torch.ones(1, 1, 2, d, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"'triton' needs .* got {dtype} with d = {d}; use 'chunked'"):
        attention(Dual(x, x), x, x, backend="triton")
    assert attention(Dual(x, x), x, x).tangent.isfinite().all()  # `auto` takes the other way
