# SPDX-License-Identifier: Apache-2.0
"""Files that people write: YAML 1.2 into plain mappings, and what a model finds wrong with one as a sentence.

Shared by params.yaml and a site's settings, so that both are read and faulted alike.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from pipeline.autoencoders import TAGS
from pipeline.errors import ParamsError, suggestion


def read_yaml(
    path: Path, name: str | None = None, example: str = "'scale: …', 'scales: …'", empty: bool = False
) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file, which may hold nothing if `empty`.

    `ParamsError`, which calls the file `name`, if it is missing, is not YAML, repeats a key, or is no mapping such as `example`.
    """
    name = name or path.name
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run this from the top folder of the repository") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{name}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        data = yaml.load(text, Loader=_Yaml12)  # noqa: S506  # derived from SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise ParamsError(f"{name}: not valid YAML{where}: {_one_line(what)}; correct the line") from None
    except (RecursionError, ValueError) as error:
        raise ParamsError(f"{name}: not valid YAML: {_one_line(error)}; write plain nested keys") from None
    if data is None and empty:
        return {}
    if not isinstance(data, dict):
        raise ParamsError(f"{name}: must hold keys with values ({example}), got {quoted(data)}")
    return data


class _Yaml12(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema and without repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # own table, not the parent's

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here, where keys are still those of the file: to construct a section lays others below it, and puts their keys beside its own.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key.start_mark)
            if key.value in seen:
                what = f"key '{key.value}' is given twice"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _scalar(tag: str, pattern: str, first: Sequence[str], convert: Any) -> None:
    _Yaml12.add_implicit_resolver(tag, re.compile(pattern), list(first))

    def construct(loader: _Yaml12, node: yaml.ScalarNode) -> Any:
        return convert(loader.construct_scalar(node))

    _Yaml12.add_constructor(tag, construct)


# A section with others below it: `construct_mapping` looks for this tag.
_Yaml12.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_scalar("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""], lambda text: None)
_scalar("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF", lambda text: text[0] in "tT")
_scalar("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789", int)
_scalar(
    "tag:yaml.org,2002:float",
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    "-+.0123456789",
    lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1].isalpha() else text),
)

_SENTENCES = {
    "missing": "is missing: add it",
    "greater_than": "must be greater than {gt}, got {got}",
    "greater_than_equal": "must be at least {ge}, got {got}",
    "less_than": "must be less than {lt}, got {got}",
    "less_than_equal": "must be at most {le}, got {got}",
    "finite_number": "must be a finite number, got {got}",
    "int_type": "must be an integer, got {got}",
    "int_from_float": "must be an integer, got {got}",
    "float_type": "must be a number, got {got}",
    "string_type": "must be a word, got {got}",
    "string_pattern_mismatch": "must be one word, got {got}",
    "tuple_type": "must be a list such as [1, 2], got {got}",
    "mapping_type": "must be a section of keys with values, got {got}",
    "model_type": "must be a section of keys with values, got {got}",
    "model_attributes_type": "must be a section of keys with values, got {got}",
    "dict_type": "must be a section of keys with values, got {got}",
    "too_short": "must have at least {min_length} entries, got {actual_length}",
    "too_long": "must have at most {max_length} entries, got {got}",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be {expected}, got {got}",
    "union_tag_invalid": "{discriminator} must be one of {expected_tags}, got '{tag}'",
    "union_tag_not_found": "needs the key {discriminator}",
}


def sentence(error: ValidationError, data: Any) -> str:
    """The first error of a validation as 'dotted.key: what is wrong and what would be right'."""
    first = error.errors(include_url=False)[0]
    kind, context, got = first["type"], dict(first.get("ctx", {})), first["input"]
    path = _known_path(first["loc"], data)
    if "at" in context:
        path.extend(str(context["at"]).split(".") if kind == "cross_field" else [context["at"]])
    key = _dotted(path)
    if kind == "cross_field":
        return f"{key}: {context['sentence']}"
    if kind == "unknown_key":
        return _one_line(f"{key}: unknown key; {suggestion(path[-1], context['known'], 'keys here')}")
    if "[key]" in first["loc"]:
        if kind == "literal_error":  # a slot
            return f"{key}: unknown name; it must be {context['expected']}"
        return f"{key}: not a name: use letters, digits and underscores, a letter first (at most 32 characters)"
    template = _SENTENCES.get(kind)
    if template is None:  # a kind of check that is new here: pydantic's own words
        return f"{key}: {_one_line(first['msg'])}, got {quoted(got)}"
    context = {
        name: f"{value:g}" if isinstance(value, float) else value
        for name, value in context.items()
        if isinstance(value, (str, int, float))
    }
    return f"{key}: {_one_line(template.format(**{**context, 'got': quoted(got)}))}"


def _known_path(loc: Sequence[int | str], data: Any) -> list[int | str]:
    """The keys of the file in an error's location: pydantic adds '[key]' and the tags of unions."""
    path: list[int | str] = []
    for part in loc:
        if part in {"[key]", *TAGS}:
            continue
        # The tag of a discriminated union is a value of the section where a key is expected.
        if isinstance(data, Mapping) and part not in data and part in [v for v in data.values() if isinstance(v, str)]:
            continue
        path.append(part)
        inside = isinstance(data, Mapping) and part in data
        data = data[part] if inside else None
    return path


def _dotted(path: Sequence[object]) -> str:
    text = ""
    for part in path:
        if isinstance(part, int) and text:
            text += f"[{part}]"
        else:
            word = str(part)
            word = word if word and word.isprintable() and len(word) <= 80 else reprlib.repr(word)
            text += f".{word}" if text else word
    return text or "the file"


def quoted(value: Any) -> str:
    """A value as the user would recognise it, on one short line."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a huge integer"
    return reprlib.repr(value)


def _one_line(text: object) -> str:
    """Text that may quote the file, without line breaks and control characters."""
    words = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
