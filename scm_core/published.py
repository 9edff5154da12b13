# SPDX-License-Identifier: Apache-2.0
"""Published weights files: where they come from, which bytes are the right ones, and where they are kept.

It imports the standard library alone, so that one may ask what is missing without loading torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

INCEPTION = "inception-v3-compat"  # torch-fidelity's name for it
DINOV2 = "scm-dinov2-vit-l-14"
FOLDER_VARIABLE = "SCM_WEIGHTS"


@dataclass(frozen=True)
class WeightsFile:
    """A published file: its name below `weights_folder()`, `urls` that give the same bytes, their SHA-256 and number, its licence."""

    file: str
    urls: tuple[str, ...]
    sha256: str
    size: int
    licence: str


WEIGHTS = {
    # Ported from TensorFlow's inception-2015-12-05.tgz. Both publishers put the first eight digits of the digest into the
    # file's name; all of it stands in snap-research/discoscene (models/inception_model.py) and HyperGAN/HyperGAN
    # (docs/cifar-recipe.md).
    INCEPTION: WeightsFile(
        file="weights-inception-2015-12-05-6726825d.pth",
        urls=(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        ),
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        licence="Apache-2.0",
    ),
    # Its publisher gives no digest. This one stands in projects that know nothing of each other, among them
    # modelingevolution/roma-matcher-compose (up-0.1.0.sh) and DimNeuroLab/where-does-complexity-live (its docs).
    DINOV2: WeightsFile(
        file="dinov2_vitl14_pretrain.pth",
        urls=("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",),
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        size=1_217_586_395,
        licence="Apache-2.0",
    ),
}


def weights_folder() -> Path:
    """Where weights are looked for and kept: `SCM_WEIGHTS`, else scm/weights in the user's cache (XDG_CACHE_HOME)."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scm" / "weights"
