# SPDX-License-Identifier: Apache-2.0
"""Elements of HTML and SVG from Python, everything escaped, and the little of Markdown that reports' notes use."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_STRESSED = re.compile(r"\*([^*\s](?:[^*]*[^*\s])?)\*")


def element(name: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """`<name attributes>children</name>`; an attribute of None is left out, `_` in names becomes `-`, a trailing one is dropped."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(str(escape(child)) for child in children)
    return Markup(f"<{name}{words}>{inside}</{name}>")


def _text(value: str | float) -> str:
    """Numbers in as few digits as a drawing needs."""
    return value if isinstance(value, str) else f"{round(value, 2):g}"


def inline(text: str) -> Markup:
    """A note as Markdown has it, with *stressed* words."""
    return Markup(_STRESSED.sub(r"<em>\1</em>", str(escape(text))))


def anchor(kind: str, name: str) -> str:
    """A fragment's name: the same for the link and for what it leads to."""
    return f"{kind}-{re.sub('[^A-Za-z0-9_.-]', '_', name)}"
