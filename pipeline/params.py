# SPDX-License-Identifier: Apache-2.0
"""Read params.yaml into validated models, and say in one sentence what is wrong with it.

`load()` is the only way in. The models are in `pipeline.models` and re-exported here. The file is read as YAML 1.2
(what DVC reads it as, too): `1e-3` is a number and `no` is a word. Sections may be named with `&` and laid below others with `<<: *name`,
which is not of YAML 1.2 but which DVC and editors read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.autoencoders import PretrainedVae, Vae
from pipeline.datasets import Dataset
from pipeline.errors import ParamsError, suggestion
from pipeline.figures import Figure2
from pipeline.models import Params, Scale, Size, Slot
from pipeline.networks import Network, SmallNetwork
from pipeline.reading import quoted, read_yaml, sentence
from pipeline.sections import (
    BasicTraining,
    Decay,
    Engine,
    Evaluation,
    Features,
    InverseSqrtDecay,
    LinearDecay,
    TeacherSampling,
    TeacherTraining,
    Training,
)
from pipeline.students import StudentTraining

__all__ = [
    "BasicTraining",
    "Dataset",
    "Decay",
    "Engine",
    "Evaluation",
    "Features",
    "Figure2",
    "InverseSqrtDecay",
    "LinearDecay",
    "Network",
    "Params",
    "ParamsError",
    "PretrainedVae",
    "Scale",
    "Size",
    "Slot",
    "SmallNetwork",
    "StudentTraining",
    "TeacherSampling",
    "TeacherTraining",
    "Training",
    "Vae",
    "load",
    "read_yaml",
    "schema",
    "validate",
]

PARAMS_FILE = "params.yaml"


def load(path: str | Path = PARAMS_FILE, scale: str | None = None) -> Params:
    """The validated parameters of a file, all scales of it, with `scale` (default: the file's own) active.

    Raises `ParamsError` with a one-sentence message that starts with the file's name and the dotted key.
    """
    path = Path(path)
    params = validate(read_yaml(path), path.name)
    return params if scale is None else params.with_scale(scale)


def validate(data: Mapping[str, Any], name: str = PARAMS_FILE) -> Params:
    """What was read from a file of that name as validated parameters; `ParamsError` with the first fault."""
    try:
        params = Params.model_validate(data)
    except ValidationError as error:
        raise ParamsError(f"{name}: {sentence(error, data)}") from None
    if params.scale not in params.scales:
        end = suggestion(params.scale, params.scales, "scales")
        raise ParamsError(f"{name}: scale: unknown scale {quoted(params.scale)}; {end}")
    return params


def _student_schema(size: dict[str, Any]) -> dict[str, Any]:
    """The schema of a student within that of a size, which maps names to students."""
    return next(iter(size["properties"]["students"]["patternProperties"].values()))


def schema() -> dict[str, Any]:
    """The JSON schema of params.yaml, for editors; in it a size's overrides need not be complete."""
    result = Params.model_json_schema()
    definitions = result["$defs"]
    students = [reference["$ref"].rpartition("/")[2] for reference in _student_schema(definitions["Size"])["oneOf"]]
    for name in ("TeacherTraining", *students):
        partial = {key: value for key, value in definitions[name].items() if key != "required"}
        definitions[f"{name}Override"] = {**partial, "title": f"{name}Override"}
    definitions["Size"]["properties"]["teacher"]["$ref"] += "Override"
    overrides = _student_schema(definitions["Size"])
    overrides.clear()  # without the key `method` more than one may fit
    overrides["anyOf"] = [{"$ref": f"#/$defs/{name}Override"} for name in students]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result, "title": "params.yaml"}
