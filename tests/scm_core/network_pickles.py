# SPDX-License-Identifier: Apache-2.0
"""Network pickles in the layout of EDM and EDM2, small, and what such networks compute, written from the papers in float64.

Nothing here calls the project's networks. The pickles are written by Python's own pickle from real torch modules, with the stand-ins
below for what the projects' code would put there: `torch_utils.persistence._reconstruct_persistent_obj` with source code that, run, writes a file.
"""

import itertools
import math
import pickle
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

F64 = torch.float64
SOURCE = "import pathlib\npathlib.Path({path!r}).write_text('run')\nclass {kind}: pass\n"


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a pickle was unpickled")


class EasyDict(dict[str, Any]):
    """dnnlib's dictionary with attributes, as far as a pickle shows it."""


@contextmanager
def projects() -> Iterator[None]:
    """The modules that the pickles name, while they are written."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    made = {name: types.ModuleType(name) for name in names}
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    made["dnnlib.util"].EasyDict = EasyDict  # type: ignore[attr-defined]
    before = (_reconstruct_persistent_obj.__module__, EasyDict.__module__)
    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = "torch_utils.persistence", "dnnlib.util"
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        _reconstruct_persistent_obj.__module__, EasyDict.__module__ = before


class Persistent(nn.Module):
    """An object of a persistent class: pickled as its source, its name and its attributes."""

    def __init__(self, kind: str, trap: Path, **attributes: Any) -> None:
        super().__init__()
        self.__dict__["_about"] = (kind, trap)
        self.__dict__.update(attributes)

    def __reduce__(self) -> Any:
        kind, trap = self.__dict__["_about"]
        state = {key: value for key, value in self.__dict__.items() if key != "_about"}
        source = SOURCE.format(path=str(trap), kind=kind)
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": kind, "state": state}
        return _reconstruct_persistent_obj, (meta,), None


class Thing:
    """A persistent object that is no module: an encoder, a loss."""

    def __init__(self, kind: str, trap: Path, **attributes: Any) -> None:
        self.about, self.attributes = (kind, trap), attributes

    def __reduce__(self) -> Any:
        source = SOURCE.format(path=str(self.about[1]), kind=self.about[0])
        meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": self.about[0],
            "state": self.attributes,
        }
        return _reconstruct_persistent_obj, (meta,), None


class Pickled(NamedTuple):
    """A network pickle's contents: the data, and its network."""

    data: dict[str, Any]
    net: Persistent

    def write(self, path: Path, protocol: int = 4) -> Path:
        """The pickle as a file."""
        with projects():
            path.write_bytes(pickle.dumps(self.data, protocol=protocol))
        return path

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors in float64."""
        return {name: value.double() for name, value in self.net.state_dict().items()}


def edm2_pickle(
    trap: Path,
    resolution: int = 8,
    channels: int = 3,
    labels: int = 5,
    widths: Sequence[int] = (8, 16),
    blocks: int = 2,
    attention: Sequence[int] = (4,),
    head: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Pickled:
    """An EDM2 network: rows of weights at about, but not quite, unit RMS, as averages have it."""
    generator = torch.Generator().manual_seed(seed)

    def conv(inputs: int, outputs: int, *kernel: int) -> Persistent:
        made = Persistent("MPConv", trap, out_channels=outputs)
        weight = torch.randn(outputs, inputs, *kernel, generator=generator)
        size = torch.rand(outputs, *[1] * (weight.ndim - 1), generator=generator) * 0.3 + 0.7
        made.weight = nn.Parameter(weight * size, requires_grad=False)
        return made

    def gain() -> nn.Parameter:
        return nn.Parameter(torch.randn((), generator=generator) * 0.3 + 1, requires_grad=False)

    def block(inputs: int, outputs: int, flavor: str, mode: str = "keep", attends: bool = False) -> Persistent:
        heads = outputs // head if attends else 0
        balances = {"res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256, "dropout": 0}
        made = Persistent(
            "Block", trap, out_channels=outputs, flavor=flavor, resample_filter=[1, 1], resample_mode=mode, num_heads=heads, **balances
        )  # fmt: skip
        made.emb_gain = gain()
        made.conv_res0 = conv(outputs if flavor == "enc" else inputs, outputs, 3, 3)
        made.emb_linear = conv(max(widths), outputs)
        made.conv_res1 = conv(outputs, outputs, 3, 3)
        for name, present, layer in (
            ("conv_skip", inputs != outputs, (inputs, outputs, 1, 1)),
            ("attn_qkv", attends, (outputs, 3 * outputs, 1, 1)),
            ("attn_proj", attends, (outputs, outputs, 1, 1)),
        ):
            made.register_module(name, conv(*layer) if present else None)
        return made

    def fourier(count: int) -> Persistent:
        made = Persistent("MPFourier", trap)
        made.register_buffer("freqs", 2 * math.pi * torch.randn(count, generator=generator))
        made.register_buffer("phases", 2 * math.pi * torch.rand(count, generator=generator))
        return made

    unet = Persistent(
        "UNet", trap, label_balance=0.5, concat_balance=0.5, _init_args=(), _init_kwargs={"model_channels": widths[0]}
    )
    unet.out_gain = gain()
    unet.emb_fourier, unet.emb_noise = fourier(widths[0]), conv(widths[0], max(widths))
    unet.register_module("emb_label", conv(labels, max(widths)) if labels else None)
    encoder, decoder = nn.ModuleDict(), nn.ModuleDict()
    now, skips = widths[0], [widths[0]]
    for level, width in enumerate(widths):
        side = resolution >> level
        if level == 0:
            encoder[f"{side}x{side}_conv"] = conv(channels + 1, now, 3, 3)
        else:
            encoder[f"{side}x{side}_down"] = block(now, now, "enc", "down")
            skips.append(now)
        for index in range(blocks):
            encoder[f"{side}x{side}_block{index}"] = block(now, width, "enc", attends=side in attention)
            now = width
            skips.append(now)
    for level, width in reversed(list(enumerate(widths))):
        side = resolution >> level
        if level == len(widths) - 1:
            decoder[f"{side}x{side}_in0"] = block(now, now, "dec", attends=True)
            decoder[f"{side}x{side}_in1"] = block(now, now, "dec")
        else:
            decoder[f"{side}x{side}_up"] = block(now, now, "dec", "up")
        for index in range(blocks + 1):
            decoder[f"{side}x{side}_block{index}"] = block(now + skips.pop(), width, "dec", attends=side in attention)
            now = width
    unet.enc, unet.dec, unet.out_conv = encoder, decoder, conv(now, channels, 3, 3)

    net = Persistent(
        "Precond", trap, img_resolution=resolution, img_channels=channels, label_dim=labels, use_fp16=True, sigma_data=0.5,
        _init_args=(), _init_kwargs=EasyDict(img_resolution=resolution),
    )  # fmt: skip
    net.unet, net.logvar_fourier, net.logvar_linear = unet, fourier(6), conv(6, 1)
    net.eval().requires_grad_(False).to(dtype)
    scale = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
    encoder_of_latents = Thing(
        "StabilityVAEEncoder", trap, vae_name="stabilityai/sd-vae-ft-mse", scale=scale, batch_size=8,
        bias=np.float32(0) - np.float32([5.81, 3.25, 0.12, -2.15]) * scale, _vae=None,
    ) if channels == 4 else Thing("StandardRGBEncoder", trap)  # fmt: skip
    loss = Thing("EDM2Loss", trap, P_mean=-0.4, P_std=1.0, sigma_data=0.5)
    return Pickled(EasyDict(encoder=encoder_of_latents, dataset_kwargs=EasyDict(path="x"), loss_fn=loss, ema=net), net)


def edm_pickle(
    trap: Path,
    resolution: int = 8,
    channels: int = 3,
    labels: int = 0,
    width: int = 8,
    multipliers: Sequence[int] = (2, 2),
    blocks: int = 1,
    attention: Sequence[int] = (4,),
    augment: int = 9,
    seed: int = 0,
) -> Pickled:
    """A DDPM++ of EDM with numbers of ordinary size in every layer (at the start of a training the last ones are nearly zero)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator) * size, requires_grad=False)

    def linear(inputs: int, outputs: int, bias: bool = True) -> Persistent:
        made = Persistent("Linear", trap, in_features=inputs, out_features=outputs)
        made.weight = normal(outputs, inputs, size=inputs**-0.5)
        made.register_parameter("bias", normal(outputs, size=0.3) if bias else None)
        return made

    def conv(inputs: int, outputs: int, kernel: int, mode: str = "") -> Persistent:
        up, down = mode == "up", mode == "down"
        made = Persistent(
            "Conv2d", trap, in_channels=inputs, out_channels=outputs, up=up, down=down, fused_resample=False
        )
        made.weight = normal(outputs, inputs, kernel, kernel, size=(inputs * kernel**2) ** -0.5)
        made.bias = normal(outputs, size=0.3)
        made.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if mode else None)
        return made

    def group(count: int) -> Persistent:
        made = Persistent("GroupNorm", trap, num_groups=min(32, count // 4), eps=1e-6)
        made.weight = nn.Parameter(normal(count, size=0.3).data + 1, requires_grad=False)
        made.bias = normal(count, size=0.3)
        return made

    def block(inputs: int, outputs: int, mode: str = "", attends: bool = False) -> Persistent:
        made = Persistent(
            "UNetBlock", trap, in_channels=inputs, out_channels=outputs, emb_channels=4 * width, num_heads=int(attends), dropout=0.13,
            skip_scale=np.sqrt(0.5), adaptive_scale=False,
        )  # fmt: skip
        made.norm0, made.conv0 = group(inputs), conv(inputs, outputs, 3, mode)
        made.affine, made.norm1 = linear(4 * width, outputs), group(outputs)
        made.conv1 = conv(outputs, outputs, 3)
        made.register_module("skip", conv(inputs, outputs, 1, mode) if inputs != outputs or mode else None)
        if attends:
            made.norm2, made.qkv, made.proj = group(outputs), conv(outputs, 3 * outputs, 1), conv(outputs, outputs, 1)
        return made

    model = Persistent("SongUNet", trap, label_dropout=0)
    model.map_noise = Persistent("PositionalEmbedding", trap, num_channels=width, max_positions=10000, endpoint=True)
    model.register_module("map_label", linear(labels, width) if labels else None)
    model.register_module("map_augment", linear(augment, width, bias=False) if augment else None)
    model.map_layer0, model.map_layer1 = linear(width, 4 * width), linear(4 * width, 4 * width)
    encoder, decoder = nn.ModuleDict(), nn.ModuleDict()
    now, skips = width, [width]
    for level, multiplier in enumerate(multipliers):
        side = resolution >> level
        if level == 0:
            encoder[f"{side}x{side}_conv"] = conv(channels, width, 3)
        else:
            encoder[f"{side}x{side}_down"] = block(now, now, "down")
            skips.append(now)
        for index in range(blocks):
            encoder[f"{side}x{side}_block{index}"] = block(now, width * multiplier, attends=side in attention)
            now = width * multiplier
            skips.append(now)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        side = resolution >> level
        if level == len(multipliers) - 1:
            decoder[f"{side}x{side}_in0"] = block(now, now, attends=True)
            decoder[f"{side}x{side}_in1"] = block(now, now)
        else:
            decoder[f"{side}x{side}_up"] = block(now, now, "up")
        for index in range(blocks + 1):
            attends = index == blocks and side in attention
            decoder[f"{side}x{side}_block{index}"] = block(now + skips.pop(), width * multiplier, attends=attends)
            now = width * multiplier
    decoder[f"{resolution}x{resolution}_aux_norm"] = group(now)
    decoder[f"{resolution}x{resolution}_aux_conv"] = conv(now, channels, 3)
    model.enc, model.dec = encoder, decoder
    net = Persistent(
        "EDMPrecond", trap, img_resolution=resolution, img_channels=channels, label_dim=labels, use_fp16=False, sigma_min=0,
        sigma_max=float("inf"), sigma_data=0.5,
    )  # fmt: skip
    net.model = model
    net.eval().requires_grad_(False)
    loss = Thing("EDMLoss", trap, P_mean=-1.2, P_std=1.2, sigma_data=0.5)
    return Pickled({"ema": net, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": {"path": "x"}}, net)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, heads, d, L) each."""
    p = torch.softmax(torch.einsum("nhci,nhcj->nhij", q, k) / math.sqrt(q.shape[2]), dim=3)
    return torch.einsum("nhij,nhcj->nhci", p, v)


def _halve(x: Tensor) -> Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def _double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _one_hot(labels: Tensor | None, batch: int, count: int) -> Tensor:
    y = torch.zeros(batch, count, dtype=F64)
    for row, label in enumerate([] if labels is None else labels.tolist()):
        if label >= 0:
            y[row, label] = 1
    return y * math.sqrt(count)


def edm2_raw(net: Persistent, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
    """The network inside EDM2's preconditioning (its App. B: Eqs. 47, 75, 81, 88, 103, Figure 21, Algorithm 1) from its tensors."""

    def unit(v: Tensor, dim: int) -> Tensor:
        return v / (v.square().mean(dim, keepdim=True).sqrt() + 1e-4)

    def applied(module: Any, v: Tensor, gain: float = 1.0) -> Tensor:
        w = module.weight.double()
        flat = w.flatten(1)
        w = unit(flat, 1).reshape(w.shape) * gain / math.sqrt(flat.shape[1])
        return v @ w.T if w.ndim == 2 else nnf.conv2d(v, w, padding=w.shape[-1] // 2)

    def silu(v: Tensor) -> Tensor:
        return _silu(v) / 0.596

    def summed(a: Tensor, b: Tensor, t: float) -> Tensor:
        return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)

    def joined(a: Tensor, b: Tensor, t: float) -> Tensor:
        n, m = a.shape[1], b.shape[1]
        whole = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
        return torch.cat([a * whole * (1 - t) / math.sqrt(n), b * whole * t / math.sqrt(m)], 1)

    def passed(block: Any, v: Tensor) -> Tensor:
        state = block.__dict__
        v = {"keep": lambda u: u, "down": _halve, "up": _double}[state["resample_mode"]](v)
        if state["flavor"] == "enc":
            v = unit(v if block.conv_skip is None else applied(block.conv_skip, v), 1)
        y = applied(block.conv_res0, silu(v))
        c = applied(block.emb_linear, emb, float(block.emb_gain)) + 1
        y = applied(block.conv_res1, silu(y * c[:, :, None, None]))
        if state["flavor"] == "dec" and block.conv_skip is not None:
            v = applied(block.conv_skip, v)
        v = summed(v, y, 0.3)
        if heads := state["num_heads"]:
            n, width, high, wide = v.shape
            parts = applied(block.attn_qkv, v).reshape(n, heads, width // heads, 3, high * wide)
            q, k, u = unit(parts, 2).unbind(3)
            v = summed(v, applied(block.attn_proj, _attention(q, k, u).reshape(v.shape)), 0.3)
        return v.clamp(-256, 256)

    unet: Any = net.unet
    waves = c_noise[:, None] * unet.emb_fourier.freqs.double() + unet.emb_fourier.phases.double()
    emb = applied(unet.emb_noise, torch.cos(waves) * math.sqrt(2))
    if unet.emb_label is not None:
        y = _one_hot(labels, len(x), unet.emb_label.weight.shape[1])
        emb = summed(emb, applied(unet.emb_label, y), 0.5)
    emb = silu(emb)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    skips = []
    for name, block in unet.enc.items():
        x = applied(block, x) if name.endswith("conv") else passed(block, x)
        skips.append(x)
    for name, block in unet.dec.items():
        x = passed(block, joined(x, skips.pop(), 0.5) if "block" in name else x)
    return applied(unet.out_conv, x, float(unet.out_gain))


def edm_raw(net: Persistent, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
    """The DDPM++ inside EDM's preconditioning (Song et al. 2021, App. C; EDM, App. F.2 and Table 7) from its modules' tensors."""

    def linear(module: Any, v: Tensor) -> Tensor:
        return v @ module.weight.double().T + module.bias.double()

    def conv(module: Any, v: Tensor) -> Tensor:
        w = module.weight.double()
        return nnf.conv2d(v, w, module.bias.double(), padding=w.shape[-1] // 2)

    def group(module: Any, v: Tensor) -> Tensor:
        parts = v.reshape(len(v), min(32, v.shape[1] // 4), -1)
        centred = parts - parts.mean(2, keepdim=True)
        v = (centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()).reshape(v.shape)
        return v * module.weight.double()[:, None, None] + module.bias.double()[:, None, None]

    def passed(block: Any, v: Tensor, name: str) -> Tensor:
        resample = _halve if name.endswith("down") else _double if name.endswith("up") else lambda u: u
        y = conv(block.conv0, resample(_silu(group(block.norm0, v))))
        y = _silu(group(block.norm1, y + linear(block.affine, emb)[:, :, None, None]))
        v = v if block.skip is None else conv(block.skip, resample(v))
        v = (v + conv(block.conv1, y)) * math.sqrt(0.5)
        if block.__dict__["num_heads"]:
            parts = conv(block.qkv, group(block.norm2, v)).reshape(len(v), 1, v.shape[1], 3, -1)
            a = _attention(*parts.unbind(3)).reshape(v.shape)
            v = (v + conv(block.proj, a)) * math.sqrt(0.5)
        return v

    model: Any = net.model
    half = model.map_layer0.weight.shape[1] // 2
    frequencies = torch.tensor([10000 ** (-k / (half - 1)) for k in range(half)], dtype=F64)
    waves = c_noise[:, None] * frequencies
    emb = torch.cat([waves.sin(), waves.cos()], 1)
    if model.map_label is not None:
        emb = emb + linear(model.map_label, _one_hot(labels, len(x), model.map_label.weight.shape[1]))
    emb = _silu(linear(model.map_layer1, _silu(linear(model.map_layer0, emb))))
    skips = []
    for name, block in model.enc.items():
        x = conv(block, x) if name.endswith("conv") else passed(block, x, name)
        skips.append(x)
    blocks = dict(model.dec.items())
    last = [blocks.pop(name) for name in list(blocks) if "aux" in name]
    for name, block in blocks.items():
        x = passed(block, torch.cat([x, skips.pop()], 1) if "block" in name else x, name)
    return conv(last[1], _silu(group(last[0], x)))


def denoiser(raw: Any, net: Persistent, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """D(x; σ) of EDM's preconditioning (its Table 1, σ_d = ½), x (B, C, H, W) with noise of standard deviation σ (B,)."""
    s = sigma[:, None, None, None]
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt()
    result: Tensor = c_skip * x + c_out * raw(net, x / (s**2 + 0.25).sqrt(), sigma.log() / 4, labels)
    return result


def heun(raw: Any, net: Persistent, noise: Tensor, steps: int, labels: Tensor | None) -> Tensor:
    """EDM's deterministic sampler (its Algorithm 1) from x = σ_max ε, ε ~ N(0, I), on its grid with ρ = 7."""
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    grid = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    x = grid[0] * noise
    for now, after in itertools.pairwise(grid):
        d = (x - denoiser(raw, net, x, x.new_full((len(x),), now), labels)) / now
        ahead = x + (after - now) * d
        if after:
            d = (d + (ahead - denoiser(raw, net, ahead, x.new_full((len(x),), after), labels)) / after) / 2
            ahead = x + (after - now) * d
        x = ahead
    return x
