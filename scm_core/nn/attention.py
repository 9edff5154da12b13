# SPDX-License-Identifier: Apache-2.0
"""Softmax attention on tensors or (value, tangent) pairs, with memory linear in the length (paper App. F).

With scores x = q kᵀ/√d, p = softmax(x) and y = p v, the derivative along (q̇, k̇, v̇) is, per query,

    ẋ = (q̇ kᵀ + q k̇ᵀ)/√d,    ẏ = (p ⊙ ẋ) v − (p·ẋ) y + p v̇ = (p ⊙ (ẋ − c)) v + p v̇    with    c = p·ẋ.

The right-hand form is what is computed: the two large terms of the left-hand one nearly cancel when all keys share a component, and
the difference then drowns in rounding. No fused kernel of torch has a forward-mode derivative, so the tangent has its own pass:
`chunked` in PyTorch for any device, `triton` (scm_core/nn/flash_jvp.py) on a GPU, where output and tangent come from one pass.
"""

import importlib.util
import math
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from scm_core.nn.dual import Dual, Maybe, check_pair, value_of
from scm_core.validate import HALF

Backend = Literal["auto", "chunked", "triton"]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]  # of q, k, v; None is zero

TRITON = importlib.util.find_spec("triton") is not None
MAX_HEAD_DIM = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}  # that `triton` is sized for
BLOCK = 256  # queries and keys per tile of `chunked`
TILE = 2**20  # scores that `chunked` holds at a time, over all heads (4 MB in float32)


def attention(q: Maybe, k: Maybe, v: Maybe, key_mask: Tensor | None = None, backend: Backend = "auto") -> Maybe:
    """softmax(q kᵀ/√d) v, and on pairs its derivative as above (App. F).

    q is (B, heads, L, d), k and v are (B, heads, L_k, d), all of one dtype; `key_mask` is (B, L_k), bool, True where a key is attended to.
    A query without any key gives 0. Gives (B, heads, L, d): a pair if any argument is one, where plain tensors are constants. The
    value keeps its autograd graph, the tangent has none.

    `backend` says how a tangent is computed; plain tensors always go through torch's scaled_dot_product_attention. `auto` is `triton`
    for CUDA tensors in half precision where triton is installed and its kernels are sized for them (MAX_HEAD_DIM), else `chunked`: in
    float32 the kernels work without tensor cores in tiles of 16 × 16, and nothing measured says that they are the faster way.

    Raises ValueError for shapes, dtypes or devices that do not match, those of tangents too, for lengths of 0, for another backend, and
    for `triton` where it cannot run.
    """
    values = (value_of(q), value_of(k), value_of(v))
    _check(*values, key_mask)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tangent(name, x)
    if backend not in ("auto", "chunked", "triton"):
        raise ValueError(f"backend: expected 'auto', 'chunked' or 'triton', got {backend!r}")
    if not (isinstance(q, Dual) or isinstance(k, Dual) or isinstance(v, Dual)):
        return _plain(*values, key_mask)
    tq, tk, tv = (x.tangent if isinstance(x, Dual) else None for x in (q, k, v))
    if backend == "auto":
        backend = "triton" if _triton_fits(values[0]) else "chunked"
    if backend == "triton":
        if not TRITON:
            raise ValueError("backend: 'triton' needs the package triton, which is not installed; use 'chunked'")
        from scm_core.nn import flash_jvp  # here, because importing it imports triton

        return Dual(*flash_jvp.flash_attention(*values, (tq, tk, tv), key_mask))
    with torch.no_grad():
        tangent = chunked_tangent(*values, (tq, tk, tv), key_mask)
    return Dual(_plain(*values, key_mask), tangent)


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Shapes, dtypes and devices, none of which costs a look at the values."""
    if q.ndim != 4:
        raise ValueError(f"q: expected shape (B, heads, L, d), got {tuple(q.shape)}")
    b, heads, length, d = q.shape
    if not length or not d:
        raise ValueError(f"q: expected at least one position and one feature, got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[:2] != (b, heads) or x.shape[3] != d or x.shape[2] != k.shape[2]:
            raise ValueError(
                f"{name}: expected shape ({b}, {heads}, L_k, {d}) for q, k and v alike, got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    if not k.shape[2]:
        raise ValueError(f"k: expected at least one position, got {tuple(k.shape)}")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.shape != (b, k.shape[2]):
        raise ValueError(
            f"key_mask: expected bool of shape ({b}, {k.shape[2]}), got {key_mask.dtype} of {tuple(key_mask.shape)}"
        )
    if key_mask.device != q.device:
        raise ValueError(f"key_mask: expected device {q.device} like q, got {key_mask.device}")


def _check_tangent(name: str, x: Maybe) -> None:
    """A kernel reads as many elements of a tangent, of the same size, as of its value."""
    check_pair(name, x)
    if isinstance(x, Dual) and x.tangent.dtype != x.value.dtype:
        raise ValueError(f"tangent of {name}: expected the type {x.value.dtype} of its value, got {x.tangent.dtype}")


def _triton_fits(q: Tensor) -> bool:
    return TRITON and q.is_cuda and q.dtype in HALF and q.shape[3] <= MAX_HEAD_DIM[q.dtype]


def _plain(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """The value alone, in whichever kernel torch picks."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def chunked_tangent(q: Tensor, k: Tensor, v: Tensor, tangents: Tangents, key_mask: Tensor | None = None) -> Tensor:
    """ẏ of the module's docstring, tile by tile.

    Shapes as in `attention`. Computes in float32, or float64 for float64. Besides its result it holds a fixed number of scores.
    """
    heads, length, d = q.shape[1:]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    flat = result.flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    tq, tk, tv = (None if t is None else t.flatten(0, 1) for t in tangents)
    mask = None if key_mask is None else key_mask.repeat_interleave(heads, dim=0)[:, None, :]
    rows, columns = min(length, BLOCK), min(k.shape[1], BLOCK)
    step = max(1, TILE // (rows * columns))
    for n in range(0, len(flat), step):
        some = slice(n, n + step)
        for i in range(0, length, rows):
            at = slice(i, i + rows)
            flat[some, at] = _tangent_of_rows(
                q[some, at].to(wide) / math.sqrt(d),
                k[some],
                v[some],
                None if tq is None else tq[some, at].to(wide) / math.sqrt(d),
                None if tk is None else tk[some],
                None if tv is None else tv[some],
                None if mask is None else mask[some],
                columns,
            )
    return result


def _tangent_of_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    columns: int,
) -> Tensor:
    """ẏ for a block of (scaled) queries, online over blocks of keys.

    Running quantities per query, all relative to the running maximum m: ℓ = Σ e^{x−m}, acc = Σ e^{x−m} v, c = Σ e^{x−m} ẋ / ℓ and
    g = Σ e^{x−m} ((ẋ − c) v + v̇). The g of the paper's form is taken about c, so that nothing is left to subtract at the end; when a
    block moves c by δ, the part of g so far moves by −δ acc.
    """
    n, rows, d = q.shape
    m = q.new_full((n, rows, 1), -math.inf)
    total, c = q.new_zeros(n, rows, 1), q.new_zeros(n, rows, 1)
    acc, g = q.new_zeros(n, rows, d), q.new_zeros(n, rows, d)
    length, moving = k.shape[1], tq is not None or tk is not None
    for j in range(0, length, columns):
        at = slice(j, j + columns)
        k_j, v_j = k[:, at].to(q.dtype), v[:, at].to(q.dtype)
        x = q @ k_j.mT
        if mask is not None:
            x.masked_fill_(~mask[:, :, at], -math.inf)
        m_new = torch.maximum(m, x.amax(dim=-1, keepdim=True))
        shift = m_new.masked_fill(m_new == -math.inf, 0.0)  # queries without a key so far: e^{−∞ − 0} = 0
        e = x.sub_(shift).exp_()
        fade = torch.exp(m - shift)
        total = total * fade + e.sum(dim=-1, keepdim=True)
        g.mul_(fade)
        if moving:
            dx = _score_tangent(q, k_j, tq, None if tk is None else tk[:, at].to(q.dtype)).mul_(e)
            before = c
            c = c + (dx.sum(dim=-1, keepdim=True) - c * e.sum(dim=-1, keepdim=True)) / total.clamp(min=1e-30)
            if j > 0:
                g.addcmul_(acc, fade * (c - before), value=-1)
            g.baddbmm_(dx.addcmul_(e, c, value=-1), v_j)
            if j + columns < length:
                acc.mul_(fade).baddbmm_(e, v_j)
        if tv is not None:
            g.baddbmm_(e, tv[:, at].to(q.dtype))
        m = m_new
    return g.div_(total.masked_fill_(total == 0, 1.0))


def _score_tangent(q: Tensor, k: Tensor, tq: Tensor | None, tk: Tensor | None) -> Tensor:
    """ẋ = q̇ kᵀ + q k̇ᵀ of scaled q and q̇."""
    if tq is None:
        assert tk is not None
        return q @ tk.mT
    dx = tq @ k.mT
    return dx if tk is None else dx.baddbmm_(q, tk.mT)
