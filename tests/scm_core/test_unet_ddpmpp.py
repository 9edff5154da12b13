# SPDX-License-Identifier: Apache-2.0
"""DDPM++: its size, the block against its formula, initialisation, where dropout and attention stand, wrong arguments."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from scm_core.nn.build import count_parameters
from scm_core.nn.layout import Place
from scm_core.nn.unet_ddpmpp import DDPMPP, Block

F64 = torch.float64
TINY: dict[str, Any] = {
    "channels": 2,
    "resolution": 8,
    "labels": 3,
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def cifar(**options: Any) -> DDPMPP:
    """The network of CIFAR-10, without memory."""
    with torch.device("meta"):
        return DDPMPP(channels=3, resolution=32, **options)


def test_parameter_count_is_edms() -> None:
    """With the additive conditioning of EDM's DDPM++, and its embedding, the network has EDM's 55.7 M parameters, to 1%."""
    assert count_parameters(cifar(norm="shift", noise_channels=128)) / 1e6 == pytest.approx(55.7, rel=1e-2)


def test_what_the_variants_cost() -> None:
    """AdaGN and double normalisation double each block's conditioning layer; 256 instead of 128 noise channels widen one layer."""
    shift, adagn, double = cifar(norm="shift"), cifar(norm="adagn"), cifar()
    blocks = [m for m in double.modules() if isinstance(m, Block)]
    assert len(blocks) == 14 + 2 + 2 + 15  # encoder, middle, doubling ones, decoder
    assert count_parameters(adagn) == count_parameters(double)
    assert count_parameters(double) - count_parameters(shift) == sum(513 * block.place.outputs for block in blocks)
    assert count_parameters(double) - count_parameters(cifar(noise_channels=128)) == 128 * 512
    assert count_parameters(cifar(guidance_input=True)) - count_parameters(double) == 256 * 256 + 256


def test_attention_of_the_cifar_network() -> None:
    """At 16: every encoder block, the last of the decoder's level; and the first in the middle. Resampling blocks have none."""
    net = cifar()
    attentive = [
        f"{stack}.{i}"
        for stack in ("encoder", "decoder")
        for i, b in enumerate(net.get_submodule(stack).children())
        if b.place.attention
    ]
    assert attentive == ["encoder.5", "encoder.6", "encoder.7", "encoder.8", "decoder.0", "decoder.12"]
    assert [b.place.resolution for b in net.get_submodule("decoder").children()][7:13] == [16] * 6


def linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.T + layer.bias


def conv(x: Tensor, layer: Any) -> Tensor:
    return nnf.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)


def norm_of(x: Tensor, layer: Any, groups: int) -> Tensor:
    return nnf.group_norm(x, groups, layer.weight, layer.bias, 1e-6)


def unit(a: Tensor) -> Tensor:
    return a / ((a**2).mean(1, keepdim=True) + 1e-4).sqrt()


@pytest.mark.parametrize("norm", ["double", "adagn", "shift"])
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_block_is_its_formula(resample: Any, norm: Any) -> None:
    """A block with attention and another width, written out with torch's own functions, all its weights random."""
    torch.manual_seed(3)
    joined = resample is None
    block = Block(
        Place(20 if joined else 12, 8, 4, resample, attention=True, skip=joined), embedding=5, norm=norm, dropout=0.0
    ).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, emb, skip = normal(2, 12, 4, 4, seed=0), normal(2, 5, seed=1), normal(2, 8, 4, 4, seed=2)
    y = block(x, emb, skip) if joined else block(x, emb)

    def resampled(x: Tensor) -> Tensor:
        if resample == "down":
            return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else x

    if joined:
        x = torch.cat([x, skip], dim=1)
    h = conv(resampled(nnf.silu(norm_of(x, block.norm0, x.shape[1] // 4))), block.conv0)
    c = linear(emb, block.embed)[:, :, None, None]
    if norm == "double":
        h = norm_of(h, block.norm1, 2) * unit(c[:, :8]) + unit(c[:, 8:])
    elif norm == "adagn":
        h = norm_of(h, block.norm1, 2) * (1 + c[:, :8]) + c[:, 8:]
    else:
        h = norm_of(h + c, block.norm1, 2)
    h = conv(nnf.silu(h), block.conv1)
    x = (conv(resampled(x), block.skip) + h) / math.sqrt(2)
    side = x.shape[-1]
    q, k, v = conv(norm_of(x, block.norm2, 2), block.qkv).reshape(2, 3, 8, side**2).unbind(1)
    p = torch.softmax(torch.einsum("ndi,ndj->nij", q, k) / math.sqrt(8), dim=-1)
    h = torch.einsum("nij,ndj->ndi", p, v).reshape(2, 8, side, side)
    x = (x + conv(h, block.project)) / math.sqrt(2)
    torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-11)


def test_conditioning_is_its_formula() -> None:
    """Cosines and sines of t of amplitude 1, the label's column times √labels, the guidance's layer; then two layers with silu."""
    net = DDPMPP(**TINY, guidance_input=True).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    t, labels, s = torch.tensor([0.3, 1.2], dtype=F64), torch.tensor([2, -1]), torch.tensor([1.1, 1.9], dtype=F64)
    omega = torch.tensor([10000 ** (-k / 7) for k in range(8)], dtype=F64)

    def waves(c: Tensor) -> Tensor:
        return torch.cat([torch.cos(c[:, None] * omega), torch.sin(c[:, None] * omega)], dim=1)

    assert net.embed_label is not None
    assert net.embed_guidance is not None
    onehot = torch.tensor([[0, 0, 3**0.5], [0, 0, 0]], dtype=F64)
    emb = waves(t) + linear(onehot, net.embed_label) + linear(math.sqrt(2) * waves(s), net.embed_guidance)
    emb = nnf.silu(linear(nnf.silu(linear(emb, net.embed0)), net.embed1))
    torch.testing.assert_close(net.conditioning(t, labels, s), emb, rtol=1e-11, atol=1e-11)


def test_initialisation() -> None:
    """Last convolutions are near 0, so that F is, too; the guidance input is 0; the others have Glorot's bound; biases are 0."""
    net = DDPMPP(**TINY, guidance_input=True)
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            norm_weight = "norm" in name and name.endswith("weight")
            assert torch.equal(parameter.detach(), torch.full_like(parameter, float(norm_weight)))
            continue
        per_position = parameter[0, 0].numel()
        bound = math.sqrt(6 / (per_position * (parameter.shape[0] + parameter.shape[1])))
        gain = 1.0
        if any(word in name for word in ("conv1", "project", "conv_out")):
            gain = 1e-5
        elif "qkv" in name:
            gain = math.sqrt(0.2)
        elif "guidance" in name:
            gain = 0.0
        assert 0.8 * gain * bound <= float(parameter.detach().abs().max()) <= gain * bound, name
    F = net.eval()(torch.randn(2, 2, 8, 8), torch.rand(2))
    assert 0 < F.abs().max() < 1e-3


@pytest.mark.parametrize(("limit", "with_dropout"), [(None, {8, 4}), (8, {8, 4}), (4, {4}), (2, set())])
def test_dropout_only_at_the_named_resolutions(limit: int | None, with_dropout: set[int]) -> None:
    """Zeros before a block's second convolution appear where the feature map is no larger than `dropout_resolution`."""
    net = DDPMPP(**TINY, dropout=0.4, dropout_resolution=limit).train()
    share: dict[int, list[float]] = {}

    def look(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        share.setdefault(inputs[0].shape[-1], []).append(float((inputs[0] == 0).double().mean()))

    for module in net.modules():
        if isinstance(module, Block):
            module.conv1.register_forward_pre_hook(look)
    net(torch.randn(20, 2, 8, 8), torch.rand(20))
    assert set(share) == {8, 4}
    for side, values in share.items():
        assert values == pytest.approx([0.4 if side in with_dropout else 0.0] * len(values), abs=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 9}, "resolution: expected a multiple of 2 for the 2 levels of multipliers, got 9"),
        ({"width": 7}, "width: expected a positive multiple of 2, got 7"),
        ({"width": 10}, r"channels of a group norm .*: expected a positive multiple of 4, got 10"),
        ({"width": 132}, r"channels of a group norm .*: expected a positive multiple of 32, got 132"),
        ({"noise_channels": 7}, "channels: expected an even number >= 4, got 7"),
        ({"noise_channels": 0}, "channels: expected an even number >= 4, got 0"),
        ({"attention_resolutions": (16,)}, r"attention_resolutions: expected some of the network's, \[8, 4\], got 16"),
        ({"norm": "group"}, "norm: expected 'double', 'adagn' or 'shift', got 'group'"),
        ({"embedding": "sine"}, "embedding: expected 'positional' or 'fourier', got 'sine'"),
        ({"c_noise": "sigma"}, "c_noise: expected 't' or 'edm', got 'sigma'"),
        ({"precision": "fp8"}, "precision: expected one of fp32, fp16, bf16, got 'fp8'"),
        ({"dropout": -0.1}, r"dropout: expected a probability in \[0, 1\), got -0.1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DDPMPP(**{**TINY, **change})
