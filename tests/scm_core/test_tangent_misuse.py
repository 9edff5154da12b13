# SPDX-License-Identifier: Apache-2.0
"""What the tangents and the losses refuse, and that nothing of another shape is broadcast silently."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scm_core.engines import value_and_jvp
from scm_core.nn.mlp import MLP
from scm_core.objectives import adaptive_weighting
from scm_core.objectives.consistency import scm_loss
from scm_core.objectives.diffusion import diffusion_loss
from scm_core.objectives.discrete import difference_tangent, discrete_tangent
from scm_core.objectives.ect import ect_loss
from scm_core.objectives.vsd import vsd_loss
from scm_core.tangent import normalize_tangent, scm_tangent, tangent

SIGMA_DATA = 0.5
X, T = torch.full((4, 2, 3), 0.4), torch.tensor([0.1, 0.5, 1.0, 1.5])


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * torch.cos(t)[:, None, None]


def times(value: float) -> Tensor:
    return torch.cat([T[:3], torch.tensor([value])])


TIMES = [
    ({"t": times(-0.1)}, r"t: expected times in \[0, π/2\] radians, got -0.1"),
    ({"t": times(1.6)}, r"t: expected times in \[0, π/2\] radians, got 1.6"),
    ({"t": times(math.nan)}, r"t: expected times in \[0, π/2\] radians, got nan"),
]
TENSORS = [
    ({"t": T.half()}, "t: expected float32 or float64, got torch.float16"),
    ({"t": T[:, None]}, r"t: expected shape \(4,\) to match x of shape \(4, 2, 3\), got \(4, 1\)"),
    ({"t": T[:1]}, r"t: expected shape \(4,\) .* got \(1,\)"),
    ({"t": T.to("meta")}, "t: expected the device cpu of x, got meta"),
    ({"dxdt": X[:1]}, r"dxdt: expected the shape \(4, 2, 3\) of x_t, got \(1, 2, 3\)"),
    ({"dxdt": X.to("meta")}, "dxdt: expected the device cpu of x_t, got meta"),
    ({"net": lambda x, t: x[:, :1]}, r"F: expected the shape \(4, 2, 3\) of x_t, got \(4, 1, 3\)"),
]
TYPES = [
    ({"x_t": X.half()}, "x_t: expected float32 or float64, got torch.float16"),
    ({"x_t": X.double()}, "dxdt: expected the type torch.float64 of x_t, got torch.float32"),
    ({"t": T.double()}, "t: expected the type torch.float32 of x_t, got torch.float64"),
]
NUMBERS = [
    *[({"sigma_data": v}, f"sigma_data: expected a positive number, got {v}") for v in (0.0, -0.5, math.nan, math.inf)],
    *[({"c": v}, f"c: expected a positive number, got {v}") for v in (0.0, -0.1, math.nan)],
    *[({"warmup": v}, rf"warmup: expected a number in \[0, 1\], got {v}") for v in (-0.1, 1.1, math.nan, math.inf)],
]
NORMALIZE = [({"normalize": "l2"}, "normalize: expected 'norm', 'clip' or 'none', got 'l2'")]
ENGINES = [
    ({"engine": "autograd"}, "engine: expected 'auto', 'dual', 'func' or 'finite_difference', got 'autograd'"),
    ({"engine": "dual"}, r"engine: 'dual' needs a network that takes \(value, tangent\) pairs"),
]
GOOD: dict[str, Any] = {"net": net, "x_t": X, "t": T, "dxdt": X, "sigma_data": SIGMA_DATA}


def cases(*groups: list[tuple[dict[str, Any], str]]) -> list[Any]:
    return [pytest.param(change, message, id=message) for group in groups for change, message in group]


@pytest.mark.parametrize(("change", "message"), cases(TIMES, TENSORS, TYPES, NUMBERS, NORMALIZE, ENGINES))
def test_the_entry_refuses(change: dict[str, Any], message: str) -> None:
    """`scm_tangent` looks at everything, values of t included."""
    scm_tangent(**GOOD)
    with pytest.raises(ValueError, match="^" + message):
        scm_tangent(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "message"), cases(TENSORS, NORMALIZE, ENGINES))
def test_the_step_refuses(change: dict[str, Any], message: str) -> None:
    """`tangent`, within a training step, refuses shapes, devices, names."""
    tangent(**GOOD)
    with pytest.raises(ValueError, match="^" + message):
        tangent(**{**GOOD, **change})


@pytest.mark.parametrize(("change", "message"), cases(TIMES, TENSORS, TYPES, NUMBERS, NORMALIZE))
def test_the_discrete_entry_refuses(change: dict[str, Any], message: str) -> None:
    """`discrete_tangent` as `scm_tangent`."""
    good = {**GOOD, "t_prev": T / 2}
    discrete_tangent(**good)
    with pytest.raises(ValueError, match="^" + message):
        discrete_tangent(**{**good, **change})


@pytest.mark.parametrize(
    ("t_prev", "message"),
    [
        (T, r"t_prev: expected times below t, got 0.1 for t = 0.1"),
        (2 * T.clamp(max=0.7), r"t_prev: expected times below t, got 0.2 for t = 0.1"),
        (-T, r"t_prev: expected times in \[0, π/2\] radians, got -0.1"),
        (T * math.nan, r"t_prev: expected times in \[0, π/2\] radians, got nan"),
        (T[:1] / 2, r"t_prev: expected the shape \(4,\) of t, got \(1,\)"),
        (T.double() / 2, "t_prev: expected the type torch.float32 of t, got torch.float64"),
    ],
)
def test_the_smaller_time_is_smaller(t_prev: Tensor, message: str) -> None:
    """t' ≥ t is a division by zero or a step forwards."""
    with pytest.raises(ValueError, match="^" + message):
        discrete_tangent(net, X, T, t_prev, X, SIGMA_DATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dxdt": X[:1]}, r"dxdt: expected the shape \(4, 2, 3\) of x_t, got \(1, 2, 3\)"),
        ({"t_prev": T[:1]}, r"t_prev: expected shape \(4,\) .* got \(1,\)"),
        ({"net": lambda x, t: x[:, :1]}, r"F: expected the shape \(4, 2, 3\) of x_t, got \(4, 1, 3\)"),
    ],
)
def test_the_discrete_step_refuses(change: dict[str, Any], message: str) -> None:
    """Shapes, within a training step; and it looks at no values: it runs where there are none."""
    rest = {"warmup": 1.0, "normalize": "norm", "c": 0.1}
    with pytest.raises(ValueError, match="^" + message):
        difference_tangent(**{**GOOD, "t_prev": T / 2, **rest, **change})
    meta = {key: value.to("meta") for key, value in {"x_t": X, "t": T, "dxdt": X, "t_prev": T / 2}.items()}
    assert difference_tangent(**{**GOOD, **meta, **rest}).g.shape == X.shape
    assert tangent(net, meta["x_t"], meta["t"], meta["dxdt"], SIGMA_DATA).g.shape == X.shape


@pytest.mark.parametrize(("change", "message"), ENGINES)
def test_the_derivative_refuses(change: dict[str, Any], message: str) -> None:
    """`value_and_jvp` names the engine; a network that takes pairs may use all of them."""
    with pytest.raises(ValueError, match="^" + message):
        value_and_jvp(net, X, T, X, T, **change)
    value_and_jvp(MLP(2, 8, 1), X[:, 0, :2], T, X[:, 0, :2], T, "dual")


@pytest.mark.parametrize(
    ("g", "message"),
    [
        (X.half(), "g: expected float32 or float64, got torch.float16"),
        (X[:, 0, 0], r"g: expected a batch of shape \(B, …\), got shape \(4,\)"),
    ],
)
def test_normalisation_names_g(g: Tensor, message: str) -> None:
    """Never in half precision, where ‖g‖ overflows at 65,504; and the message is about g."""
    for kind in ("norm", "clip", "none"):
        with pytest.raises(ValueError, match="^" + message):
            normalize_tangent(g, kind, 0.1)  # type: ignore[arg-type]


def test_losses_broadcast_nothing() -> None:
    """One error, one weight, one gap for each sample, and outputs of one shape: else ValueError with the argument's name."""
    e, w = torch.ones(4), torch.zeros(4)
    calls = [
        ("logvar", lambda: adaptive_weighting(e, w[:, None])),
        ("logvar", lambda: adaptive_weighting(e, w[:1])),
        ("logvar", lambda: scm_loss(X, X, X, w[:, None])),
        ("F_minus", lambda: scm_loss(X, X[:1], X, w)),
        ("g", lambda: scm_loss(X, X, X[:1], w)),
        ("F", lambda: diffusion_loss(X[:1], X, w, SIGMA_DATA)),
        ("logvar", lambda: diffusion_loss(X, X, w[:, None], SIGMA_DATA)),
        ("F_teacher", lambda: vsd_loss(X, X[:1], X, w)),
        ("F_fake", lambda: vsd_loss(X, X, X[:1], w)),
        ("f_r", lambda: ect_loss(X, X[:1], e, 0.1)),
        ("gap", lambda: ect_loss(X, X, e[:, None], 0.1)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=f"^{name}: expected the shape"):
            call()
