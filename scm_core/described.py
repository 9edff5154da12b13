# SPDX-License-Identifier: Apache-2.0
"""Files that describe themselves: tensors in safetensors, with format, configuration and facts in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor


class Described(NamedTuple):
    """The contents of a file of `save_described`."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    info: dict[str, Any]


def save_described(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind: str,
    config: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors with `kind`, `config` and `info` (JSON values): the same bytes for the same contents."""
    save_file(_plain(tensors), str(path), metadata=_metadata(kind, config, info))


def described_bytes(
    tensors: Mapping[str, Tensor], kind: str, config: Mapping[str, Any], info: Mapping[str, Any] | None = None
) -> bytes:
    """What `save_described` would write, for callers that write it themselves."""
    return save(_plain(tensors), metadata=_metadata(kind, config, info))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def _metadata(kind: str, config: Mapping[str, Any], info: Mapping[str, Any] | None) -> dict[str, str]:
    # One entry only: safetensors writes several in an order that changes from run to run.
    header = {"format": kind, "config": dict(config), "info": dict(info or {})}
    return {"scm": json.dumps(header, sort_keys=True)}


def load_described(path: Path, kind: str) -> Described:
    """The contents of a file of that kind; FileNotFoundError or ValueError with its name if it is missing or damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage that makes it")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("scm", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error}); make it again") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its description is no JSON ({error}); make it again") from error
    if not isinstance(header, dict) or header.get("format") != kind:
        raise ValueError(f"{path}: not a file of format {kind}; make it again")
    for key in ("config", "info"):
        if not isinstance(header.get(key), dict):
            raise ValueError(f"{path}: its description has no section {key!r}; make it again")
    return Described(tensors, header["config"], header["info"])
