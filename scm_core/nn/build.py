# SPDX-License-Identifier: Apache-2.0
"""Networks from a description, and model files: one safetensors file that holds the weights and the description."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scm_core.autoencoder_kl import AutoencoderKL
from scm_core.described import load_described, save_described
from scm_core.nn.mlp import MLP
from scm_core.nn.small import SmallNet
from scm_core.nn.unet_ddpmpp import DDPMPP
from scm_core.nn.unet_edm2 import EDM2UNet
from scm_core.vae import VAE

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "small": SmallNet,
    "edm2": EDM2UNet,
    "ddpmpp": DDPMPP,
    "mlp": MLP,
    "vae": VAE,
    "autoencoder_kl": AutoencoderKL,
}
FORMAT = "scm-model-1"
STUDENTS_OWN = {
    "dropout_resolution",
    "checkpointing",
    "precision",
}  # arguments that do not change what a network computes


class Model(NamedTuple):
    """A network in evaluation mode, what `build_network` makes it from, and facts about its training."""

    net: nn.Module
    config: dict[str, Any]
    info: dict[str, Any]


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """The network that `config` describes: its `architecture` and that class's arguments.

    Convolution weights are kept in channels-last order, which the CPU's and the GPU's kernels prefer. Raises ValueError for an unknown
    architecture or arguments it does not take.
    """
    arguments = dict(config)
    architecture = arguments.pop("architecture", None)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    network = ARCHITECTURES[architecture]
    try:
        inspect.signature(network).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"architecture {architecture}: {error}") from None
    return network(**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def student_of(
    teacher: Model, guidance_input: bool, dropout: float, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A student that starts equal to its teacher, and its description: the same network, with a zero-initialised guidance input if asked
    for, and its own dropout.

    `options` are further arguments of the architecture that do not change its function: some of `STUDENTS_OWN`.
    Raises ValueError for others, for those that the architecture does not take, and where the weights do not fit.
    """
    if others := sorted(options.keys() - STUDENTS_OWN):
        raise ValueError(
            f"{others[0]}: expected one of {', '.join(sorted(STUDENTS_OWN))}: a student has its teacher's architecture in all else, "
            f"got {options[others[0]]!r}"
        )
    config = {**teacher.config, "guidance_input": guidance_input, "dropout": dropout, **options}
    net = build_network(config)
    result = net.load_state_dict(teacher.net.state_dict(), strict=False)
    unknown = [key for key in result.missing_keys if "guidance" not in key] + list(result.unexpected_keys)
    if unknown:
        raise ValueError(f"student: {unknown[0]} is not in both networks; the teacher is of another architecture")
    return net, config


def count_parameters(net: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in net.parameters())


def save_model(
    path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], info: Mapping[str, Any] | None = None
) -> None:
    """Write weights (by parameter name), description and facts about them to one safetensors file."""
    save_described(path, weights, FORMAT, config, info)


def load_model(path: Path) -> Model:
    """The model in a file of `save_model`, without gradients.

    FileNotFoundError or ValueError with the file's name if it is missing, damaged, or of a network that is not known here.
    """
    tensors, config, info = load_described(path, FORMAT)
    try:
        net = build_network(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; make it again") from error
    own = dict(net.named_parameters())
    for key in sorted(own.keys() ^ tensors.keys()):
        raise ValueError(
            f"{path}: tensor {key!r} is {'missing' if key in own else 'unknown to the network'}; make it again"
        )
    for key, parameter in own.items():
        if parameter.shape != tensors[key].shape:
            raise ValueError(
                f"{path}: tensor {key!r} has shape {tuple(tensors[key].shape)}, expected {tuple(parameter.shape)}; make it again"
            )
        parameter.data.copy_(tensors[key])
    return Model(net.eval().requires_grad_(False), config, info)
