# SPDX-License-Identifier: Apache-2.0
"""Published autoencoders: folders in the layout of diffusers' AutoencoderKL, verified, behind the interface of `scm_core.vae`.

The paper's is sd-vae-ft-mse (§5, App. G). Latents are taken as the network gives them: the factor 0.18215 by which Stable Diffusion scales
them is no part of the network. The paper's channel statistics, like EDM2's, are of latents without it: their standard deviations lie around
1/0.18215 = 5.5.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scm_core.compat import prepare_torchvision
from scm_core.evaluate.weights import fill, load_tensors
from scm_core.published import Opener, PublishedFile, find_published, open_url, verified
from scm_core.vae import check_images, check_latents

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
ARCHITECTURE = "autoencoder_kl"  # in the description of a model file
# What a config.json says beside the network's arguments: of versions, of the scaling and the tiles that pipelines use, of their precision.
BESIDE = {
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
}
# The names that attention had in diffusers before 0.17, in files written then.
FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# Arguments that this module's network and diffusers' have in common.
SHARED = (
    *(
        "in_channels",
        "out_channels",
        "down_block_types",
        "up_block_types",
        "block_out_channels",
        "layers_per_block",
        "act_fn",
    ),
    *("latent_channels", "norm_num_groups", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
)


class AutoencoderKL(nn.Module):
    """diffusers' AutoencoderKL: images (B, channels, H, W) in [−1, 1] ↔ latents (B, latent_channels, H/f, W/f), f = 2^(levels − 1).

    The arguments are its own, but `unit_images`: its network is shown images in [0, 1], half the contrast that it was trained on, as EDM2
    does, whose networks are for such latents. Raises `ValueError`, in diffusers' words, for those that do not go together.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        unit_images: bool = False,
    ) -> None:
        super().__init__()
        arguments = {name: value for name, value in locals().items() if name in SHARED}
        prepare_torchvision()
        from diffusers import AutoencoderKL as Network  # here, as it takes seconds and few need it

        if in_channels != out_channels:
            raise ValueError(
                f"AutoencoderKL: in_channels and out_channels must be equal, got {in_channels}, {out_channels}"
            )
        self.channels, self.latent_channels = in_channels, latent_channels
        self.unit_images = unit_images
        self.downsampling = 2 ** (len(block_out_channels) - 1)
        try:
            self.network: Any = Network(**arguments)
        except (ValueError, TypeError, KeyError, IndexError) as error:  # it checks little, and fails where it breaks
            raise ValueError(f"AutoencoderKL: diffusers makes no network of these arguments: {error}") from error

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | x), (B, latent_channels, H/f, W/f), for images x in [−1, 1].

        The log-variance is kept within −30…20, as diffusers has it.
        """
        check_images(self, x)
        posterior = self.network.encode((x + 1) / 2 if self.unit_images else x).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, z: Tensor) -> Tensor:
        """Return images (B, channels, f·h, f·w), nominally in [−1, 1], not clipped, of latents (B, latent_channels, h, w)."""
        check_latents(self, z)
        images: Tensor = self.network.decode(z).sample
        return 2 * images - 1 if self.unit_images else images


@dataclass(frozen=True)
class Known:
    """A published autoencoder: its weights file, and the network that they are of."""

    weights: PublishedFile
    config: Mapping[str, Any]


KNOWN = {
    # The publisher's page gives the digest of the revision; the same stands in triet4p/latent-anything (scripts/diffusers_vae_fidelity.py)
    # and in utensils/mold (crates/mold-core/src/manifest.rs), which know nothing of each other. It is that of the VAE of Stable
    # Diffusion 2 as well. The config is the revision's config.json (SHA-256 92d3dfb7…, a test makes its bytes from this).
    "sd-vae-ft-mse": Known(
        PublishedFile(
            file=f"sd-vae-ft-mse/{WEIGHTS}",
            urls=(
                "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/"
                + WEIGHTS,
            ),
            sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
            size=334_643_276,
            licence="MIT",
        ),
        {
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "out_channels": 3,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
    ),
}


class Pretrained(NamedTuple):
    """A verified autoencoder, in evaluation mode: network, its description for `build_network`, and where it is from."""

    net: AutoencoderKL
    config: dict[str, Any]
    info: dict[str, Any]


def load_pretrained(
    source: str | Path, sha256: str | None = None, opener: Opener = open_url, unit_images: bool = False
) -> Pretrained:
    """Return the autoencoder `source`: one of `KNOWN`, found in the folder of weights or fetched into it, or a folder of the user's own.

    A folder has config.json and diffusion_pytorch_model.safetensors, as diffusers' `save_pretrained` writes them; `sha256` is its
    weights'. Raises `FileNotFoundError` for files that are not there and `ValueError` for another digest, another network, or a folder
    without `sha256`.
    """
    if known := KNOWN.get(str(source)):
        if sha256 is not None:
            raise ValueError(f"sha256: {source} has a published one; for other weights name their folder")
        found = find_published(known.weights, f"the VAE {source}", opener)
        config = _arguments(known.config, source)
        beside = found.path.with_name(CONFIG)
        if beside.exists() and _read_config(beside) != config:
            raise ValueError(
                f"{beside} describes another network than {source}: remove it, or put the published one there"
            )
        info: dict[str, Any] = {"source": str(source), "licence": known.weights.licence}
    else:
        folder = Path(source)
        config = _read_config(folder / CONFIG)
        if sha256 is None or not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"{folder}: give the SHA-256 (64 hex digits) of its {WEIGHTS}, got {sha256!r}")
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(
                f"{folder / WEIGHTS} is missing: save the autoencoder there with diffusers' save_pretrained, in safetensors"
            )
        found = verified(
            folder / WEIGHTS, sha256.lower(), f"the VAE {folder}", "give the right file or the right sha256"
        )
        info = {"source": folder.name}
    if unit_images:
        config["unit_images"] = True
    with torch.device("meta"):
        net = AutoencoderKL(**config)
    fill(net.network, _renamed(load_tensors(found.path)), found.path)
    return Pretrained(net.eval(), {"architecture": ARCHITECTURE, **config}, {**info, "sha256": found.sha256})


def _read_config(path: Path) -> dict[str, Any]:
    """The network's arguments in a config.json of diffusers."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a VAE is one of {', '.join(KNOWN)}, or a folder that diffusers' save_pretrained wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): get it again") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "AutoencoderKL":
        raise ValueError(f"{path} must describe an AutoencoderKL (_class_name), it says {name!r}")
    return _arguments({key: value for key, value in config.items() if key not in BESIDE}, path)


def _arguments(config: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """All arguments of `AutoencoderKL` as JSON values, those that the file leaves out at their defaults."""
    known = {name: inspect.signature(AutoencoderKL).parameters[name] for name in SHARED}
    if unknown := sorted(config.keys() - known.keys()):
        raise ValueError(f"{path}: {unknown[0]} is no argument of AutoencoderKL that is known here, so it is not used")
    complete = {name: config.get(name, argument.default) for name, argument in known.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in complete.items()}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names: attention had others once, and in the oldest files 1×1 convolutions for its linear maps."""
    result = {}
    for name, value in tensors.items():
        before, dot, after = name.partition(".attentions.0.")
        layer, _, kind = after.rpartition(".")
        if dot and layer in {*FORMER, *FORMER.values()}:
            name = f"{before}{dot}{FORMER.get(layer, layer)}.{kind}"
            value = value[:, :, 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        result[name] = value
    return result
