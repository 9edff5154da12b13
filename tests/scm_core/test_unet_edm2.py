# SPDX-License-Identifier: Apache-2.0
"""EDM2's U-Net: sizes, the block against its formula, magnitudes at initialisation, where dropout and attention stand, wrong arguments."""

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from scm_core.nn.build import count_parameters
from scm_core.nn.layers import MPWeight, normalize_weights
from scm_core.nn.layout import Place
from scm_core.nn.unet_edm2 import WIDTHS, Block, EDM2UNet

F64 = torch.float64
TINY: dict[str, Any] = {
    "channels": 2,
    "resolution": 8,
    "labels": 3,
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
}
PUBLISHED = {"S": 280.2, "M": 497.8, "L": 777.6, "XL": 1119.4, "XXL": 1523.4}  # the paper's Tables 3 and 4, in millions


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@cache
def imagenet(size: str, **options: Any) -> EDM2UNet:
    """The network of ImageNet 512, without memory."""
    with torch.device("meta"):
        return EDM2UNet(channels=4, resolution=64, labels=1000, width=WIDTHS[size], **options)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_papers(size: str) -> None:
    """With EDM2's own conditioning each size has the published number of parameters, to 0.1%."""
    assert count_parameters(imagenet(size, norm="adagn")) / 1e6 == pytest.approx(PUBLISHED[size], rel=1e-3)


@pytest.mark.parametrize("size", WIDTHS)
def test_what_the_variants_cost(size: str) -> None:
    """Double normalisation doubles each block's conditioning layer and drops its gain; the guidance input is one layer and a gain."""
    adagn, double = imagenet(size, norm="adagn"), imagenet(size)
    blocks = [m for m in double.modules() if isinstance(m, Block)]
    width = WIDTHS[size]
    extra = sum(4 * width * block.place.outputs - 1 for block in blocks)
    assert len(blocks) == 15 + 2 + 3 + 16  # encoder, middle, doubling ones, decoder
    assert count_parameters(double) - count_parameters(adagn) == extra
    if size == "XS":
        assert count_parameters(imagenet(size, guidance_input=True)) - count_parameters(double) == width * 4 * width + 1


def test_attention_and_resolutions_of_the_imagenet_network() -> None:
    """64 channels per head at 16 and 8, in the first block at the bottom and nowhere else; every level has its blocks."""
    net = imagenet("S")
    for stack, counts in (("encoder", {64: 3, 32: 4, 16: 4, 8: 4}), ("decoder", {8: 6, 16: 5, 32: 5, 64: 5})):
        blocks = [m for m in net.get_submodule(stack).children() if isinstance(m, Block)]
        found = {side: sum(b.place.resolution == side for b in blocks) for side in counts}
        assert found == counts
        for block in blocks:
            wanted = block.place.resolution <= 16 and block.place.resample is None
            if block is not net.get_submodule("decoder.1"):  # the second at the bottom has none
                assert block.place.attention == hasattr(block, "qkv") == wanted
                assert not wanted or block.heads == block.place.outputs // 64
    assert net.get_submodule("decoder.0").heads == 12
    assert not net.get_submodule("decoder.1").place.attention


def weight_of(layer: MPWeight) -> Tensor:
    return layer.weight / math.sqrt(layer.weight[0].numel())


def unit(x: Tensor, dim: int = 1, norm: str = "double") -> Tensor:
    """ε = 1e-4 beside the square, or, in EDM2's own block (its Algorithm 1), beside the root."""
    square = (x**2).mean(dim, keepdim=True)
    return x / (square.sqrt() + 1e-4 if norm == "adagn" else (square + 1e-4).sqrt())


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) / 0.596


def mixed(a: Tensor, b: Tensor, w: float) -> Tensor:
    return ((1 - w) * a + w * b) / math.sqrt((1 - w) ** 2 + w**2)


@pytest.mark.parametrize("norm", ["double", "adagn"])
@pytest.mark.parametrize("flavour", ["encoder", "decoder"])
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_block_is_its_formula(flavour: str, resample: Any, norm: Any) -> None:
    """A block with attention and another width, written out with torch's own functions."""
    torch.manual_seed(3)
    joined = flavour == "decoder" and resample is None
    place = Place(18 if joined else 6, 8, 4, resample, attention=True, skip=joined)
    block = Block(place, flavour == "encoder", embedding=5, norm=norm, head_channels=4, dropout=0.0).double()
    x, emb, skip = normal(2, 6, 4, 4, seed=0), normal(2, 5, seed=1), normal(2, 12, 4, 4, seed=2)
    if norm == "adagn":
        torch.nn.init.constant_(block.embed_gain, 0.6)
    y = block(x, emb, skip) if joined else block(x, emb)

    if joined:
        whole = math.sqrt(18 / 0.5)
        x = torch.cat([x * whole * 0.5 / math.sqrt(6), skip * whole * 0.5 / math.sqrt(12)], dim=1)
    if resample == "down":
        x = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    elif resample == "up":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert block.skip is not None
    if flavour == "encoder":
        x = unit(nnf.conv2d(x, weight_of(block.skip)), norm=norm)
    h = nnf.conv2d(silu(x), weight_of(block.conv0), padding=1)
    c = emb @ weight_of(block.embed).T
    if norm == "double":
        s, b = (unit(part)[:, :, None, None] for part in c.split(8, dim=1))
        h = unit(h) * s + b
    else:
        h = h * (1 + 0.6 * c)[:, :, None, None]
    h = nnf.conv2d(silu(h), weight_of(block.conv1), padding=1)
    if flavour == "decoder":
        x = nnf.conv2d(x, weight_of(block.skip))
    x = mixed(x, h, 0.3)
    side = x.shape[-1]
    q, k, v = nnf.conv2d(x, weight_of(block.qkv)).reshape(2, 3, 2, 4, side**2).unbind(1)  # (q, k, v), head, element
    q, k, v = (unit(part, dim=2, norm=norm) for part in (q, k, v))
    p = torch.softmax(torch.einsum("nhdi,nhdj->nhij", q, k) / 2, dim=-1)
    h = torch.einsum("nhij,nhdj->nhdi", p, v).reshape(2, 8, side, side)
    x = mixed(x, nnf.conv2d(h, weight_of(block.project)), 0.3)
    assert x.abs().max() < 256
    torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-11)


def test_activations_are_clipped() -> None:
    """At ±256, before half precision overflows."""
    block = Block(Place(8, 8, 4), encoder=False, embedding=4, norm="double", head_channels=4, dropout=0.0).double()
    y = block(1000 * normal(2, 8, 4, 4, seed=0), normal(2, 4, seed=1))
    assert float(y.detach().max()) == 256
    assert float(y.detach().min()) == -256


def test_a_channel_of_ones_stands_for_the_bias() -> None:
    """The output depends on the position relative to the border and is not odd in x: x = 0 gives more than 0."""
    net = EDM2UNet(**TINY).double().eval()
    torch.nn.init.ones_(net.out_gain)
    assert net(torch.zeros(1, 2, 8, 8, dtype=F64), torch.tensor([0.5], dtype=F64)).abs().max() > 1e-2


@pytest.mark.parametrize(("norm", "low", "high"), [("adagn", 0.75, 1.2), ("double", 0.85, 1.35)])
def test_magnitudes_at_initialisation(norm: Any, low: float, high: float) -> None:
    """Blocks give activations of RMS near 1. Double normalisation adds two parts of unit variance, so that its branch has more."""
    torch.manual_seed(0)
    net = EDM2UNet(
        3, 16, 10, width=32, attention_resolutions=(8, 4), multipliers=(1, 2, 2), head_channels=32, norm=norm
    )
    torch.nn.init.ones_(net.out_gain)
    rms: list[float] = []
    for module in net.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda module, inputs, y: rms.append(float(y.square().mean().sqrt())))
    with torch.no_grad():
        F = net(torch.randn(8, 3, 16, 16), torch.rand(8) * 1.5, torch.arange(8))
    assert len(rms) == len(net.encoder) + len(net.decoder)
    assert all(low < value < high for value in rms), rms
    assert low < float(F.square().mean().sqrt()) < 1.5 * high


def test_weights_are_unit_at_initialisation_and_after_normalisation() -> None:
    """Every weight matrix belongs to forced weight normalisation, which leaves a new network as it is."""
    net = EDM2UNet(**TINY, guidance_input=True)
    before = [p.detach().clone() for p in net.parameters()]
    normalize_weights(net)
    for parameter, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old, rtol=1e-5, atol=1e-6)
        if parameter.ndim:
            rows = parameter.detach().flatten(1)
            torch.testing.assert_close(rows.square().mean(1), torch.ones(len(rows)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("limit", "with_dropout"), [(None, {8, 4}), (8, {8, 4}), (4, {4}), (2, set())])
def test_dropout_only_at_the_named_resolutions(limit: int | None, with_dropout: set[int]) -> None:
    """Zeros before a block's second convolution appear where the feature map is no larger than `dropout_resolution`."""
    net = EDM2UNet(**TINY, dropout=0.4, dropout_resolution=limit).train()
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


def test_output_is_zero_at_initialisation() -> None:
    """The output gain starts at 0: D(x_t, t) = cos(t) x_t before training."""
    assert not EDM2UNet(**TINY)(torch.randn(2, 2, 8, 8), torch.rand(2)).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 9}, "resolution: expected a multiple of 2 for the 2 levels of multipliers, got 9"),
        ({"width": 7}, "width: expected a positive multiple of 2, got 7"),
        ({"width": 2}, "channels: expected an even number >= 4, got 2"),
        (
            {"head_channels": 12},
            "width · multiplier at resolution 4, with attention: expected a positive multiple of 12, got 16",
        ),
        (
            {"head_channels": 64},  # more than there are: no head at all
            "width · multiplier at resolution 4, with attention: expected a positive multiple of 64, got 16",
        ),
        ({"head_channels": 0}, "head_channels: expected a positive multiple of 1, got 0"),
        ({"attention_resolutions": (16,)}, r"attention_resolutions: expected some of the network's, \[8, 4\], got 16"),
        ({"multipliers": ()}, r"multipliers: expected positive numbers, one for each level, got \(\)"),
        ({"multipliers": (1, 0)}, r"multipliers: expected positive numbers, one for each level, got \(1, 0\)"),
        ({"blocks": 0}, "blocks: expected at least 1 for each level, got 0"),
        ({"norm": "group"}, "norm: expected 'double' or 'adagn', got 'group'"),
        ({"embedding": "sine"}, "embedding: expected 'positional' or 'fourier', got 'sine'"),
        ({"c_noise": "sigma"}, "c_noise: expected 't' or 'edm', got 'sigma'"),
        ({"precision": "fp8"}, "precision: expected one of fp32, fp16, bf16, got 'fp8'"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout_resolution": 0}, "dropout_resolution: expected a positive number or None, got 0"),
        ({"channels": 0}, "channels: expected a positive multiple of 1, got 0"),
        ({"labels": -1}, "labels: expected their number, 0 for none, got -1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EDM2UNet(**{**TINY, **change})
