# SPDX-License-Identifier: Apache-2.0
"""Networks of other projects as teachers: found, verified, read, compared with what they are to be used for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scm_core.interop.edm import read_edm
from scm_core.interop.edm2 import read_edm2
from scm_core.interop.rebuild import RefusedError
from scm_core.interop.stored import Teacher, open_network
from scm_core.nn.build import Model, build_network
from scm_core.published import WEIGHTS_HOME, verified

READERS: Mapping[str, Callable[[Path], Teacher]] = {"edm": read_edm, "edm2": read_edm2}
SOURCES = {  # what their projects say of them
    "edm": "EDM (Karras et al. 2022), https://github.com/NVlabs/edm: all of it, pre-trained models included, under CC BY-NC-SA 4.0",
    "edm2": "EDM2 (Karras et al. 2024), https://github.com/NVlabs/edm2: all of it, pre-trained models included, under CC BY-NC-SA 4.0",
}
FREE = {
    "checkpointing",
    "precision",
    "dropout",
    "dropout_resolution",
    "fourier_scale",
}  # what a file does not say and does not depend on


def locate(file: str | Path, root: Path | None = None) -> Path:
    """Where a network's file lies: at the path (relative ones from `root`), or of that name in the folder of weights (SCM_WEIGHTS).

    `FileNotFoundError` with both places if it is in neither.
    """
    path = Path(file).expanduser()
    places = [(root or Path()) / path, WEIGHTS_HOME.folder / path]
    for place in places:
        if place.exists():
            return place
    where = " or ".join(map(str, dict.fromkeys(places)))
    raise FileNotFoundError(
        f"{file} is missing: put it at {where} ({WEIGHTS_HOME.variable} names the folder of weights)"
    )


def kind_of(path: Path) -> str:
    """The format of a network: of a pickle by the class of its network."""
    net, _ = open_network(path, ["Precond", "EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
    return "edm2" if net.module.kind == "Precond" else "edm"


def read_teacher(path: Path, kind: str, sha256: str | None = None) -> Teacher:
    """Return the network in a file of format `kind`, which must have the SHA-256 if one is given; its info names file, digest and licence.

    Raises `FileNotFoundError`, or `ValueError` that names the file, for other bytes than that digest's and for what cannot be imported.
    """
    if kind not in READERS:
        raise ValueError(f"format: expected one of {', '.join(READERS)}, got {kind!r}")
    found = verified(path, sha256, "this teacher", "give the right file, or the right sha256")
    teacher = READERS[kind](path)
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
