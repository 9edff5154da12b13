# SPDX-License-Identifier: Apache-2.0
"""Every network with every option: its tangent by three engines, its value, its gradients, with and without checkpointing."""

import copy
import gc
import math
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from scm_core.engines import Engine, value_and_jvp
from scm_core.nn.build import build_network
from scm_core.nn.dual import Dual
from scm_core.nn.network import Network
from scm_core.objectives.consistency import Conditioned

F64 = torch.float64
BASE: dict[str, dict[str, Any]] = {
    "small": {"channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 2},
    "edm2": {
        "channels": 2,
        "resolution": 8,
        "labels": 3,
        "width": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention_resolutions": [4],
        "head_channels": 8,
    },
    "ddpmpp": {
        "channels": 2,
        "resolution": 8,
        "labels": 3,
        "width": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention_resolutions": [4],
    },
}
FULL = {"guidance_input": True, "dropout": 0.3}
UNETS: list[dict[str, Any]] = [
    {},
    FULL,
    {**FULL, "labels": 0},
    {**FULL, "dropout_resolution": 4},
    {**FULL, "norm": "adagn"},
    {**FULL, "c_noise": "edm"},
    {**FULL, "embedding": "fourier", "fourier_scale": 0.02},
    {**FULL, "embedding": "fourier", "fourier_scale": 16.0, "c_noise": "edm", "norm": "adagn"},
    {**FULL, "checkpointing": True},
    {**FULL, "attention_resolutions": [8, 4], "multipliers": [2, 1], "blocks": 2},
]
CASES = [
    *[("small", options) for options in ({}, FULL, {**FULL, "labels": 0})],
    *[("edm2", options) for options in [*UNETS, {**FULL, "head_channels": 4}]],
    *[("ddpmpp", options) for options in [*UNETS, {**FULL, "norm": "shift", "noise_channels": 8}]],
]
IDS = [
    f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items() if k not in FULL or k == 'labels')}"
    for name, options in CASES
]
every_network = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
every_architecture = pytest.mark.parametrize("name", list(BASE))


def trained(name: str, **options: Any) -> Network:
    """A float32 network in training mode that looks trained: no gain, bias or last layer is 0, so that no tangent vanishes trivially."""
    torch.manual_seed(5)
    net = build_network({"architecture": name, **BASE[name], **options})
    assert isinstance(net, Network)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 0:
            parameter.fill_(0.5 + torch.rand(()).item())
        elif parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif parameter.std() < 1e-3:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        parameter.requires_grad_(True)
    return net.to(memory_format=torch.contiguous_format).train()  # type: ignore[call-overload]  # masks follow the memory order


class Point(NamedTuple):
    """Where a network is evaluated and along what; float64, but exact in float32."""

    x: Tensor
    t: Tensor
    labels: Tensor | None
    guidance: Tensor | None
    dx: Tensor
    dt: Tensor

    def to(self, dtype: torch.dtype) -> "Point":
        return Point(*(v.to(dtype) if v is not None and v.is_floating_point() else v for v in self))


def point(net: Network) -> Point:
    """Times from 0.01 to arctan(160) and the direction of training: dt ∝ cos t sin t."""
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([0.01, 0.8, math.atan(160)])
    x, dx = torch.randn(3, *net.shape, generator=generator), torch.randn(3, *net.shape, generator=generator)
    labels = torch.tensor([0, -1, 2]) if net.labels else None
    guidance = torch.tensor([1.0, 1.3, 2.0]) if net.guidance_input else None
    return Point(x, t, labels, guidance, dx, torch.cos(t) * torch.sin(t)).to(F64)


def by_engine(net: Network, at: Point, engine: Engine, k: float = 1.0) -> tuple[Tensor, Tensor]:
    """(F, dF) along k times the direction, with the dropout mask of a fixed seed."""
    torch.manual_seed(11)
    return value_and_jvp(Conditioned(net, at.labels, at.guidance), at.x, at.t, k * at.dx, k * at.dt, engine)


@every_network
def test_three_engines_agree(name: str, options: dict[str, Any]) -> None:
    """dual = torch.func.jvp = central differences in float64, to 1e-8 of the derivative's size, with dropout; F is the plain forward's."""
    net = trained(name, **options).double()
    at = point(net)
    F, dF = by_engine(net, at, "dual")
    size = float(dF.detach().abs().max())
    assert size > 1e-2
    with torch.set_grad_enabled(not net.checkpointing):  # torch.func.jvp refuses to train with it
        expected, jvp = by_engine(net, at, "func")
    torch.testing.assert_close(F, expected, rtol=1e-11, atol=1e-11)
    assert (dF - jvp).abs().max() < 1e-12 * size
    k = (
        1 if options.get("fourier_scale") == 16.0 else 25
    )  # the engine's step is of 6e-6: larger ones for Richardson's extrapolation
    near, far = (by_engine(net, at, "finite_difference", k * m)[1] / (k * m) for m in (1, 2))
    assert (dF - (4 * near - far) / 3).abs().max() < 1e-8 * size
    torch.manual_seed(11)
    torch.testing.assert_close(F, net(at.x, at.t, at.labels, at.guidance), rtol=1e-11, atol=1e-11)


@every_network
def test_float32_tangents(name: str, options: dict[str, Any]) -> None:
    """In float32 F and dF are within 1e-5 of float64's, relative to their norms."""
    net = trained(name, **options)
    at = point(net)
    single = by_engine(net, at.to(torch.float32), "dual")
    exact = by_engine(copy.deepcopy(net).double(), at, "dual")
    for got, expected in zip(single, exact, strict=True):
        assert got.dtype == torch.float32
        assert torch.linalg.vector_norm(got - expected) < 1e-5 * torch.linalg.vector_norm(expected)


@every_architecture
def test_memory_order_changes_nothing(name: str) -> None:
    """`build_network` keeps weights in channels-last order: F and dF are those of contiguous weights, by pairs and by torch.func."""
    net = trained(name, guidance_input=True).double()
    at = point(net)
    contiguous = by_engine(net, at, "dual")
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert any(not p.is_contiguous() for p in net.parameters())
    for engine in ("dual", "func"):
        for got, expected in zip(by_engine(net, at, engine), contiguous, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@every_architecture
def test_both_inputs_move_the_output(name: str) -> None:
    """Neither part of the tangent is trivially 0, in any sample: that along x alone, that along t alone; they add up."""
    net = trained(name, **FULL).double()
    at = point(net)
    _, both = by_engine(net, at, "dual")
    _, along_x = by_engine(net, at._replace(dt=torch.zeros_like(at.dt)), "dual")
    _, along_t = by_engine(net, at._replace(dx=torch.zeros_like(at.dx), dt=torch.ones_like(at.dt)), "dual")
    assert (along_x.abs().flatten(1).amax(1) > 1e-2).all()
    assert (along_t.abs().flatten(1).amax(1) > 1e-3).all()
    total = along_x + at.dt[:, None, None, None] * along_t
    torch.testing.assert_close(both, total, rtol=1e-9, atol=1e-10)


def gradients(net: Network, at: Point, pairs: bool) -> list[Tensor]:
    """The gradient of a random projection of F to every parameter."""
    torch.manual_seed(11)
    if pairs:
        F, dF = net(Dual(at.x, at.dx), Dual(at.t, at.dt), at.labels, at.guidance)
        assert not dF.requires_grad
    else:
        F = net(at.x, at.t, at.labels, at.guidance)
    weight = torch.randn(F.shape, generator=torch.Generator().manual_seed(7), dtype=F.dtype)
    return list(torch.autograd.grad((F * weight).sum(), list(net.parameters())))


@every_network
def test_gradients_of_the_pair_pass_are_the_plain_ones(name: str, options: dict[str, Any]) -> None:
    """The value's gradient to every parameter is that of a plain forward, and none is 0."""
    net = trained(name, **options).double()
    at = point(net)
    for got, expected in zip(gradients(net, at, True), gradients(net, at, False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("name", ["edm2", "ddpmpp"])
def test_checkpointing_changes_no_bit(name: str, pairs: bool) -> None:
    """Value, tangent and gradients with gradient checkpointing are those without, with dropout and in float32."""
    net = trained(name, **FULL)
    frugal = trained(name, **FULL, checkpointing=True)
    at = point(net).to(torch.float32)
    for kept, computed_again in zip(gradients(net, at, pairs), gradients(frugal, at, pairs), strict=True):
        assert torch.equal(kept, computed_again)
    for kept, computed_again in zip(by_engine(net, at, "dual"), by_engine(frugal, at, "dual"), strict=True):
        assert torch.equal(kept, computed_again)


@pytest.mark.parametrize("name", ["edm2", "ddpmpp"])
def test_checkpointing_computes_twice_and_keeps_less(name: str) -> None:
    """Each block runs again in the backward, and the graph holds fewer tensors until then."""

    def kept(net: Network) -> tuple[int, int]:
        runs, saved = [], []
        for block in [*net.get_submodule("encoder").children(), *net.get_submodule("decoder").children()]:
            block.register_forward_pre_hook(lambda *_: runs.append(1))
        at = point(net).to(torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda v: (saved.append(v.numel()), v)[1], lambda v: v):
            F = net(at.x, at.t, at.labels, at.guidance)
        F.sum().backward()
        return len(runs), sum(saved)

    runs, saved = kept(trained(name))
    runs_again, saved_less = kept(trained(name, checkpointing=True))
    assert runs_again == 2 * runs
    assert saved_less < saved / 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["edm2", "ddpmpp"])
def test_no_tangent_lives_until_the_backward(name: str, checkpointing: bool) -> None:
    """Once the pass is over, the graph of F holds none of the blocks' tangents."""
    net, tangents = trained(name, **FULL, checkpointing=checkpointing), []
    for block in [*net.get_submodule("encoder").children(), *net.get_submodule("decoder").children()]:
        block.register_forward_hook(lambda module, inputs, output: tangents.append(weakref.ref(output.tangent)))
    at = point(net).to(torch.float32)
    F, _ = net(Dual(at.x, at.dx), Dual(at.t, at.dt), at.labels, at.guidance)
    gc.collect()
    assert tangents
    assert not any(tangent() is not None for tangent in tangents)
    assert F.requires_grad


# --- precision -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("bf16", torch.bfloat16, 0.06), ("fp16", torch.float16, 0.008)]
)
@pytest.mark.parametrize("norm", ["double", "adagn"])
@pytest.mark.parametrize("name", ["edm2", "ddpmpp"])
def test_half_precision_trunk(name: str, norm: str, precision: str, dtype: torch.dtype, tolerance: float) -> None:
    """Blocks work in half precision on value and tangent, embeddings in float32, F and gradients come in float32, near the exact ones."""
    exact, half = (
        trained(name, guidance_input=True, norm=norm),
        trained(name, guidance_input=True, norm=norm, precision=precision),
    )
    at = point(exact).to(torch.float32)
    seen: list[set[torch.dtype]] = [set(), set()]

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[0] |= {inputs[0].value.dtype, inputs[0].tangent.dtype, output.value.dtype, output.tangent.dtype}
        seen[1] |= {inputs[1].value.dtype, inputs[1].tangent.dtype}

    for block in [*half.get_submodule("encoder").children(), *half.get_submodule("decoder").children()]:
        block.register_forward_hook(look)
    for got, expected in zip(by_engine(half, at, "dual"), by_engine(exact, at, "dual"), strict=True):
        assert got.dtype == torch.float32
        assert torch.linalg.vector_norm(got - expected) < tolerance * torch.linalg.vector_norm(expected)
    assert seen == [{dtype}, {torch.float32}]
    for gradient, parameter in zip(gradients(half, at, True), half.parameters(), strict=True):
        assert gradient.dtype == parameter.dtype == torch.float32
        assert torch.isfinite(gradient).all()


@every_architecture
def test_float64_network(name: str) -> None:
    """`.double()` makes everything float64, whatever the format of x and, within its rounding, of t."""
    net = trained(name).double().eval()
    at = point(net)
    F = net(at.x, at.t, at.labels)
    assert F.dtype == F64
    assert torch.equal(net(at.x.float(), at.t, at.labels), F)  # the point's x is exact in float32


@every_architecture
def test_float32_network(name: str) -> None:
    """Float64 x, t, scales and directions change the format of nothing that has parameters: they work in float32, F is float32."""
    net = trained(name, guidance_input=True).eval()
    at, formats = point(net), set()

    def look(module: nn.Module, inputs: Any) -> None:
        formats.update(t.dtype for x in inputs for t in (x if isinstance(x, Dual) else [x]) if isinstance(t, Tensor))

    for module in net.modules():
        if list(module.parameters(recurse=False)) and module is not net:
            module.register_forward_pre_hook(look)
    F, dF = net(Dual(at.x, at.dx), Dual(at.t, at.dt), at.labels, at.guidance)
    assert formats == {torch.float32}
    assert (F.dtype, dF.dtype) == (torch.float32, torch.float32)


# --- conditioning --------------------------------------------------------------------------------------------------------------------


@every_architecture
def test_labels_and_guidance_reach_their_own_samples(name: str) -> None:
    """Label −1 is no label, other labels and scales matter, and each sample sees its own alone."""
    net = trained(name, guidance_input=True).double().eval()
    at = point(net)
    F = net(at.x, at.t, at.labels, at.guidance)
    assert torch.equal(net(at.x, at.t, torch.full((3,), -1), at.guidance), net(at.x, at.t, None, at.guidance))
    other = net(at.x, at.t, torch.tensor([0, 1, 2]), at.guidance)
    assert torch.equal(other[[0, 2]], F[[0, 2]])
    assert (other[1] - F[1]).abs().max() > 1e-3
    assert at.guidance is not None
    other = net(at.x, at.t, at.labels, at.guidance + torch.tensor([0.0, 0.5, 0.0]))
    assert torch.equal(other[[0, 2]], F[[0, 2]])
    assert (other[1] - F[1]).abs().max() > 1e-3


MISUSE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"x": torch.zeros(3, 2, 5, 5)}, r"x: expected shape \(B, 2, \d, \d\), got \(3, 2, 5, 5\)"),
    ({}, {"t": torch.zeros(2)}, r"t: expected shape \(3,\), one for each sample, got \(2,\)"),
    ({}, {"t": torch.zeros(3, dtype=torch.bfloat16)}, "t: expected float32 or float64, got torch.bfloat16"),
    ({}, {"t": torch.zeros(3, dtype=torch.int64)}, "t: expected float32 or float64, got torch.int64"),
    ({}, {"t": torch.zeros(3, device="meta")}, "t: expected the device cpu of x, got meta"),
    (
        {},
        {"labels": torch.zeros(2, dtype=torch.int64)},
        r"labels: expected shape \(3,\), one for each sample, got \(2,\)",
    ),
    (
        {"labels": 0},
        {"labels": torch.zeros(3, dtype=torch.int64)},
        "labels: the network was built without a label input",
    ),
    ({}, {"labels": torch.zeros(3)}, "labels: expected int64, got torch.float32"),
    ({}, {"labels": torch.zeros(3, dtype=torch.bool)}, "labels: expected int64, got torch.bool"),
    ({}, {"labels": torch.tensor([0, 3, 1])}, r"labels: expected -1 \(none\) to 2, got 3"),
    ({}, {"labels": torch.tensor([0, 2, -2])}, r"labels: expected -1 \(none\) to 2, got -2"),
    ({}, {"guidance": torch.ones(3)}, "guidance: the network was built without a guidance input"),
    (
        {"guidance_input": True},
        {"guidance": torch.ones(1)},
        r"guidance: expected shape \(3,\), one for each sample, got \(1,\)",
    ),
    (
        {"guidance_input": True},
        {"guidance": torch.ones(3, dtype=torch.int64)},
        "guidance: expected float32 or float64, got torch.int64",
    ),
]


@pytest.mark.parametrize(("options", "change", "words"), MISUSE, ids=[m[2][:30] for m in MISUSE])
@every_architecture
def test_wrong_inputs_are_named(name: str, options: dict[str, Any], change: dict[str, Any], words: str) -> None:
    """Shapes, formats and devices that do not fit, and inputs the network does not have, before anything is computed."""
    net = trained(name, **options)
    call = {"x": torch.zeros(3, *net.shape), "t": torch.full((3,), 0.5), **change}
    with pytest.raises(ValueError, match=words):
        net(**call)
    with pytest.raises(ValueError, match=words):
        net(**{**call, "x": Dual(call["x"], call["x"]), "t": Dual(call["t"], call["t"])})


@pytest.mark.parametrize("part", ["x", "t"])
@every_architecture
def test_a_tangent_unlike_its_value_is_refused(name: str, part: str) -> None:
    """Another shape, even one that broadcasts, and another device."""
    net = trained(name)
    call = {"x": torch.zeros(3, *net.shape), "t": torch.full((3,), 0.5)}
    pairs = {key: Dual(value, value) for key, value in call.items()}
    for wrong in (call[part][:1], call[part].to("meta")):
        with pytest.raises(ValueError, match=f"tangent of {part}: expected the (shape|device) .* of its value"):
            net(**{**pairs, part: Dual(call[part], wrong)})


@pytest.mark.parametrize("name", ["edm2", "ddpmpp"])
def test_checkpointing_through_torch_func_is_refused(name: str) -> None:
    """Its backward would recompute outside of the transform. Without gradients, and with the other engines, it works."""
    net = trained(name, checkpointing=True)
    at = point(net).to(torch.float32)
    with pytest.raises(ValueError, match=r"checkpointing=True cannot be trained through torch\.func\.jvp .*'func'"):
        by_engine(net, at, "func")
    with torch.no_grad():
        _, expected = by_engine(net, at, "func")
    F, dF = by_engine(net, at, "auto")
    torch.testing.assert_close(dF, expected, rtol=1e-3, atol=1e-4)
    F.sum().backward()
    F, _ = by_engine(net, at, "finite_difference")
    F.sum().backward()


@every_architecture
def test_labels_embed_as_columns(name: str) -> None:
    """√labels at the label's place and 0 elsewhere, in one piece; nothing for −1."""
    net = trained(name)
    for kind in (torch.int64, torch.int32):
        onehot = net.one_hot(torch.tensor([2, -1, 0], dtype=kind), torch.zeros(3, 1, dtype=F64))
        assert torch.equal(onehot, 3**0.5 * torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=F64))
        assert onehot.is_contiguous()
