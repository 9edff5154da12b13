# SPDX-License-Identifier: Apache-2.0
"""params.yaml with little in it: scales smoke and demo have one slot, latent_guided, and in it two sizes with sCD and sCT.

What tests change of it stands in few places then, and what they run is small. The scales for clusters are as they are.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.reading import _Yaml12

ROOT = Path(__file__).resolve().parents[2]


def plain_text(text: str | None = None) -> str:
    """The text of such a file, made from that of the repository's (or another one's)."""
    text = (ROOT / "params.yaml").read_text() if text is None else text
    start, end = text.index("\n  demo:\n"), text.index("\n  paper:")
    scales = text[start:end]
    for pattern, new, count in (
        (r"^          # (?:Table 5, M steps|one of each).*?(?=^        sizes:)", "", 2),  # more students
        (r"^      pixel_uncond:.*?(?=^    figure3:)", "", 2),  # more slots
        (r"(^          [SM]: \{network: \{[^{}]*\}), .*?\n(?= {8,10}\S)", r"\1, teacher: {}, students: {scd: {}, sct: {}}}\n", 4),
        (r"^          checkpoints: .*?\n", "", 2),
        (r"^        grids: .*?\n", "", 2),
        (r"^    figure4: .*?(?=^  \w|^\Z|\Z)", "", 2),
    ):  # fmt: skip
        scales, found = re.subn(pattern, new, scales, flags=re.MULTILINE | re.DOTALL)
        assert found == count, f"{pattern}: {found} places"
    paper = re.sub(r"^    figure4: .*\n", "", text[end:], flags=re.MULTILINE)
    return text[:start] + scales.rstrip("\n") + "\n" + paper


def plain() -> dict[str, Any]:
    """What is in it."""
    data: dict[str, Any] = yaml.load(plain_text(), Loader=_Yaml12)  # noqa: S506  # derived from SafeLoader
    return data
