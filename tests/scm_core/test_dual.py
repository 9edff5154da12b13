# SPDX-License-Identifier: Apache-2.0
"""Operations on (value, tangent) pairs: each against torch.func.jvp of the plain operation, in float64."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from scm_core.nn import dual
from scm_core.nn.dual import Dual

F64 = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass
class Case:
    """An operation of `dual`, its plain form written with torch alone, the shapes of what moves and of its parameters."""

    call: Callable[..., Any]  # (moving inputs …, parameters …)
    plain: Callable[..., Any]
    moving: list[tuple[int, ...]]
    parameters: list[tuple[int, ...]] = field(default_factory=list)


def grouped(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation, group by group, written out."""
    parts = []
    for part in x.chunk(groups, dim=1):
        dims = tuple(range(1, x.ndim))
        centred = part - part.mean(dim=dims, keepdim=True)
        parts.append(centred / ((centred**2).mean(dim=dims, keepdim=True) + eps).sqrt())
    ones = [1] * (x.ndim - 2)
    return torch.cat(parts, 1) * weight.reshape(-1, *ones) + bias.reshape(-1, *ones)


constant = normal(3, 4, 5, 5, seed=90)
mask = (normal(3, 4, 5, 5, seed=91) > 0).to(F64) / 0.5
IMAGE = (3, 4, 5, 5)
CASES = {
    "linear": Case(dual.linear, lambda x, w: x @ w.T, [(3, 4)], [(6, 4)]),
    "conv2d": Case(dual.conv2d, lambda x, w: nnf.conv2d(x, w, padding=1), [IMAGE], [(6, 4, 3, 3)]),
    "linear-bias": Case(dual.linear, lambda x, w, b: x @ w.T + b, [(3, 4)], [(6, 4), (6,)]),
    "conv2d-bias": Case(
        dual.conv2d,
        lambda x, w, b: nnf.conv2d(x, w, padding=1) + b[:, None, None],
        [IMAGE],
        [(6, 4, 3, 3), (6,)],
    ),
    "conv2d-1x1": Case(dual.conv2d, nnf.conv2d, [IMAGE], [(6, 4, 1, 1)]),
    "scale-number": Case(lambda x: dual.scale(x, -1.7), lambda x: x * -1.7, [IMAGE]),
    "scale-parameter": Case(dual.scale, torch.mul, [IMAGE], [()]),
    "add": Case(dual.add, torch.add, [IMAGE, IMAGE]),
    "add-broadcast": Case(dual.add, torch.add, [IMAGE, (3, 4, 1, 1)]),
    "add-constant": Case(lambda x: dual.add(x, constant), lambda x: x + constant, [(3, 1, 5, 5)]),
    "add-to-parameter": Case(lambda x, b: dual.add(b, x), lambda x, b: b + x, [IMAGE], [(4, 1, 1)]),
    "multiply": Case(dual.multiply, torch.mul, [IMAGE, IMAGE]),
    "multiply-broadcast": Case(dual.multiply, torch.mul, [(3, 4, 1, 1), IMAGE]),
    "multiply-parameter": Case(dual.multiply, torch.mul, [IMAGE], [(4, 1, 1)]),
    "multiply-by-parameter": Case(lambda x, b: dual.multiply(b, x), torch.mul, [IMAGE], [(4, 1, 1)]),
    "silu": Case(dual.silu, lambda x: x / (1 + torch.exp(-x)), [IMAGE]),
    "silu-gain": Case(lambda x: dual.silu(x, 1.6), lambda x: 1.6 * x / (1 + torch.exp(-x)), [IMAGE]),
    "rms_normalize": Case(dual.rms_normalize, lambda x: x / ((x**2).mean(1, keepdim=True) + 1e-4).sqrt(), [IMAGE]),
    "rms_normalize-dim": Case(
        lambda x: dual.rms_normalize(x, dim=2, eps=0.1),
        lambda x: x / ((x**2).mean(2, keepdim=True) + 0.1).sqrt(),
        [IMAGE],
    ),
    "magnitude_normalize": Case(
        dual.magnitude_normalize, lambda x: x / ((x**2).mean(1, keepdim=True).sqrt() + 1e-4), [IMAGE]
    ),
    "magnitude_normalize-dim": Case(
        lambda x: dual.magnitude_normalize(x, dim=2, eps=0.1),
        lambda x: x / ((x**2).mean(2, keepdim=True).sqrt() + 0.1),
        [IMAGE],
    ),
    "group_norm": Case(
        lambda x, w, b: dual.group_norm(x, 2, w, b, 0.1),
        lambda x, w, b: grouped(x, 2, w, b, 0.1),
        [IMAGE],
        [(4,), (4,)],
    ),
    "group_norm-flat": Case(
        lambda x, w, b: dual.group_norm(x, 3, w, b, 1e-6),
        lambda x, w, b: grouped(x, 3, w, b, 1e-6),
        [(3, 6)],
        [(6,), (6,)],
    ),
    "log_tan": Case(
        lambda x: dual.log_tan(dual.scale(dual.multiply(x, x), 0.1)),
        lambda x: torch.log(torch.tan(0.1 * x * x)),
        [(6,)],
    ),
    "clamp": Case(lambda x: dual.clamp(x, 0.8), lambda x: torch.where(x.abs() > 0.8, 0.8 * x.sign(), x), [IMAGE]),
    "cast": Case(lambda x: dual.cast(dual.cast(x, torch.float32), F64), lambda x: x.float().double(), [IMAGE]),
    "downsample": Case(dual.downsample, lambda x: x.reshape(3, 4, 2, 2, 3, 2).mean(dim=(3, 5)), [(3, 4, 4, 6)]),
    "upsample": Case(dual.upsample, lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), [IMAGE]),
    "cosine": Case(dual.cosine, torch.cos, [(3,)]),
    "sine": Case(dual.sine, torch.sin, [(3,)]),
    "outer": Case(lambda t: dual.outer(t, constant[0, 0, 0]), lambda t: torch.outer(t, constant[0, 0, 0]), [(3,)]),
    "concat": Case(
        lambda x, y: dual.concat([x, constant, y]), lambda x, y: torch.cat([x, constant, y], 1), [IMAGE, (3, 2, 5, 5)]
    ),
    "chunk": Case(lambda x: dual.chunk(x, 2), lambda x: x.chunk(2, 1), [IMAGE]),
    "rearrange": Case(lambda x: dual.rearrange(x, nnf.pixel_shuffle, 2), lambda x: nnf.pixel_shuffle(x, 2), [IMAGE]),
    "dropout": Case(lambda x: dual.dropout(x, mask), lambda x: x * mask, [IMAGE]),
    "weighted_sum": Case(
        lambda a, b: dual.weighted_sum(a, b, 0.3), lambda a, b: (0.7 * a + 0.3 * b) / math.sqrt(0.58), [IMAGE, IMAGE]
    ),
    "weighted_sum-constant": Case(
        lambda a: dual.weighted_sum(a, constant, 0.3), lambda a: (0.7 * a + 0.3 * constant) / math.sqrt(0.58), [IMAGE]
    ),
}


def tensors(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    return [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if type(result) is tuple else (result,)


def test_every_operation_has_a_case() -> None:
    """An operation added to the module must be added here."""
    operations = {
        name
        for name, function in inspect.getmembers(dual, inspect.isfunction)
        if function.__module__ == dual.__name__ and not name.endswith("_of") and not name.startswith(("_", "check_"))
    }
    assert operations == {name.split("-")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_tangent_is_the_jvp_and_value_the_plain_operation(name: str) -> None:
    """(value, tangent) = torch.func.jvp of the same formula; on plain tensors the same value."""
    case = CASES[name]
    x, dx, parameters = tensors(case.moving, 0), tensors(case.moving, 10), tensors(case.parameters, 20)
    value, jvp = torch.func.jvp(lambda *moving: case.plain(*moving, *parameters), tuple(x), tuple(dx))
    result = as_tuple(case.call(*map(Dual, x, dx), *parameters))
    plain = as_tuple(case.call(*x, *parameters))
    for pair, alone, expected, derivative in zip(result, plain, as_tuple(value), as_tuple(jvp), strict=True):
        assert isinstance(pair, Dual)
        assert pair.value.shape == pair.tangent.shape
        torch.testing.assert_close(pair.value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pair.tangent, derivative, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_value_keeps_its_gradient_and_tangent_has_none(name: str) -> None:
    """Gradients through the value, to inputs and parameters, are those of the plain forward; the tangent is a constant (θ⁻)."""
    case = CASES[name]
    dx = tensors(case.moving, 10)

    def gradients(pairs: bool) -> list[Tensor]:
        leaves = [v.requires_grad_() for v in tensors(case.moving, 0) + tensors(case.parameters, 20)]
        x, parameters = leaves[: len(case.moving)], leaves[len(case.moving) :]
        moving = list(map(Dual, x, dx)) if pairs else x
        function = case.call if pairs else case.plain
        loss = torch.zeros((), dtype=F64)
        for i, part in enumerate(as_tuple(function(*moving, *parameters))):
            if pairs:
                assert not part.tangent.requires_grad
            value = dual.value_of(part)
            loss = loss + (value * normal(*value.shape, seed=30 + i)).sum()
        return list(torch.autograd.grad(loss, leaves))

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_the_magnitude_of_nothing() -> None:
    """Where all channels are zero, value and tangent are finite: (x + δ)/(‖δ‖ + ε) moves with 1/ε."""
    x = torch.zeros(1, 4, 1, 1, dtype=F64, requires_grad=True)
    y = dual.magnitude_normalize(Dual(x, torch.ones_like(x)))
    assert isinstance(y, Dual)
    assert y.value.eq(0).all()
    torch.testing.assert_close(y.tangent, torch.full_like(x, 1e4))
    (gradient,) = torch.autograd.grad(y.value.sum(), x)
    assert gradient.isfinite().all()


def test_constants_stay_plain_tensors() -> None:
    """Where nothing moves no pair appears, and a constant's tangent is zero."""
    x = normal(*IMAGE, seed=0)
    for result in (dual.add(x, x), dual.multiply(x, x), dual.concat([x, x]), dual.weighted_sum(x, x, 0.5)):
        assert isinstance(result, Tensor)
    assert not dual.tangent_of(x).any()
    assert dual.value_of(x) is x


def test_weighted_sum_keeps_unit_variance() -> None:
    """(1 − w) a + w b over its norm has unit variance for independent unit-variance a, b, at every w."""
    a, b = normal(100_000, seed=0), normal(100_000, seed=1)
    for weight in (0.0, 0.3, 0.5, 1.0):
        assert float(dual.weighted_sum(a, b, weight).std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operation", ["rms_normalize", "magnitude_normalize", "group_norm"])
def test_normalisations_of_large_half_precision_numbers(dtype: torch.dtype, operation: str) -> None:
    """Squares of numbers beyond 256 overflow float16: means are taken in float32, for value and tangent."""
    x, dx = (300 * normal(2, 8, 4, 4, seed=i).clamp(-3, 3) for i in (0, 1))
    weight, bias = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)

    def call(x: Any) -> Any:
        if operation != "group_norm":
            return getattr(dual, operation)(x)
        kind = dual.value_of(x).dtype
        return dual.group_norm(x, 2, weight.to(kind), bias.to(kind), 1e-6)

    exact = call(Dual(x, dx))
    for got, expected in zip(call(Dual(x.to(dtype), dx.to(dtype))), exact, strict=True):
        assert got.dtype == dtype
        assert (got - expected).abs().max() < 5 * torch.finfo(dtype).eps * expected.abs().max()
