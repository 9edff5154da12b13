# SPDX-License-Identifier: Apache-2.0
"""Published weights files: where they come from, which bytes are the right ones, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scm_core.published import (
    DINOV2,
    INCEPTION,
    WEIGHTS,
    Opener,
    VerifiedFile,
    find_published,
    open_url,
    replace_by,
    verified,
)

__all__ = ["DINOV2", "INCEPTION", "WEIGHTS", "fill", "find_weights", "load_tensors"]


def find_weights(
    name: str, path: str | Path | None = None, sha256: str | None = None, opener: Opener = open_url
) -> VerifiedFile:
    """Return the weights file of extractor `name`, verified: `path`, else as `find_published`.

    A known extractor's file must have the published SHA-256. `sha256` replaces that for a file of the user's own, at
    `path`; of an extractor that is not known every file is taken, unless `sha256` is given. Raises `FileNotFoundError`
    for a file that is neither there nor to be fetched and `ValueError` for one with another digest.
    """
    known = WEIGHTS.get(name)
    if sha256 is not None and (path is None or not re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise ValueError(f"sha256={sha256!r}: must be the 64 hex digits of the weights file that weights_path names")
    expected = sha256.lower() if sha256 is not None else known.sha256 if known is not None else None
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: extractor {name} needs its weights there")
        remedy = "give the right file or the right sha256" if known is None or sha256 is not None else replace_by(known)
        return verified(path, expected, f"extractor {name}", remedy)
    if known is None:
        raise ValueError(f"extractor {name} needs a weights file: none is published for it")
    return find_published(known, f"extractor {name}", opener)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the named tensors in a .safetensors file, or in a .pth file that holds nothing else; `ValueError` for others.

    A .pth file is a pickle: torch's restricted unpickler reads it, which builds tensors and runs no code of the file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): get it again") from error
    except Exception as error:  # torch raises a different type for each way a file can be wrong
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is no tensors-only weights file ({reason}): get it again") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(
            f"{path} is no tensors-only weights file: it must hold a dictionary of tensors and nothing else"
        )
    return dict(tensors)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Make `tensors`, as float32, the weights of `network` (which may lie on the meta device) without gradients.

    Raises `ValueError` that names what is missing, unexpected or of another shape; `path` is named as their source.
    """
    expected = network.state_dict()
    # How many batches a normalisation has seen: of no effect in eval mode, and absent from files made without torch.
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    other = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    complaints = [
        f"{what} {', '.join(sorted(found)[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"
        for what, found in (
            ("without", expected.keys() - counters - tensors.keys()),
            ("with unexpected", tensors.keys() - expected.keys()),
            ("of other shapes:", other),
        )
        if found
    ]
    if complaints:
        raise ValueError(f"{path} holds weights of another network: {'; '.join(complaints)}")
    converted = dict.fromkeys(counters, torch.tensor(0)) | {
        name: value.float() if value.is_floating_point() else value for name, value in tensors.items()
    }
    nn.Module.load_state_dict(network, converted, assign=True)
    network.requires_grad_(False)
