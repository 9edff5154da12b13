# SPDX-License-Identifier: Apache-2.0
"""Students for others: one safetensors file with its description, or a folder that plain diffusers loads as a pipeline.

No class of diffusers is our network, so the folder carries its code: the very modules of this project that the network needs, with their
imports of each other made relative, and the three short files of `interop.exported`. It needs torch and diffusers, not this project.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import scm_core
from scm_core.autoencoder_kl import ARCHITECTURE, SHARED
from scm_core.nn.build import ARCHITECTURES, Model

ROOT = Path(scm_core.__file__).parent
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
IMPORT = re.compile(r"^(\s*)from scm_core((?:\.\w+)*) import (\w+)", re.MULTILINE)
CARRIED = ("small", "edm2", "ddpmpp")  # architectures that an exported folder can carry


@dataclass(frozen=True)
class Sampling:
    """How a student is sampled: σ_d and the times (radians) of its steps, or its number of segments from the first of them."""

    sigma_data: float
    times: Sequence[float]
    segments: int = 0


@dataclass(frozen=True)
class Latents:
    """The autoencoder of a latent model, and the channels' scaling: latent = x0 · std/σ_d + mean."""

    vae: Model
    mean: Sequence[float]
    std: Sequence[float]


def export_diffusers(model: Model, sampling: Sampling, latents: Latents | None, folder: Path) -> None:
    """Write the folder of a pipeline: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

    Raises `ValueError` for an architecture that the folder cannot carry.
    """
    architecture = model.config["architecture"]
    if architecture not in CARRIED:
        raise ValueError(
            f"architecture {architecture}: a diffusers pipeline can carry {', '.join(CARRIED)}; use --format safetensors"
        )
    version = importlib.metadata.version("diffusers")
    scaling = {"latent_mean": list(latents.mean), "latent_std": list(latents.std)} if latents else {}
    about = {
        "sigma_data": sampling.sigma_data, "times": list(sampling.times), "segments": sampling.segments,
        "arguments": _arguments(model.config), **scaling,
    }  # fmt: skip
    tensors = {f"network.{name}": value for name, value in model.net.named_parameters()}
    _component(folder / "net", "SCMNetwork", about, tensors, version)
    code = _code(folder / "net", "network", ARCHITECTURES[architecture])
    pipeline = exported("pipeline")
    name = f"scm_pipeline_{_digest(pipeline)}"
    (folder / f"{name}.py").write_text(pipeline, encoding="utf-8")
    index: dict[str, Any] = {
        "_class_name": [name, "SCMPipeline"],
        "_diffusers_version": version,
        "net": [code, "SCMNetwork"],
        "scheduler": ["diffusers", "SCMScheduler"],
        "vae": [None, None],
    }
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "SCMScheduler",
        "_diffusers_version": version,
        "num_train_timesteps": 1000,
        "prediction_type": "trigflow",
        "sigma_data": sampling.sigma_data,
    }
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if latents is not None:
        index |= _autoencoder(folder / "vae", latents.vae, version)
    _write_json(folder / "model_index.json", index)


def export_safetensors(file: Path, model: Model, folder: Path) -> None:
    """Write model.safetensors (tensors by parameter name, the description in its header) and config.json (the description alone)."""
    shutil.copyfile(file, folder / "model.safetensors")
    _write_json(folder / CONFIG, {"config": model.config, "info": model.info})


def _autoencoder(folder: Path, vae: Model, version: str) -> dict[str, Any]:
    """The autoencoder as a component, of diffusers' own class where it is one, else the demo's with its code; its entries of the index."""
    tensors = dict(vae.net.named_parameters())
    if vae.config["architecture"] == ARCHITECTURE:
        arguments = {name: vae.config[name] for name in SHARED if name in vae.config}
        plain = {name.removeprefix("network."): value for name, value in tensors.items()}
        _component(folder, "AutoencoderKL", arguments, plain, version)
        return {"vae": ["diffusers", "AutoencoderKL"], "unit_images": bool(vae.config.get("unit_images"))}
    own = {f"network.{name}": value for name, value in tensors.items()}
    _component(folder, "SCMAutoencoder", {"arguments": _arguments(vae.config)}, own, version)
    return {"vae": [_code(folder, "autoencoder", ARCHITECTURES["vae"]), "SCMAutoencoder"]}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "architecture"}


def _component(folder: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], version: str) -> None:
    folder.mkdir(parents=True)
    _write_json(folder / CONFIG, {"_class_name": name, "_diffusers_version": version, **config})
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(plain, str(folder / WEIGHTS), metadata={"format": "pt"})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _code(folder: Path, template: str, network: type) -> str:
    """Write the template's file, with `network` as its Network, and the modules that it needs; return the file's name, without .py.

    diffusers copies such files side by side into one folder of its cache, and only those that the first one names: they carry a digest
    of their contents in their names, so that different exports do not meet there, and the template's file names them all.
    """
    modules, text = closure(network.__module__), exported(template)
    digest = _digest(text, network.__name__, *map(source_of, modules))
    names = {name: f"scm_{digest}_{name.rpartition('.')[2]}" for name in modules}
    if len(set(names.values())) < len(names):
        raise ValueError(f"modules of the same name cannot go into one folder: {', '.join(names)}")
    for name, file in names.items():
        (folder / f"{file}.py").write_text(relative(source_of(name), names), encoding="utf-8")
    line = f"from .{names[network.__module__]} import {network.__name__} as Network\n"
    others = "".join(
        f"from .{file} import __doc__ as _{number}  # noqa: F401  # diffusers copies what is named here\n"
        for number, (name, file) in enumerate(names.items())
        if name != network.__module__
    )
    text, found = re.subn(r"^from scm_core\S+ import \w+ as Network\n", line + others, text, flags=re.MULTILINE)
    assert found == 1, template
    (folder / f"scm_{digest}.py").write_text(text, encoding="utf-8")
    return f"scm_{digest}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:8]


def exported(template: str) -> str:
    """The source of a file of `interop.exported`."""
    return (ROOT / "interop" / "exported" / f"{template}.py").read_text(encoding="utf-8")


def source_of(module: str) -> str:
    """The source of a module of this project."""
    return ROOT.parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def _target(path: str, name: str) -> str:
    """The module that `from scm_core<path> import <name>` is about."""
    module = f"scm_core{path}"
    inner = ROOT.parent.joinpath(*module.split("."), f"{name}.py")
    return f"{module}.{name}" if inner.is_file() else module


def closure(module: str) -> list[str]:
    """A module of this project and all of this project's that it imports, also within functions."""
    found, left = [], [module]
    while left:
        name = left.pop()
        if name not in found:
            found.append(name)
            left += [_target(path, what) for _, path, what in IMPORT.findall(source_of(name).replace("(\n", ""))]
            left += [
                _target(path, "")
                for path in re.findall(r"^\s*from scm_core((?:\.\w+)+) import \(", source_of(name), re.MULTILINE)
            ]
    return sorted(found)


def relative(source: str, names: Mapping[str, str]) -> str:
    """A module's source with imports from this project made relative, to the files `names`."""

    def single(match: re.Match[str]) -> str:
        indent, path, name = match.groups()
        target = _target(path, name)
        if target == f"scm_core{path}.{name}":
            return f"{indent}from . import {names[target]} as {name}"
        return f"{indent}from .{names[target]} import {name}"

    text = IMPORT.sub(single, source)
    return re.sub(
        r"^(\s*)from (scm_core(?:\.\w+)+) import \(",
        lambda m: f"{m[1]}from .{names[m[2]]} import (",
        text,
        flags=re.MULTILINE,
    )
