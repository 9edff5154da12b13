# SPDX-License-Identifier: Apache-2.0
"""Folders that diffusers saved (UNet2DModel, DiTTransformer2DModel, Transformer2DModel, with their scheduler) as teachers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from scm_core.evaluate.weights import load_tensors
from scm_core.interop.rebuild import RefusedError
from scm_core.interop.stored import Teacher
from scm_core.nn.foreign import CLASSES, PREDICTIONS, ForeignNet

CONFIG, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"


def weights_of(folder: Path) -> Path:
    """The weights file of a folder; `FileNotFoundError` if there is none."""
    return _part(
        folder,
        WEIGHTS,
        ("unet", "transformer", "."),
        "save the model there with diffusers' save_pretrained, in safetensors",
    )


def read_diffusers(folder: str | Path, sigma_data: float = 0.5) -> Teacher:
    """Return the network of a folder that diffusers saved: a pipeline's (unet or transformer, scheduler), or a model's with its scheduler.

    `FileNotFoundError`, or `RefusedError` that names the file and the class, setting or tensor that cannot be used.
    """
    folder = Path(folder)
    weights = weights_of(folder)
    file = weights.with_name(CONFIG)
    config, scheduler = (
        _json(file),
        _json(_part(folder, SCHEDULER, ("scheduler", "."), "it says what the network predicts")),
    )
    name = config.get("_class_name")
    if name not in CLASSES:
        raise RefusedError(f"{file}: holds a {str(name)[:60]}; only {', '.join(CLASSES)} can be imported")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise RefusedError(
            f"{folder}: prediction_type is {prediction!r}, and only {', '.join(PREDICTIONS)} can be used"
        )
    if scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr"):
        raise RefusedError(f"{folder}: the scheduler has trained or rescaled betas, which cannot be used")
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    if arguments.get("time_embedding_type", "positional") != "positional":
        raise RefusedError(
            f"{file}: time_embedding_type is {arguments['time_embedding_type']!r}, and only 'positional' can be used"
        )
    if arguments.get("class_embed_type") is not None:
        raise RefusedError(
            f"{file}: class_embed_type is {arguments['class_embed_type']!r}, and only labels can be used"
        )
    key = "num_class_embeds" if name == "UNet2DModel" else "num_embeds_ada_norm"
    labels = arguments.get(key) or 0
    null = {} if name == "UNet2DModel" or not labels else {"null_label": labels}
    side = arguments.get("sample_size")
    if not isinstance(side, int) or not isinstance(arguments.get("in_channels"), int):
        raise RefusedError(
            f"{file}: expected a square sample_size and in_channels, got {side} and {arguments.get('in_channels')}"
        )
    schedule = {
        "rule": scheduler.get("beta_schedule", "linear"),
        "start": scheduler.get("beta_start", 0.0001),
        "end": scheduler.get("beta_end", 0.02),
        "count": scheduler.get("num_train_timesteps", 1000),
    }
    description = {
        "architecture": "diffusers", "channels": arguments["in_channels"], "resolution": side, "labels": labels, "network": name,
        "arguments": arguments, "prediction": prediction, "schedule": schedule, "sigma_data": sigma_data, **null,
    }  # fmt: skip
    options = {key: value for key, value in description.items() if key != "architecture"}
    try:
        with torch.device("meta"):
            net = ForeignNet(**options)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise RefusedError(f"{file}: diffusers makes no network of it: {error}") from error
    tensors = {f"inner.{key}": value.float() for key, value in load_tensors(weights).items()}
    own = dict(net.named_parameters())
    for key in sorted(own.keys() ^ tensors.keys()):
        raise RefusedError(
            f"{weights}: tensor {key.removeprefix('inner.')} is {'missing' if key in own else 'unknown to the network'}"
        )
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            found, wanted = tuple(tensors[key].shape), tuple(value.shape)
            raise RefusedError(f"{weights}: tensor {key.removeprefix('inner.')} has shape {found}, expected {wanted}")
    info: dict[str, Any] = {"format": "diffusers", "licence": _licence(folder), "label_dropout": bool(null)}
    vae = folder / "vae" / CONFIG
    if vae.is_file():
        std = round(sigma_data / _json(vae).get("scaling_factor", 1.0), 6)  # x0 = scaling_factor · latent
        each = arguments["in_channels"]
        info["latents"] = {"vae": None, "images": [-1.0, 1.0], "mean": [0.0] * each, "std": [std] * each}
    return Teacher(tensors, description, info)


def _part(folder: Path, name: str, places: tuple[str, ...], remedy: str) -> Path:
    for place in places:
        if (folder / place / name).is_file():
            return folder / place / name
    raise FileNotFoundError(f"{folder / places[0] / name} is missing: {remedy}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: it says what network the weights are of") from None
    except ValueError as error:
        raise RefusedError(f"{path} is no JSON ({error}): get it again") from error
    if not isinstance(value, dict):
        raise RefusedError(f"{path}: expected keys with values")
    return value


def _licence(folder: Path) -> str:
    """What the folder's model card says."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(
        r"^license:\s*([\w.-]+)\s*$", text.split("---")[1] if text.startswith("---") else "", re.MULTILINE
    )
    return found[1] if found else "not stated in the folder: see where it is from"
