# SPDX-License-Identifier: Apache-2.0
"""The small network: its tangents against autograd and finite differences, its conditioning, what it refuses."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scm_core.nn.build import Model, build_network, count_parameters, load_model, save_model, student_of
from scm_core.nn.dual import Dual
from scm_core.nn.embedding import LogVarHead
from scm_core.nn.small import SmallNet

F64 = torch.float64
CONFIG = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(dropout: float = 0.0, labels: int = 3, guidance_input: bool = True) -> SmallNet:
    """A network whose gains are not zero, as if trained: at initialisation every tangent would be 0."""
    torch.manual_seed(5)
    net = SmallNet(2, 4, labels, width=8, blocks=2, guidance_input=guidance_input, dropout=dropout).double()
    with torch.no_grad():
        net.out_gain.fill_(1.3)
        if guidance_input:
            net.guidance_gain.fill_(0.8)
    return net


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, t, labels (one dropped), guidance, and a direction (dx, dt)."""
    t = torch.tensor([0.01, 0.5, 1.1, math.atan(160)], dtype=F64)
    labels = torch.tensor([0, -1, 2, 1])
    guidance = torch.tensor([1.0, 1.3, 1.7, 2.0], dtype=F64)
    return normal(4, 2, 4, 4, seed=0), t, labels, guidance, normal(4, 2, 4, 4, seed=1), normal(4, seed=2)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("conditioning", ["full", "no labels", "no guidance", "neither", "unconditional"])
def test_tangent_is_torch_func_jvp(conditioning: str, dropout: float) -> None:
    """The pairs carried through the network are (F, dF) of torch.func.jvp, with the same dropout mask, to rounding."""
    net = network(dropout, labels=0 if conditioning == "unconditional" else 3).train()
    x, t, labels, guidance, dx, dt = inputs()
    y = labels if conditioning in ("full", "no guidance") else None
    s = guidance if conditioning in ("full", "no labels") else None
    torch.manual_seed(11)
    F, dF = net(Dual(x, dx), Dual(t, dt), y, s)
    torch.manual_seed(11)
    expected, jvp = torch.func.jvp(lambda x, t: net(x, t, y, s), (x, t), (dx, dt))
    torch.testing.assert_close(F, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dF, jvp, rtol=1e-11, atol=1e-12)
    assert jvp.square().mean() > 1e-2
    torch.manual_seed(11)
    torch.testing.assert_close(F, net(x, t, y, s), rtol=1e-12, atol=1e-12)  # and F is the plain forward's


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_tangent_is_a_finite_difference(dropout: float) -> None:
    """dF against (F(x + h dx, t + h dt) − F(x − h dx, t − h dt))/2h."""
    net = network(dropout).train()
    x, t, labels, guidance, dx, dt = inputs()

    def at(h: float) -> Tensor:
        torch.manual_seed(11)
        return net(x + h * dx, t + h * dt, labels, guidance).detach()

    torch.manual_seed(11)
    _, dF = net(Dual(x, dx), Dual(t, dt), labels, guidance)
    h = 1e-5
    torch.testing.assert_close(dF, (at(h) - at(-h)) / (2 * h), rtol=1e-6, atol=1e-7)


def test_gradients_of_the_pair_pass_are_the_plain_ones() -> None:
    """The value's gradient to every parameter is that of a plain forward; the tangent has no graph."""
    net = network(dropout=0.4).train()
    x, t, labels, guidance, dx, dt = inputs()
    direction = normal(4, 2, 4, 4, seed=7)

    def gradients(pairs: bool) -> list[Tensor]:
        torch.manual_seed(11)
        if pairs:
            F, dF = net(Dual(x, dx), Dual(t, dt), labels, guidance)
            assert not dF.requires_grad
        else:
            F = net(x, t, labels, guidance)
        return list(torch.autograd.grad((F * direction).sum(), list(net.parameters())))

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
        assert expected.abs().max() > 0


def test_dropout_acts_in_training_only() -> None:
    """In evaluation mode dropout is off and two passes agree."""
    net = network(dropout=0.4)
    x, t, labels, guidance, *_ = inputs()
    assert not torch.equal(net.train()(x, t, labels, guidance), net(x, t, labels, guidance))
    assert torch.equal(net.eval()(x, t, labels, guidance), net(x, t, labels, guidance))


def test_dropout_drops_its_fraction_and_keeps_the_mean() -> None:
    """A share p of the activations before a block's second convolution is 0, the others are divided by 1 − p."""
    net, seen = network(dropout=0.4), []
    block = net.get_submodule("blocks.0.conv1")
    block.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    x, t = normal(500, 2, 4, 4, seed=0), torch.rand(500, dtype=F64)
    net.eval()(x, t)
    net.train()(x, t)
    kept = seen[1] != 0
    assert float(kept.double().mean()) == pytest.approx(0.6, abs=0.01)
    torch.testing.assert_close(seen[1][kept], seen[0][kept] / 0.6, rtol=1e-12, atol=1e-12)


def test_a_dropped_label_is_no_label() -> None:
    """Label −1 equals labels=None, and labels matter otherwise."""
    net = network()
    x, t, labels, guidance, *_ = inputs()
    assert torch.equal(net(x, t, torch.full((4,), -1), guidance), net(x, t, None, guidance))
    assert not torch.allclose(net(x, t, labels, guidance)[0], net(x, t, None, guidance)[0])
    assert torch.equal(net(x, t, labels, guidance)[1], net(x, t, None, guidance)[1])  # the second sample has label −1


def test_samples_of_a_batch_do_not_mix() -> None:
    """A sample's output is its own: permuting the batch permutes the output."""
    net = network()
    x, t, labels, guidance, *_ = inputs()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        net(x[order], t[order], labels[order], guidance[order]),
        net(x, t, labels, guidance)[order],
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_student_starts_equal_to_its_teacher() -> None:
    """With the zero-initialised guidance input the student's F is the teacher's for every scale (App. G)."""
    torch.manual_seed(0)
    net = build_network(CONFIG)
    assert isinstance(net, SmallNet)
    torch.nn.init.constant_(net.out_gain, 0.9)
    student, config = student_of(Model(net, CONFIG, {}), guidance_input=True, dropout=0.2)
    x, t, labels, guidance, *_ = (v.float() if v.is_floating_point() else v for v in inputs())
    assert torch.equal(student.eval()(x, t, labels, guidance), net.eval()(x, t, labels))
    assert config == {**CONFIG, "guidance_input": True, "dropout": 0.2}
    assert net(x, t, labels).abs().max() > 0
    torch.nn.init.ones_(student.get_parameter("guidance_gain"))
    assert not torch.allclose(student(x, t, labels, guidance), net(x, t, labels))


def test_output_is_zero_at_initialisation() -> None:
    """The output gain starts at 0: D(x_t, t) = cos(t) x_t before training."""
    x, t, labels, *_ = inputs()
    assert not build_network(CONFIG).double()(x, t, labels).any()


def test_a_model_file_gives_the_same_network(tmp_path: Path) -> None:
    """Weights in channels-last order survive the file, bit for bit."""
    net = build_network(CONFIG).double()
    torch.nn.init.ones_(net.get_parameter("out_gain"))
    x, t, labels, *_ = inputs()
    single = net.float()
    save_model(tmp_path / "model.safetensors", dict(single.named_parameters()), CONFIG, {"nimg": 7})
    loaded = load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded.net(x.float(), t.float(), labels), single(x.float(), t.float(), labels))
    assert loaded.config == CONFIG
    assert loaded.info == {"nimg": 7}
    assert count_parameters(loaded.net) == sum(p.numel() for p in single.parameters())
    assert not any(p.requires_grad for p in loaded.net.parameters())


def test_misuse_is_named() -> None:
    """Shapes and inputs that the network was not built for raise a sentence that names them."""
    x, t, labels, guidance, *_ = inputs()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 2, 4, 4\), got \(4, 2, 2, 2\)"):
        network()(x[:, :, :2, :2], t)
    with pytest.raises(ValueError, match="labels: the network was built without a label input"):
        network(labels=0)(x, t, labels)
    with pytest.raises(ValueError, match="guidance: the network was built without a guidance input"):
        network(guidance_input=False)(x, t, labels, guidance)
    with pytest.raises(ValueError, match="resolution: must be divisible by the patch size 2, got 5"):
        SmallNet(1, 5, 0, width=8, blocks=1)
    tiny = {"channels": 1, "resolution": 4, "labels": 0, "width": 8, "blocks": 1}
    for change, words in (
        ({"blocks": 0}, "blocks: expected at least 1, got 0"),
        ({"patch": 0}, "patch: expected a positive multiple of 1, got 0"),
        ({"patch": -2}, "patch: expected a positive multiple of 1, got -2"),
        ({"resolution": 0}, "resolution: must be divisible by the patch size 2, got 0"),
        ({"resolution": -4}, "resolution: must be divisible by the patch size 2, got -4"),
        ({"width": 7}, "width: expected a positive multiple of 2, got 7"),
        ({"width": 2}, "channels: expected an even number >= 4, got 2"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout: expected a probability in \[0, 1\), got -0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            SmallNet(**{**tiny, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"architecture: expected one of small, .*, got 'big'"):
        build_network({**CONFIG, "architecture": "big"})
    with pytest.raises(ValueError, match=r"architecture small: .*depth"):
        build_network({**CONFIG, "depth": 3})


def test_weighting_head_starts_at_its_bias() -> None:
    """w(t) is the given constant before training and can depend on t afterwards."""
    head, t = LogVarHead(bias=1.5), torch.linspace(0, 1.5, 5)
    assert torch.equal(head(t), torch.full((5,), 1.5))
    torch.nn.init.normal_(head.weight)
    assert head(t).detach().std() > 0.01
