# SPDX-License-Identifier: Apache-2.0
"""What a size says about trainings, laid over the slot's sections before anything is checked; and its repeated trainings.

`repeats: {scd: 3}` of a size trains three students of that section from three seeds: scd, scd_seed2 and scd_seed3. They are students like
all others (jobs, folders, evaluations), with one section, so that neither a further seed nor one less makes the others again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

_REPEATED = re.compile(r"(.+)_seed([0-9]+)")


def base_of(name: str) -> str:
    """The student whose section a training has: scd for scd_seed2, and for scd."""
    found = _REPEATED.fullmatch(name)
    return found[1] if found else name


def seed_of(name: str) -> int:
    """Which of a student's trainings it is, from 1."""
    found = _REPEATED.fullmatch(name)
    return int(found[2]) if found else 1


def repetitions(name: str, count: int) -> list[str]:
    """The names of a student's further trainings: of three, the second and the third."""
    return [f"{name}_seed{number}" for number in range(2, count + 1)]


def with_repetitions(names: Iterable[str], trained: Iterable[str]) -> list[str]:
    """Of what is trained the students of these names, each followed by its repetitions."""
    known = list(trained)
    return [found for name in names for found in known if base_of(found) == name]


def merged(name: Any, size: Any, base: Mapping[str, Any]) -> Any:
    """One size with the slot's sections below its own; what is not a mapping is left for validation to refuse."""
    if not isinstance(size, Mapping):
        return size
    result = dict(size)
    own, below = size.get("teacher"), base["teacher"]
    if isinstance(own, Mapping) and isinstance(below, Mapping):
        result["teacher"] = {**below, **own}
    own, below = size.get("students"), base["students"]
    if isinstance(own, Mapping) and isinstance(below, Mapping):
        result["students"] = _students(f"sizes.{name}", own, below, size.get("repeats"))
    return result


def _students(at: str, own: Mapping[Any, Any], below: Mapping[Any, Any], repeats: Any) -> dict[Any, Any]:
    counts = {key: n for key, n in repeats.items() if isinstance(n, int)} if isinstance(repeats, Mapping) else {}
    further = {new: key for key, n in counts.items() if isinstance(key, str) for new in repetitions(key, min(n, 100))}
    found: dict[Any, Any] = {}
    for method, section in own.items():
        if method in further:  # of a model that was written out
            continue
        if method not in below and all(isinstance(known, str) for known in below):
            raise PydanticCustomError("unknown_key", "unknown", {"at": f"{at}.students.{method}", "known": list(below)})
        both = isinstance(section, Mapping) and isinstance(below.get(method), Mapping)
        found[method] = {**below[method], **section} if both else section
    for key in counts:
        if key not in found:
            raise PydanticCustomError("unknown_key", "unknown", {"at": f"{at}.repeats.{key}", "known": list(found)})
    return found | {new: found[key] for new, key in further.items()}
