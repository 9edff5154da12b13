# SPDX-License-Identifier: Apache-2.0
"""Networks of EDM2 (Karras et al. 2024) as ours: the same weights, and the sign of the output turned.

With EDM's preconditioning and the same σ_d, D = cos(t) x_t + sin(t) σ_d raw, raw the network inside it, called with x_t/σ_d and
c_noise = ¼ ln(σ_d tan t): so F = −raw, and the output gain changes its sign. `EDM2UNet` with norm "adagn", embedding "fourier" and c_noise
"edm" is that network. Three things are done to the weights:

- their rows are divided by (RMS + 1e-4), which EDM2 does in each forward (its Algorithm 1), and ours has done beforehand (a student trains
  on with rows at RMS 1, 1e-4 more);
- those that give q, k and v are put into another order;
- the frequencies and phases of the time become `waves` of the description, as model files hold parameters only.

The head of the uncertainty (logvar) is left out: students have one of their own.
"""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scm_core.interop.rebuild import RefusedError, Stored
from scm_core.interop.stored import Network, Teacher, block_names, by_kind, open_network
from scm_core.nn.layers import row_dims
from scm_core.nn.layout import Place, layout
from scm_core.nn.unet_edm2 import ACTIVATION_LIMIT, ATTENTION_BALANCE, CONCAT_BALANCE, RESIDUAL_BALANCE

LICENCE = "CC BY-NC-SA 4.0"  # of all of EDM and EDM2, pre-trained models included, say their READMEs
EPSILON = 1e-4
BALANCES = {"res_balance": RESIDUAL_BALANCE, "attn_balance": ATTENTION_BALANCE, "clip_act": ACTIVATION_LIMIT}


def read_edm2(path: str | Path) -> Teacher:
    """Return the network of an EDM2 pickle (edm2-img512-*.pkl, edm2-img64-*.pkl, network-snapshot-*.pkl) as weights of an `EDM2UNet`.

    `FileNotFoundError`, or `RefusedError` that names the file and the tensor or setting that is missing, unknown or of another kind.
    """
    net, data = open_network(path, ["Precond"])
    channels, resolution = net.count("", "img_channels"), net.count("", "img_resolution")
    labels, sigma_data = net.count("", "label_dim", least=0), net.number("", "sigma_data")
    net.expect("unet", {"label_balance": 0.5, "concat_balance": CONCAT_BALANCE})
    shape = _shape(net, resolution)
    plan = layout(resolution, shape["width"], shape["multipliers"], shape["blocks"], shape["attention_resolutions"])
    first, emb = shape["width"] * shape["multipliers"][0], shape["width"] * max(shape["multipliers"])
    side = f"{resolution}x{resolution}"
    weights = {
        "conv_in.weight": _unit(net, f"unet.enc.{side}_conv", first, channels + 1, 3, 3),
        "embed_time.weight": _unit(net, "unet.emb_noise", emb, first),
        "conv_out.weight": _unit(net, "unet.out_conv", channels, first, 3, 3),
        "out_gain": -net.take("unet.out_gain", ()),
    }
    if labels:
        weights["embed_label.weight"] = _unit(net, "unet.emb_label", emb, labels)
    encoder, decoder = block_names(plan)
    for stack, names, places in (("encoder", encoder, plan.encoder), ("decoder", decoder, plan.decoder)):
        for index, (name, place) in enumerate(zip(names, places, strict=True)):
            part = f"unet.{name}"
            taken = _block(net, part, place, stack == "encoder", emb, shape["head_channels"])
            weights |= {f"{stack}.{index}.{key}": value for key, value in taken.items()}
    waves = [net.take(f"unet.emb_fourier.{name}", (first,)).tolist() for name in ("freqs", "phases")]
    net.drop(name for name in net.tensors if name.startswith("logvar_"))
    net.done()
    config = {
        "architecture": "edm2",
        "channels": channels,
        "resolution": resolution,
        "labels": labels,
        **shape,
        "norm": "adagn",
        "embedding": "fourier",
        "fourier_scale": 1.0,
        "waves": waves,
        "c_noise": "edm",
        "sigma_data": sigma_data,
    }
    latents = _latents(data.get("encoder"), sigma_data)
    info = {"format": "edm2", "licence": LICENCE, "label_dropout": False, **({"latents": latents} if latents else {})}
    return Teacher(weights, config, info)


def _shape(net: Network, resolution: int) -> dict[str, Any]:
    """Width, multipliers, blocks and attention, as names and tensors of the encoder show them."""
    blocks = [name for name in net.parts("unet.enc") if "_block" in name]
    levels, attentive = net.levels("unet.enc", blocks, "conv_res0", "attn_qkv")
    heads = set()
    for stack in ("enc", "dec"):
        for name in net.parts(f"unet.{stack}"):
            if net.has(f"unet.{stack}.{name}.attn_qkv.weight"):
                outputs, *_ = net.shape(f"unet.{stack}.{name}.attn_proj.weight")
                heads.add(outputs / net.count(f"unet.{stack}.{name}", "num_heads"))
    sides = [resolution >> level for level in range(len(levels))]
    if list(levels) != sides or not levels or len(blocks) % len(levels) or len(heads) != 1 or min(heads) % 1:
        raise RefusedError(f"{net.path}: its blocks ({', '.join(blocks)}) are not those of an EDM2 network")
    width = reduce(math.gcd, levels.values())
    return {
        "width": width,
        "multipliers": [outputs // width for outputs in levels.values()],
        "blocks": len(blocks) // len(levels),
        "attention_resolutions": attentive,
        "head_channels": int(heads.pop()),
    }


def _block(net: Network, part: str, place: Place, encoder: bool, emb: int, head_channels: int) -> dict[str, Tensor]:
    """The weights of a block by our names."""
    inputs, outputs = place.inputs, place.outputs
    net.expect(part, {**BALANCES, "resample_filter": [1, 1], "resample_mode": place.resample or "keep"})
    net.expect(part, {"flavor": "enc" if encoder else "dec"})
    weights = {
        "conv0.weight": _unit(net, f"{part}.conv_res0", outputs, outputs if encoder else inputs, 3, 3),
        "conv1.weight": _unit(net, f"{part}.conv_res1", outputs, outputs, 3, 3),
        "embed.weight": _unit(net, f"{part}.emb_linear", outputs, emb),
        "embed_gain": net.take(f"{part}.emb_gain", ()),
    }
    if inputs != outputs:
        weights["skip.weight"] = _unit(net, f"{part}.conv_skip", outputs, inputs, 1, 1)
    if place.attention:
        heads = outputs // head_channels
        net.expect(part, {"num_heads": heads})
        weights["qkv.weight"] = by_kind(_unit(net, f"{part}.attn_qkv", 3 * outputs, outputs, 1, 1), heads)
        weights["project.weight"] = _unit(net, f"{part}.attn_proj", outputs, outputs, 1, 1)
    return weights


def _unit(net: Network, layer: str, *shape: int) -> Tensor:
    """A layer's weight as EDM2 applies it, up to 1/√fan_in: its rows over (RMS + ε), in float64."""
    w = net.take(f"{layer}.weight", shape).double()
    rms = w.square().mean(dim=row_dims(w), keepdim=True).sqrt()
    return (w / (rms + EPSILON)).float()


def _latents(encoder: Any, sigma_data: float) -> dict[str, Any] | None:
    """What latents the network is for, if the file says so: x0 = (latent − mean) σ_d/std of an autoencoder of images in [0, 1]."""
    if not isinstance(encoder, Stored) or encoder.kind != "StabilityVAEEncoder":
        return None
    scale, bias = (encoder.state.get(name) for name in ("scale", "bias"))
    if (
        not isinstance(scale, np.ndarray)
        or not isinstance(bias, np.ndarray)
        or scale.shape != bias.shape
        or not scale.all()
    ):
        return None
    std, mean = sigma_data / scale, -bias / scale  # x0 = latent · scale + bias
    name = encoder.state.get("vae_name")
    return {
        "vae": name.rpartition("/")[2] if isinstance(name, str) else None,
        "images": [0.0, 1.0],
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(float(value), 6) for value in std],
    }
