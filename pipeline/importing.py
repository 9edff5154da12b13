# SPDX-License-Identifier: Apache-2.0
"""Published networks as teachers: `python -m pipeline import FILE`, and what stage teacher does where a size says `imported`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import paths
from pipeline.cli import Parser
from pipeline.errors import PipelineError, suggestion
from pipeline.imported import Imported
from pipeline.params import PARAMS_FILE, PretrainedVae, Slot, load

if TYPE_CHECKING:
    from scm_core.interop import Teacher

DATA = {  # which key of params.yaml says what an argument of the network is
    "channels": "the channels of its items (dataset.channels, or the VAE's latent_channels)",
    "resolution": "the side of its items (dataset.resolution over the VAE's downsampling)",
    "labels": "dataset.labels",
    "sigma_data": "sigma_data",
}


def main(argv: list[str]) -> int:
    """Say what a network is, whether it fits a slot, what to put into params.yaml; write it as a model file if asked to."""
    parser = Parser(
        prog="python -m pipeline import",
        description="Import a published network (EDM, EDM2, diffusers) as a teacher; nothing of a pickle is run.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a network pickle, or a folder of diffusers: a path, or a name in the folder of weights",
    )
    parser.add_argument("--format", choices=("edm", "edm2", "diffusers"), help="default: as the file says")
    parser.add_argument("--slot", help="compare it with what this slot of params.yaml has, at --size")
    parser.add_argument("--size", help="of the slot")
    parser.add_argument("--scale", help="of params.yaml (default: the active one)")
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="write model.safetensors there, as stage teacher would"
    )
    options = parser.parse_args(argv)
    if (options.slot is None) != (options.size is None):
        raise PipelineError("--slot and --size go together: give both or neither")
    slot = _slot(options.scale, options.slot, options.size) if options.slot is not None else None
    teacher, path, kind = _read(options.file, options.format, slot.sigma_data if slot else 0.5)
    print(described(teacher, path, options.file, kind))
    if slot is not None:
        if wrong := fault(teacher, slot, options.size):
            raise PipelineError(f"{path.name}: {wrong}")
        print(f"\nfits size {options.size} of slot {options.slot}")
    if options.output is not None:
        print(f"\nwrote {write(teacher, Path(options.output), {}, {})}")
    return 0


def _read(file: str, kind: str | None, sigma_data: float) -> tuple[Teacher, Path, str]:
    from scm_core.interop.teachers import kind_of, read_teacher
    from scm_core.published import locate

    try:
        path = locate(file)
        kind = kind or kind_of(path)
        return read_teacher(path, kind, None, sigma_data), path, kind
    except (FileNotFoundError, ValueError) as error:
        raise PipelineError(str(error)) from error


def _slot(scale: str | None, name: str, size: str) -> Slot:
    params = load(paths.root() / PARAMS_FILE, scale)
    if name not in params.active.slots:
        raise PipelineError(f"{name}: unknown slot; {suggestion(name, params.active.slots, 'slots')}")
    slot = params.active.slots[name]
    if size not in slot.sizes:
        raise PipelineError(f"{size}: unknown size; {suggestion(size, slot.sizes, 'sizes')}")
    return slot


def described(teacher: Teacher, path: Path, file: str, kind: str) -> str:
    """What was found, its licence, and the lines for params.yaml."""
    config, info = teacher.config, teacher.info
    count = sum(value.numel() for value in teacher.weights.values())
    items = f"{config['channels']} × {config['resolution']} × {config['resolution']}"
    labels = f"{config['labels']} labels" if config["labels"] else "no labels"
    network = _network(teacher, count)
    imported = {"file": file, "sha256": info["sha256"], "format": kind}
    lines = [
        f"{path}: {count:,} weights for items of {items}, {labels}, sigma_data {config['sigma_data']:g}",
        f"from {info['source']}",
        f"licence: {info['licence']}. What is trained from these weights is a derivative of them: the licence goes into the model file and "
        "into the model card of every student",
    ]
    if latents := info.get("latents"):
        lines.append(f"for latents of {latents['vae'] or 'the VAE beside it'}, of images in {latents['images']}")
    lines += [
        "",
        "for params.yaml, under sizes.<size>:",
        *_yaml({"imported": imported, "network": network, "teacher": {"label_dropout": 0.0}}),
    ]
    if latents:
        wanted = {"pretrained": latents["vae"] or "…", "unit_images": latents["images"] == [0.0, 1.0]}
        statistics = {"mean": latents["mean"], "std": latents["std"]}
        lines += ["and for its latents, in the slot:", *_yaml({"vae": {**wanted, "statistics": statistics}})]
    return "\n".join(lines)


def _network(teacher: Teacher, count: int) -> dict[str, Any]:
    """The section `network` that the file fits."""
    config = teacher.config
    if config["architecture"] == "diffusers":
        return {"architecture": "diffusers", "forward_flops": _flops(teacher), "parameters": count}
    own = {key: value for key, value in config.items() if key not in {*DATA, "waves"}}
    return own | {"checkpointing": False, "precision": "fp32"}


def _flops(teacher: Teacher) -> int:
    """Of one forward pass of one item."""
    import torch

    from scm_core.interop.teachers import assembled
    from scm_core.train.flops import count_flops

    net = assembled(teacher).net
    shape = [teacher.config[key] for key in ("channels", "resolution", "resolution")]
    labels = torch.zeros(1, dtype=torch.int64) if teacher.config["labels"] else None
    with torch.no_grad():
        return int(count_flops(lambda: net(torch.randn(1, *shape), torch.ones(1), labels)))


def _yaml(section: dict[str, Any]) -> list[str]:
    """A section on lines of its own, each value in YAML's short form."""
    return [f"  {key}: {_flow(value)}" for key, value in section.items()]


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def fault(teacher: Teacher, slot: Slot, size: str) -> str | None:
    """Why the network cannot be the teacher of a size of the slot, in a sentence, or None."""
    from scm_core.interop.teachers import misfit

    network, items = slot.sizes[size].network, slot.items
    wanted = {**network.config(slot.sigma_data), **items._asdict()}
    if wrong := misfit(teacher, wanted):
        key, found, expected = wrong
        where = DATA.get(key, f"sizes.{size}.network.{key}")
        return f"its {key} is {found}, and {where} is {expected}: import another network, or change params.yaml"
    if teacher.info.get("label_dropout") is False and slot.teacher_for(size).label_dropout > 0:
        what = "it was trained without dropping labels, so that it cannot be guided"
        return f"{what}: set label_dropout of the teacher of size {size} to 0"
    return _latents_fault(teacher.info.get("latents"), slot)


def _latents_fault(latents: dict[str, Any] | None, slot: Slot) -> str | None:
    """Whether latents of the slot are those that the network was trained on."""
    if latents is None:
        return None
    vae = slot.vae
    if not isinstance(vae, PretrainedVae) or latents["vae"] not in (None, vae.pretrained):
        return f"it is for latents of {latents['vae'] or 'a published autoencoder'}: name it in vae.pretrained, or import another network"
    if vae.unit_images != (latents["images"] == [0.0, 1.0]):
        return f"it is for latents of images in {latents['images']}: set vae.unit_images to {str(not vae.unit_images).lower()}"
    for key in ("mean", "std"):
        given = None if vae.statistics == "measured" else getattr(vae.statistics, key)
        if given is None or any(abs(a - b) > 1e-3 * abs(b) + 1e-3 for a, b in zip(given, latents[key], strict=True)):
            what = f"it is for latents with the channels' {key} {latents[key]}"
            return f"{what}: give them in vae.statistics, instead of {'measured' if given is None else list(given)}"
    return None


def import_teacher(name: str, slot: Slot, size: str, imported: Imported) -> Teacher:
    """The network that a size says is its teacher; `PipelineError` with the job's `name` if it is missing, damaged, or another one."""
    from scm_core.interop.teachers import read_teacher
    from scm_core.published import locate

    try:
        teacher = read_teacher(locate(imported.file, paths.root()), imported.format, imported.sha256, slot.sigma_data)
    except (FileNotFoundError, ValueError) as error:
        raise PipelineError(f"{name}: {error}") from error
    if wrong := fault(teacher, slot, size):
        raise PipelineError(f"{name}: {imported.file}: {wrong}")
    return teacher


def write(teacher: Teacher, folder: Path, options: dict[str, Any], facts: dict[str, Any]) -> Path:
    """The model file of an imported network in `folder`, which may be new."""
    from pipeline.modelling import MODEL
    from scm_core.interop.teachers import assembled
    from scm_core.nn.build import save_model

    model = assembled(teacher, options)
    folder.mkdir(parents=True, exist_ok=True)
    about = {key: value for key, value in model.info.items() if key != "licence"}
    save_model(
        folder / MODEL,
        dict(model.net.named_parameters()),
        model.config,
        {**facts, "licence": model.info["licence"], "imported": about},
    )
    return folder / MODEL
