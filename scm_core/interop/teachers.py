# SPDX-License-Identifier: Apache-2.0
"""Networks of other projects as teachers: found, verified, read, compared with what they are to be used for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scm_core.interop.edm import read_edm
from scm_core.interop.edm2 import read_edm2
from scm_core.interop.foreign import read_diffusers, weights_of
from scm_core.interop.rebuild import RefusedError
from scm_core.interop.stored import Teacher, open_network
from scm_core.nn.build import Model, build_network
from scm_core.published import verified

READERS: Mapping[str, Callable[[Path, float], Teacher]] = {  # σ_d is the networks' own, but for diffusers'
    "edm": lambda path, _: read_edm(path),
    "edm2": lambda path, _: read_edm2(path),
    "diffusers": read_diffusers,
}
SOURCES = {  # what their projects say of them
    "edm": "EDM (Karras et al. 2022), https://github.com/NVlabs/edm: all of it, pre-trained models included, under CC BY-NC-SA 4.0",
    "edm2": "EDM2 (Karras et al. 2024), https://github.com/NVlabs/edm2: all of it, pre-trained models included, under CC BY-NC-SA 4.0",
    "diffusers": "a folder that diffusers saved",
}
FREE = {
    "checkpointing",
    "precision",
    "dropout",
    "dropout_resolution",
    "fourier_scale",
}  # what a file does not say and does not depend on


def kind_of(path: Path) -> str:
    """The format of a network: of a folder diffusers', of a pickle by the class of its network."""
    if path.is_dir():
        return "diffusers"
    net, _ = open_network(path, ["Precond", "EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
    return "edm2" if net.module.kind == "Precond" else "edm"


def read_teacher(path: Path, kind: str, sha256: str | None = None, sigma_data: float = 0.5) -> Teacher:
    """Return the network in a file of format `kind`, which must have the SHA-256 if one is given; its info names file, digest and licence.

    `sigma_data` is that of the data that a network of diffusers is used on; the others have their own.

    Raises `FileNotFoundError`, or `ValueError` that names the file, for other bytes than that digest's and for what cannot be imported.
    """
    if kind not in READERS:
        raise ValueError(f"format: expected one of {', '.join(READERS)}, got {kind!r}")
    weights = weights_of(path) if kind == "diffusers" else path
    found = verified(weights, sha256, "this teacher", "give the right file, or the right sha256")
    teacher = READERS[kind](path, sigma_data)
    about = {"file": path.name, "sha256": found.sha256, "source": SOURCES[kind]}
    return teacher._replace(info={**teacher.info, **about})


def misfit(teacher: Teacher, wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first argument of the network that is not as `wanted`: its name, the file's value, the wanted one."""
    for key, value in wanted.items():
        found = teacher.config.get(key)
        if key not in FREE and found != (list(value) if isinstance(value, tuple) else value):
            return key, found, value
    return None


def assembled(teacher: Teacher, options: Mapping[str, Any] | None = None) -> Model:
    """The network with the imported weights, in evaluation mode; `options` (precision, checkpointing) change nothing of its function.

    `ValueError` for weights that are not exactly those of the network.
    """
    config = {**teacher.config, **(options or {})}
    net = build_network(config)
    own = dict(net.named_parameters())
    for key in sorted(own.keys() ^ teacher.weights.keys()):
        raise RefusedError(f"tensor {key} is {'missing' if key in own else 'unknown to the network'}")
    net.load_state_dict(teacher.weights, strict=False)
    return Model(net.eval().requires_grad_(False), config, teacher.info)
