# SPDX-License-Identifier: Apache-2.0
"""The model card of an exported model: what it is, how it was measured, where it comes from, under which licence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import manifest, paths
from pipeline.files import read_json
from pipeline.job import Job
from pipeline.params import Params
from pipeline.registry import jobs
from pipeline.trace import commits, manifests

TAGS = {"CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0"}  # the names that model hubs have for licences
CITATION = """@inproceedings{lu2025simplifying,
  title = {Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models},
  author = {Cheng Lu and Yang Song},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  note = {arXiv:2410.11081},
}"""
CITATIONS = {  # of what a model was imported from
    "edm": """@inproceedings{Karras2022edm,
  author = {Tero Karras and Miika Aittala and Timo Aila and Samuli Laine},
  title = {Elucidating the Design Space of Diffusion-Based Generative Models},
  booktitle = {Proc. NeurIPS},
  year = {2022},
}""",
    "edm2": """@inproceedings{Karras2024edm2,
  title = {Analyzing and Improving the Training Dynamics of Diffusion Models},
  author = {Tero Karras and Miika Aittala and Jaakko Lehtinen and Janne Hellsten and Timo Aila and Samuli Laine},
  booktitle = {Proc. CVPR},
  year = {2024},
}""",
}


@dataclass(frozen=True)
class Subject:
    """The model that a card is about, with the manifest of its run, and the command that exports it."""

    job: Job
    params: Params
    made: Mapping[str, Any]
    info: Mapping[str, Any]
    parameters: int
    form: str
    """safetensors or diffusers."""


def card(subject: Subject) -> str:
    """README.md: front matter, use, results, settings, lineage, licence, citation."""
    job, slot = subject.job, subject.params.active.slots[subject.job.axes["slot"]]
    method = job.axes.get("method", "teacher")
    side = slot.dataset.resolution
    kind = (
        "A diffusion model (TrigFlow)"
        if job.stage == "teacher"
        else f"A consistency model ({subject.info.get('method', method)})"
    )
    parts = [
        _front(subject),
        f"# {method} of size {job.axes['size']}, {slot.dataset.source} {side} × {side}",
        f"{kind} of {subject.parameters:,} parameters, made by a reproduction of *Simplifying, Stabilizing and Scaling Continuous-Time "
        "Consistency Models* (Lu & Song, arXiv 2410.11081).",
        "## Use\n\n" + _use(subject),
        "## Results\n\n" + _results(subject),
        "## Settings\n\n```json\n" + json.dumps(subject.made["params"], indent=1, sort_keys=True) + "\n```",
        "## Lineage\n\n" + "\n".join(_lineage(str(subject.made["run"]))),
        "## Licence\n\n" + _licence(subject),
        "## Citation\n\n```bibtex\n" + "\n".join(_citations(subject)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front(subject: Subject) -> str:
    stated = str(subject.info.get("licence", "other"))
    licence = TAGS.get(stated, stated if re.fullmatch(r"[a-z0-9.-]+", stated) else "other")
    lines = [
        "---",
        f"license: {licence}",
        "tags: [consistency-model, scm, trigflow]",
        "pipeline_tag: unconditional-image-generation",
    ]
    if licence == "other":
        lines.append("license_name: not-stated")
    return "\n".join([*lines, *(["library_name: diffusers"] if subject.form == "diffusers" else []), "---"])


def _use(subject: Subject) -> str:
    if subject.form == "safetensors":
        return (
            "`model.safetensors` holds the weights by parameter name, and in its header (as `config.json` beside it) the network's "
            'description:\n\n```python\nfrom scm_core.nn.build import load_model\n\nnet = load_model("model.safetensors").net\n```'
        )
    slot = subject.params.active.slots[subject.job.axes["slot"]]
    arguments = ["labels=[0, 1, 2]" if slot.dataset.labels else "num_images=3"]
    student = slot.student_for(subject.job.axes["size"], subject.job.axes["method"])
    if student.guidance is not None:
        arguments.append("guidance_scale=1.5")
    return (
        "Needs torch and diffusers; the folder brings the network's code, which `trust_remote_code` allows to run.\n\n```python\n"
        'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("…", trust_remote_code=True)\n'
        f"images = pipe({', '.join(arguments)}, num_inference_steps={max(student.steps)}).images\n```"
    )


def _results(subject: Subject) -> str:
    """The numbers of the model's evaluation, if it is there."""
    axes = {
        "slot": subject.job.axes["slot"],
        "size": subject.job.axes["size"],
        "method": subject.job.axes.get("method", "teacher"),
    }
    for job in jobs(subject.params):
        if job.stage == "evaluate" and dict(job.axes) == axes:
            facts = read_json(paths.root() / job.outputs[0] / paths.FACTS)
            if facts is None or facts.get("model_run") != subject.made["run"]:
                return f"Not measured; `{job.command}` would."
            return _table(facts)
    return "Not measured."


def _table(facts: Mapping[str, Any]) -> str:
    names = sorted({name for values in facts["reported"].values() for name in values})
    lines = ["| steps | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for steps, values in facts["reported"].items():
        lines.append(
            f"| {steps} | " + " | ".join(f"{values[name]:.4g}" if name in values else "" for name in names) + " |"
        )
    features = (
        ", ".join(f"{space}: {about}" for space, about in facts["features"].items())
        if isinstance(facts.get("features"), dict)
        else ""
    )
    lines += [
        "",
        f"Run {facts['run']}, against {facts['reference_images']} images of {facts['dataset']}. Features: {features or 'see the run'}.",
    ]
    return "\n".join(lines)


def _lineage(run: str, depth: int = 0, name: str = "", made: Mapping[str, Any] | None = None) -> Iterator[str]:
    """The runs behind a run, each with its commits and the SHA-256 of its manifest."""
    made = manifests() if made is None else made
    indent = "  " * depth
    if run not in made:
        yield f"{indent}- {name}{': ' if name else ''}{run} (no longer in runs/)"
        return
    job, entry = made[run]
    record = read_json(paths.record_file(job)) or {}
    commit = commits(record) if record.get("run") == run else ""
    digest = manifest.digest(manifest.path_of(job))[:16]
    yield f"{indent}- {name}{': ' if name else ''}{run}, commit {commit or 'not recorded'}, manifest SHA-256 {digest}"
    for key, source in entry["inputs"].items():
        if source["run"] is not None:
            yield from _lineage(source["run"], depth + 1, key, made)


def _licence(subject: Subject) -> str:
    code = "The code that makes and runs it is under Apache-2.0."
    imported, licence = subject.info.get("imported"), subject.info.get("licence")
    if not licence:
        return f"Of these weights none is stated here: they were trained from scratch, and the terms of the data set apply. {code}"
    origin = f" ({imported['source']}; file {imported['file']}, SHA-256 {imported['sha256']})" if imported else ""
    return f"**{licence}**: these weights descend from published ones under it{origin}, and are a derivative of them. {code}"


def _citations(subject: Subject) -> list[str]:
    imported = subject.info.get("imported") or {}
    origin = CITATIONS.get(str(imported.get("format")))
    return [CITATION, *([origin] if origin else [])]
