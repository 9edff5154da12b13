# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: one pass of twice the batch, the scales of training, and how many passes are counted."""

import pytest
import torch
from torch import Tensor

from scm_core.guidance import data_velocity, evaluating, guided, sample_guidance, teacher_velocity
from scm_core.nn.small import SmallNet
from scm_core.sampling import Guided

SIGMA_DATA = 0.5
F64 = torch.float64


def network(guidance_input: bool = False) -> SmallNet:
    torch.manual_seed(0)
    net = SmallNet(2, 4, labels=3, width=8, blocks=1, guidance_input=guidance_input).double()
    torch.nn.init.ones_(net.out_gain)
    if guidance_input:
        torch.nn.init.ones_(net.guidance_gain)
    return net.eval()


@pytest.fixture
def point() -> tuple[Tensor, Tensor, Tensor]:
    """x, t, labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 2, 4, 4, generator=generator, dtype=F64), torch.rand(4, dtype=F64), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("scale", [1.0, 1.7, torch.tensor([1.0, 1.2, 1.5, 2.0], dtype=F64)])
def test_guided_equals_two_passes(point: tuple[Tensor, Tensor, Tensor], scale: Tensor | float) -> None:
    """F_uncond + s (F_cond − F_uncond) with one scale, or one for each sample."""
    net, (x, t, labels) = network(), point
    uncond, cond = net(x, t, None), net(x, t, labels)
    factor = scale[:, None, None, None] if isinstance(scale, Tensor) else scale
    torch.testing.assert_close(
        guided(net, x, t, labels, scale), uncond + factor * (cond - uncond), rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(uncond, cond)


def test_labels_and_scales_that_do_not_fit_are_named(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """One label and one scale for each sample: a single one would be broadcast silently."""
    net, (x, t, labels) = network(), point
    with pytest.raises(ValueError, match=r"labels: expected the shape \(4,\) of t, got \(1,\)"):
        guided(net, x, t, labels[:1], 1.5)
    with pytest.raises(ValueError, match=r"guidance: expected the shape \(4,\) of t, got \(1,\)"):
        guided(net, x, t, labels, torch.tensor([1.5]))


def test_scale_one_is_the_conditional_network(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """s = 1: no guidance."""
    net, (x, t, labels) = network(), point
    torch.testing.assert_close(guided(net, x, t, labels, 1.0), net(x, t, labels), rtol=1e-12, atol=1e-12)


def test_scales_are_uniform() -> None:
    """s ~ U[low, high], one for each sample, of the generator alone."""
    s = sample_guidance(20_000, 1.0, 2.0, torch.Generator().manual_seed(0))
    assert s.shape == (20_000,)
    assert 1 <= s.min() < 1.001
    assert 1.999 < s.max() <= 2
    assert float(s.mean()) == pytest.approx(1.5, abs=0.01)
    assert float(s.var()) == pytest.approx(1 / 12, abs=0.003)
    assert torch.equal(s, sample_guidance(20_000, 1.0, 2.0, torch.Generator().manual_seed(0)))


def test_velocities(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """sCT follows v_t itself; sCD σ_d F_teacher at x_t/σ_d, guided where there is a scale; without gradients."""
    net, (x_t, t, labels) = network(), point
    v_t, s = torch.randn_like(x_t), torch.tensor([1.0, 1.2, 1.5, 2.0], dtype=F64)
    assert data_velocity(x_t, t, v_t, labels, None) is v_t
    follow = teacher_velocity(net, SIGMA_DATA)
    conditional = follow(x_t, t, v_t, labels, None)
    torch.testing.assert_close(conditional, SIGMA_DATA * net(x_t / SIGMA_DATA, t, labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        follow(x_t, t, v_t, labels, s), SIGMA_DATA * guided(net, x_t / SIGMA_DATA, t, labels, s), rtol=1e-12, atol=1e-12
    )
    assert not conditional.requires_grad
    with pytest.raises(ValueError, match="guidance: classifier-free guidance needs labels"):
        follow(x_t, t, v_t, None, s)


@pytest.mark.parametrize("scale", [None, 1.5])
def test_a_teacher_in_training_mode_is_asked_without_dropout(
    point: tuple[Tensor, Tensor, Tensor], scale: float | None
) -> None:
    """sCD's velocity is the one of evaluation mode, moves no random numbers, and leaves the mode as it was."""
    torch.manual_seed(0)
    teacher, (x_t, t, labels) = SmallNet(2, 4, labels=3, width=8, blocks=1, dropout=0.5).double(), point
    torch.nn.init.ones_(teacher.out_gain)
    s = None if scale is None else torch.full((4,), scale, dtype=F64)
    follow = teacher_velocity(teacher, SIGMA_DATA)
    expected = follow(x_t, t, x_t, labels, s) if teacher.eval() else None
    teacher.train()
    assert not torch.equal(teacher(x_t, t, labels), teacher(x_t, t, labels))  # dropout is there
    before = torch.get_rng_state()
    assert torch.equal(follow(x_t, t, x_t, labels, s), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in teacher.modules())


def test_modes_are_put_back_one_by_one() -> None:
    """`evaluating`: also after an error, also where a part was in evaluation mode; a plain callable has no mode."""
    net = network().train()
    net.blocks.eval()
    modes = [module.training for module in net.modules()]
    assert len(set(modes)) == 2

    def ask(error: bool) -> None:
        with evaluating(net):
            assert not any(module.training for module in net.modules())
            assert not torch.is_grad_enabled()
            if error:
                raise ZeroDivisionError

    ask(False)
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        ask(True)
    assert [module.training for module in net.modules()] == modes
    with evaluating(torch.tanh) as same:
        assert same is torch.tanh


def test_a_velocity_needs_a_standard_deviation_of_the_data() -> None:
    """σ_d > 0."""
    with pytest.raises(ValueError, match="sigma_data: expected a positive number, got 0"):
        teacher_velocity(network(), 0.0)


def test_bound_networks_count_their_passes(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """`Guided`: a guided teacher counts two passes, an unguided one or a student one; each gives what it stands for."""
    net, student, (x, t, labels) = network(), network(guidance_input=True), point
    cases = [
        (Guided(net, labels), net(x, t, labels), 1),
        (Guided(net, None), net(x, t), 1),
        (Guided(net, labels, 1.0), net(x, t, labels), 1),
        (Guided(net, labels, 1.5), guided(net, x, t, labels, 1.5), 2),
        (Guided(student, labels, 1.5, student=True), student(x, t, labels, torch.full((4,), 1.5, dtype=F64)), 1),
    ]
    for bound, expected, passes in cases:
        assert bound.nfe == 0
        torch.testing.assert_close(bound(x, t), expected, rtol=1e-12, atol=1e-12)
        bound(x, t)
        assert bound.nfe == 2 * passes
    with pytest.raises(ValueError, match="guidance: classifier-free guidance needs labels"):
        Guided(net, None, 1.5)


def test_bound_labels_are_checked_once_against_the_network() -> None:
    """`Guided` names labels that the network does not have when it is made, not when it runs."""
    net = network()
    for labels, message in [
        (torch.tensor([0, 3]), r"labels: expected -1 \(none\) to 2, got 3"),
        (torch.tensor([-2, 0]), r"labels: expected -1 \(none\) to 2, got -2"),
        (torch.tensor([0.0, 1.0]), "labels: expected int64, got torch.float32"),
        (torch.tensor([[0, 1]]), r"labels: expected shape \(B,\), got \(1, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            Guided(net, labels)
    Guided(net, torch.tensor([-1, 2]))
    unconditional = SmallNet(2, 4, labels=0, width=8, blocks=1)
    with pytest.raises(ValueError, match="labels: expected None, as the network is unconditional, got 2 labels"):
        Guided(unconditional, torch.tensor([0, 0]))
    Guided(unconditional, None)
    Guided(lambda x, t, labels: x, torch.tensor([99]))  # a network that does not say how many it has


def test_guidance_is_checked_once_against_the_network() -> None:
    """A scale for a student without that input, or one that is no number."""
    labels = torch.tensor([0, 1])
    message = "guidance: expected None, as the network was built without a guidance input, got 1.5"
    with pytest.raises(ValueError, match=message):
        Guided(network(), labels, 1.5, student=True)
    Guided(network(), labels, None, student=True)
    Guided(network(guidance_input=True), labels, 1.5, student=True)
    foreign = torch.nn.Linear(1, 1)
    foreign.guidance_input = False  # what a network declares counts, not how it is built
    with pytest.raises(ValueError, match=message):
        Guided(foreign, None, 1.5, student=True)
    with pytest.raises(ValueError, match="guidance: expected a finite scale or None, got nan"):
        Guided(network(), labels, float("nan"))


def test_batch_of_another_size_than_the_labels_is_named(point: tuple[Tensor, Tensor, Tensor]) -> None:
    """Label count = batch, checked by shape at each call; a device that differs, too."""
    x, t, labels = point
    for bound in (Guided(network(), labels[:3]), Guided(network(), labels[:3], 1.5)):
        with pytest.raises(ValueError, match=r"labels: expected the shape \(4,\) of t, got \(3,\)"):
            bound(x, t)
        assert bound.nfe == 0
    with pytest.raises(ValueError, match="labels: expected the device cpu of t, got meta"):
        Guided(lambda x, t, labels: x, labels.to("meta"))(x, t)
