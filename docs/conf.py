# SPDX-License-Identifier: Apache-2.0
"""Sphinx's settings for `make docs` (tools/docs.py)."""

import re
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import scm_core

ROOT = Path(scm_core.__file__).resolve().parent.parent
NAME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]

project, release, language = NAME, scm_core.__version__, "en"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4  # links such as ARCHITECTURE.md#jobs
autodoc_member_order = "bysource"
autodoc_default_options = {"ignore-module-all": True}  # what a package passes on is described where it is defined
autodoc_mock_imports = ["mlflow"]  # no name of it is described, and its import takes seconds
suppress_warnings = ["ref.python"]  # annotations name classes without their module: `Point` is several
html_title = f"{NAME} {release}"
html_theme_options = {"description": "Continuous-time consistency models, reproduced", "page_width": "1100px"}
html_show_copyright = html_copy_source = False


def plain_words(
    app: Sphinx, what: str, name: str, thing: object, options: dict[str, Any] | None, lines: list[str]
) -> None:
    """Docstrings are plain text with `code` in it as in Markdown; * and | are multiplication and absolute values."""
    parts = re.split(r"(`+[^`]+`+)", "\n".join(lines))
    for number, part in enumerate(parts):
        code = part.strip("`")
        parts[number] = f"``{code}``\\ " if number % 2 else re.sub(r"([*|])", r"\\\1", part)
    lines[:] = "".join(parts).split("\n")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", plain_words)
