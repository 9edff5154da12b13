# SPDX-License-Identifier: Apache-2.0
"""Makes `import torchvision` work beside a torch build that cannot load torchvision's own operators."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # a Library undoes its definitions when it is collected


def prepare_torchvision() -> bool:
    """Define the schemas torchvision's import asks for if its binary operators cannot load; call before importing it.

    PyPI's torchvision is built for CUDA; next to the CPU build of torch its library does not load and the import fails
    with "operator torchvision::nms does not exist". With the two schemas defined it imports, without those operators,
    which no feature extractor uses. Returns whether the remedy was applied; raises `ImportError` without torchvision.
    """
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed: torch-fidelity needs it (pip install torchvision)")
    if _operators_load(Path(spec.origin).parent):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not _defined(name):
            library.define(schema)
    _library = library
    return True


def _operators_load(package: Path) -> bool:
    """Load torchvision's operators as its own import will (loading twice is harmless) and say whether they are there."""
    for path in sorted(package.glob("_C*")):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
    return all(_defined(name) for name in _SCHEMAS)


def _defined(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)
