# SPDX-License-Identifier: Apache-2.0
"""Flash attention that gives output and tangent in one pass, as Triton kernels (paper App. F).

The forward kernel runs over the keys once and keeps, per query and relative to the running maximum m of the scores x,

    ℓ = Σ e^{x−m},   acc = Σ e^{x−m} v,   c = Σ e^{x−m} ẋ / ℓ,   g = Σ e^{x−m} ((ẋ − c) v + v̇)

so that y = acc/ℓ, ẏ = g/ℓ and the log-sum-exp m + ln ℓ come out together, without an L×L matrix. The value's backward is the
usual flash backward, which recomputes p from the log-sum-exp; the tangent has none.

Half precision. Scores and their tangents are accumulated in float32; only p and p ⊙ (ẋ − c) are rounded to the inputs' dtype, for
their product with v. Two things keep that rounding harmless:

- ẋ is centred by its running mean c before it is rounded. The form (p ⊙ ẋ) v − (p·ẋ) y would subtract two products, each rounded to
  8 or 11 bits, whose common part is often much larger than their difference.
- In float16, each row of p ⊙ (ẋ − c) is divided by its largest magnitude in the tile and the product multiplied by it again, in
  float32. Tangents of 1e5 would else overflow (the paper's remedy is to keep them small; here no size of ẋ matters). A scale per row
  and tile costs one reduction, needs no pass over the tangents beforehand, and loses only what lies 2⁻²⁴ below the row's largest
  entry. bfloat16 has float32's range and needs none.

A tangent in float16 still has to fit: ẏ beyond 65504 is an infinity in whatever way it is computed.

Importing this module needs triton. Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the import).
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments of a kernel are pointers and numbers of Triton's own language)

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from scm_core.nn.attention import MAX_HEAD_DIM, Tangents

LOG2_E = tl.constexpr(math.log2(math.e))  # the kernels use 2^x, which the hardware has
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(pointer, row, column, rows, d):
    """A tile of a (rows, d) matrix, 0 outside."""
    inside = (row[:, None] < rows) & (column[None, :] < d)
    return tl.load(pointer + row[:, None] * d + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, tile, row, column, rows, d):
    inside = (row[:, None] < rows) & (column[None, :] < d)
    tl.store(pointer + row[:, None] * d + column[None, :], tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _attended(Mask, batch, n, keys, MASKED: tl.constexpr):
    """Which of the keys n are there and not masked."""
    valid = n < keys
    if MASKED:
        valid = valid & (tl.load(Mask + batch * keys + n, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b, accumulated in float32."""
    if (
        INTERPRETED
    ):  # where tl.dot takes the bits of bfloat16 for integers; the products are exact in float32 either way
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _forward_kernel(
    Q, K, V, TQ, TK, TV, Mask, Out, Tangent, Lse,
    heads, length, keys, d, scale,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all its keys."""
    blocks = tl.cdiv(length, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # of all batch × heads; 64 bits, since offsets may pass 2³¹
    row = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    at_q, at_k = head * length * d, head * keys * d
    q = _load(Q + at_q, row, column, length, d)
    if HAS_TQ:
        tq = _load(TQ + at_q, row, column, length, d)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    c = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    g = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _load(K + at_k, n, column, keys, d)
        v = _load(V + at_k, n, column, keys, d)
        x = _dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        x = tl.where(_attended(Mask, head // heads, n, keys, MASKED)[None, :], x, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # queries without a key so far: 2^(−∞ − 0) = 0
        e = tl.exp2(x - shift[:, None])
        fade = tl.exp2(m - shift)
        mass = tl.sum(e, 1)
        total = total * fade + mass
        g = g * fade[:, None]
        if HAS_TQ or HAS_TK:
            dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if HAS_TQ:
                dx += _dot(tq, tl.trans(k), PRECISION)
            if HAS_TK:
                tk = _load(TK + at_k, n, column, keys, d)
                dx += _dot(q, tl.trans(tk), PRECISION)
            z = e * dx * scale
            move = (tl.sum(z, 1) - c * mass) / tl.where(total == 0.0, 1.0, total)
            c += move
            g -= acc * (fade * move)[:, None]
            z -= e * c[:, None]
            if v.dtype == tl.float16:
                peak = tl.maximum(tl.max(tl.abs(z), 1), 1e-30)[:, None]
                g += _dot((z * (1.0 / peak)).to(tl.float16), v, PRECISION) * peak
            else:
                g += _dot(z.to(v.dtype), v, PRECISION)
        weight = e.to(v.dtype)
        acc = acc * fade[:, None] + _dot(weight, v, PRECISION)
        if HAS_TV:
            tv = _load(TV + at_k, n, column, keys, d)
            g += _dot(weight, tv, PRECISION)
        m = m_new

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    _store(Out + at_q, acc / total[:, None], row, column, length, d)
    _store(Tangent + at_q, g / total[:, None], row, column, length, d)
    # a query without a key gets +∞, so that the backward recomputes p = 2^(x − ∞) = 0
    lse = tl.where(empty, float("inf"), m + tl.log2(total))
    tl.store(Lse + head * length + row, lse, mask=row < length)


@triton.jit
def _backward_queries_kernel(
    Q, K, V, Mask, Grad, Lse, Delta, GradQ,
    heads, length, keys, d, scale,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂/∂q = dS k/√d for BLOCK_M queries, with dS = p ⊙ (dO vᵀ − δ), δ = dO·O per query."""
    blocks = tl.cdiv(length, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    at_q, at_k = head * length * d, head * keys * d
    q = _load(Q + at_q, row, column, length, d)
    grad = _load(Grad + at_q, row, column, length, d)
    lse = tl.load(Lse + head * length + row, mask=row < length, other=float("inf"))
    delta = tl.load(Delta + head * length + row, mask=row < length, other=0.0)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _load(K + at_k, n, column, keys, d)
        v = _load(V + at_k, n, column, keys, d)
        x = _dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        x = tl.where(_attended(Mask, head // heads, n, keys, MASKED)[None, :], x, float("-inf"))
        p = tl.exp2(x - lse[:, None])
        ds = p * (_dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        grad_q += _dot(ds.to(k.dtype), k, PRECISION)
    _store(GradQ + at_q, grad_q * scale, row, column, length, d)


@triton.jit
def _backward_keys_kernel(
    Q, K, V, Mask, Grad, Lse, Delta, GradK, GradV,
    heads, length, keys, d, scale,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂/∂k = dSᵀ q/√d and ∂/∂v = pᵀ dO for BLOCK_N keys."""
    blocks = tl.cdiv(keys, BLOCK_N)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    at_q, at_k = head * length * d, head * keys * d
    k = _load(K + at_k, n, column, keys, d)
    v = _load(V + at_k, n, column, keys, d)
    attended = _attended(Mask, head // heads, n, keys, MASKED)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = _load(Q + at_q, row, column, length, d)
        grad = _load(Grad + at_q, row, column, length, d)
        lse = tl.load(Lse + head * length + row, mask=row < length, other=float("inf"))
        delta = tl.load(Delta + head * length + row, mask=row < length, other=0.0)
        x = _dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        p = tl.exp2(tl.where(attended[None, :], x, float("-inf")) - lse[:, None])
        grad_v += _dot(tl.trans(p.to(grad.dtype)), grad, PRECISION)
        ds = p * (_dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        grad_k += _dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
    _store(GradK + at_k, grad_k * scale, n, column, keys, d)
    _store(GradV + at_k, grad_v, n, column, keys, d)


class Tiles(NamedTuple):
    """How the kernels are compiled: queries and keys per tile, features (a power of two), and how many warps work on a tile."""

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, d: int) -> Tiles:
    """The tiles for values of `dtype` with d features. The sum over a head's features is not split, hence MAX_HEAD_DIM.

    Chosen by what the compiler says, not by time, which no GPU has measured yet. Bytes that ptxas (CUDA 12.8) spills of the forward kernel
    without a mask, on compute capability 8.0 and 9.0: in float16 120 and 0 up to d = 64, 12 and 0 up to 128, 560 and 424 up to 256; in
    float32, without tensor cores, 132 and 0 up to 64, 476 and 404 up to 128.
    """
    block_d = max(16, triton.next_power_of_2(d))
    warps = 4 if block_d <= 64 else 8
    if dtype == torch.float32:
        return Tiles(16, 16, block_d, warps, stages=1)
    block_m, block_n = {128: (32, 32), 256: (32, 16)}.get(block_d, (64, 32))
    return Tiles(block_m, block_n, block_d, warps, stages=2)


def _launch(kernel: Any, blocks_of: int, per: str, q: Tensor, k: Tensor, *args: Any, **flags: bool) -> None:
    """Run `kernel` with one program per head and block (`per` names its size) of `blocks_of` rows."""
    b, heads, length, d = q.shape
    how = tiles(q.dtype, d)
    blocks = {"BLOCK_M": how.block_m, "BLOCK_N": how.block_n, "BLOCK_D": how.block_d}
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    device = torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()
    with device:
        kernel[(b * heads * triton.cdiv(blocks_of, blocks[per]),)](
            *args, heads, length, k.shape[2], d, 1 / math.sqrt(d), **flags, **blocks,
            PRECISION="ieee" if exact else "tf32",
            num_warps=how.warps,
            num_stages=how.stages,
        )  # fmt: skip


class _FlashAttention(torch.autograd.Function):
    """(y, ẏ) of contiguous tensors; ẏ is not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tangents: Tangents, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, tangent = torch.empty_like(q), torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        # q stands where a kernel wants a pointer that its flags tell it not to read
        pointers = (q, k, v, *(q if t is None else t for t in (*tangents, mask)), y, tangent, lse)
        names = ("HAS_TQ", "HAS_TK", "HAS_TV", "MASKED")
        flags = {name: x is not None for name, x in zip(names, (*tangents, mask), strict=True)}
        _launch(_forward_kernel, q.shape[2], "BLOCK_M", q, k, *pointers, **flags)
        ctx.save_for_backward(q, k, v, y, lse, mask)
        ctx.mark_non_differentiable(tangent)
        return y, tangent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, mask = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.float() * y.float()).sum(dim=-1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        pointers = (q, k, v, q if mask is None else mask, grad, lse, delta)
        masked = mask is not None
        _launch(_backward_queries_kernel, q.shape[2], "BLOCK_M", q, k, *pointers, grad_q, MASKED=masked)
        _launch(_backward_keys_kernel, k.shape[2], "BLOCK_N", q, k, *pointers, grad_k, grad_v, MASKED=masked)
        return grad_q, grad_k, grad_v, None, None


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, tangents: Tangents, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, ẏ) of softmax(q kᵀ/√d) v, y with its autograd graph (App. F); shapes as in `attention`, which checks them.

    `tangents` are those of q, k, v, in the same dtype; None is a zero tangent.

    Raises ValueError for a dtype other than float16, bfloat16 and float32, d above MAX_HEAD_DIM, or tensors on a device without Triton.
    """
    if q.shape[3] > MAX_HEAD_DIM.get(q.dtype, 0):
        limits = ", ".join(f"{dtype} with d ≤ {d}" for dtype, d in MAX_HEAD_DIM.items())
        raise ValueError(f"backend: 'triton' needs {limits}, got {q.dtype} with d = {q.shape[3]}; use 'chunked'")
    if not (q.is_cuda or INTERPRETED.value):
        raise ValueError(f"backend: 'triton' needs CUDA tensors, got {q.device}; use 'chunked' or TRITON_INTERPRET=1")
    moving = tuple(None if t is None else t.contiguous() for t in tangents)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    return _FlashAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), moving, mask)
