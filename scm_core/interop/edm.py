# SPDX-License-Identifier: Apache-2.0
"""EDM's DDPM++ networks (Karras et al. 2022; CIFAR-10, FFHQ, AFHQv2 "vp") as ours: the same weights, and the sign of the output turned.

As for EDM2 (`interop.edm2`), F = −raw: the last convolution and its bias change their sign. `DDPMPP` with norm "shift", positional
embedding of EDM's size and c_noise "edm" is that network, once the layers that read the embedding of the time take (cos, sin) instead of
(sin, cos), and those that give q, k and v are in our order. The input for augmentation, zero when sampling, is left out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scm_core.interop.edm2 import LICENCE
from scm_core.interop.rebuild import RefusedError
from scm_core.interop.stored import Network, Teacher, block_names, by_kind, open_network
from scm_core.nn.layout import Place, layout

OTHERS = {
    "VPPrecond": "variance-preserving preconditioning of Score SDE",
    "VEPrecond": "variance-exploding preconditioning of Score SDE",
    "iDDPMPrecond": "preconditioning of improved DDPM",
}


def read_edm(path: str | Path) -> Teacher:
    """Return the network of an EDM pickle (edm-cifar10-32x32-uncond-vp.pkl and its like) as weights of a `DDPMPP`.

    `FileNotFoundError`, or `RefusedError` that names the file and the tensor or setting that is missing, unknown or of another kind: also
    for other preconditionings than EDM's, and for the architectures NCSN++ ("ve") and ADM.
    """
    net, _ = open_network(path, ["EDMPrecond", *OTHERS])
    if net.module.kind in OTHERS:
        raise RefusedError(f"{net.path}: the network has the {OTHERS[net.module.kind]}; only EDM's can be imported")
    if (kind := net.part("model").kind) != "SongUNet":
        raise RefusedError(f"{net.path}: the network is a {kind[:60]}; only DDPM++ (SongUNet) can be imported")
    channels, resolution = net.count("", "img_channels"), net.count("", "img_resolution")
    labels, sigma_data = net.count("", "label_dim", least=0), net.number("", "sigma_data")
    if net.part("model.map_noise").kind != "PositionalEmbedding" or net.has("model.map_noise.freqs"):
        raise RefusedError(f"{net.path}: the network is an NCSN++ (Fourier embedding); only DDPM++ can be imported")
    net.expect("model.map_noise", {"max_positions": 10000, "endpoint": True})
    shape = _shape(net, resolution)
    width, noise, emb = shape["width"], shape["noise_channels"], 4 * shape["width"]
    plan = layout(
        resolution, width, shape["multipliers"], shape["blocks"], shape["attention_resolutions"], width, last_only=True
    )
    side = f"{resolution}x{resolution}"
    last = plan.decoder[-1].outputs
    weights = {
        **_layer(net, "conv_in", f"model.enc.{side}_conv", width, channels, 3, 3),
        **_layer(net, "embed0", "model.map_layer0", emb, noise),
        **_layer(net, "embed1", "model.map_layer1", emb, emb),
        **_layer(net, "norm_out", f"model.dec.{side}_aux_norm", last),
        **_layer(net, "conv_out", f"model.dec.{side}_aux_conv", channels, last, 3, 3),
    }
    weights["embed0.weight"] = weights["embed0.weight"].roll(noise // 2, 1)  # (sin, cos) to (cos, sin)
    for kind in ("weight", "bias"):
        weights[f"conv_out.{kind}"] = -weights[f"conv_out.{kind}"]
    if labels:
        label = _layer(net, "embed_label", "model.map_label", noise, labels)
        weights |= {key: value.roll(noise // 2, 0) for key, value in label.items()}
    encoder, decoder = block_names(plan)
    for stack, names, places in (("encoder", encoder, plan.encoder), ("decoder", decoder, plan.decoder)):
        for index, (name, place) in enumerate(zip(names, places, strict=True)):
            taken = _block(net, f"model.{name}", place, emb)
            weights |= {f"{stack}.{index}.{key}": value for key, value in taken.items()}
    net.drop(["model.map_augment.weight"])
    net.done()
    config = {
        "architecture": "ddpmpp",
        "channels": channels,
        "resolution": resolution,
        "labels": labels,
        **shape,
        "norm": "shift",
        "embedding": "positional",
        "c_noise": "edm",
        "sigma_data": sigma_data,
    }
    dropped = labels > 0 and net.number("model", "label_dropout", 0) > 0
    return Teacher(weights, config, {"format": "edm", "licence": LICENCE, "label_dropout": dropped})


def _shape(net: Network, resolution: int) -> dict[str, Any]:
    """Width, multipliers, blocks and attention, as names and tensors of the encoder show them."""
    blocks = [name for name in net.parts("model.enc") if "_block" in name]
    if others := [name for name in net.parts("model.enc") if "_aux" in name]:
        raise RefusedError(f"{net.path}: the network is an NCSN++ ({others[0]}); only DDPM++ can be imported")
    levels, attentive = net.levels("model.enc", blocks, "conv0", "qkv")
    width, *_ = net.shape(f"model.enc.{resolution}x{resolution}_conv.weight")
    sides = [resolution >> level for level in range(len(levels))]
    uneven = any(outputs % width for outputs in levels.values())
    if list(levels) != sides or not levels or len(blocks) % len(levels) or uneven:
        raise RefusedError(f"{net.path}: its blocks ({', '.join(blocks)}) are not those of a DDPM++")
    return {
        "width": width,
        "multipliers": [outputs // width for outputs in levels.values()],
        "blocks": len(blocks) // len(levels),
        "attention_resolutions": attentive,
        "noise_channels": net.count("model.map_noise", "num_channels"),
    }


def _block(net: Network, part: str, place: Place, emb: int) -> dict[str, Tensor]:
    """The weights of a block by our names."""
    inputs, outputs = place.inputs, place.outputs
    net.expect(part, {"skip_scale": math.sqrt(0.5), "adaptive_scale": False, "num_heads": int(place.attention)})
    norms = ["norm0", "norm1"] + ["norm2"] * place.attention
    for norm, channels in zip(norms, [inputs, outputs, outputs], strict=False):
        net.expect(f"{part}.{norm}", {"eps": 1e-6, "num_groups": min(32, channels // 4)})
    weights = {
        **_layer(net, "norm0", f"{part}.norm0", inputs),
        **_layer(net, "conv0", f"{part}.conv0", outputs, inputs, 3, 3),
        **_layer(net, "embed", f"{part}.affine", outputs, emb),
        **_layer(net, "norm1", f"{part}.norm1", outputs),
        **_layer(net, "conv1", f"{part}.conv1", outputs, outputs, 3, 3),
    }
    if inputs != outputs or place.resample:
        weights |= _layer(net, "skip", f"{part}.skip", outputs, inputs, 1, 1)
    if place.resample:
        for layer in ("conv0", "skip"):
            box = net.take(f"{part}.{layer}.resample_filter", (1, 1, 2, 2))
            net.expect(f"{part}.{layer}", {place.resample: True, "fused_resample": False})
            if not torch.equal(box, torch.full_like(box, 0.25)):
                raise RefusedError(f"{net.path}: {part} resamples with another filter than a box of 2 × 2")
    if place.attention:
        qkv = _layer(net, "qkv", f"{part}.qkv", 3 * outputs, outputs, 1, 1)
        weights |= {key: by_kind(value, 1) for key, value in qkv.items()}
        weights |= _layer(net, "norm2", f"{part}.norm2", outputs)
        weights |= _layer(net, "project", f"{part}.proj", outputs, outputs, 1, 1)
    return weights


def _layer(net: Network, own: str, layer: str, *shape: int) -> dict[str, Tensor]:
    """Weight and bias of a layer by our name."""
    return {
        f"{own}.weight": net.take(f"{layer}.weight", shape),
        f"{own}.bias": net.take(f"{layer}.bias", shape[:1]),
    }
