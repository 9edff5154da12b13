# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is of the run that wants to go on from it: the same settings, the same code."""

import json
from collections.abc import Mapping
from typing import Any

from scm_core.train.checkpoint import CheckpointError

SHOWN, WIDTH = 8, 60  # changes named in an error, characters of a value


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; {"optimizer": {"lr": 1}} is {"optimizer.lr": 1}. An empty one is a value."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            result |= flattened(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _same(a: Any, b: Any) -> bool:
    # JSON's idea of it: 1 and 1.0 are the same number, 1 and true are not, and a NaN is a NaN
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return (isinstance(a, bool) == isinstance(b, bool) and a == b) or (a != a and b != b)


def _words(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and value == value.strip() != ""
    text = value if plain else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested settings, in words, by name: "lr 0.01 → 0.02", "dropout added: 0.1", "warmup removed: 100".

    `now` is compared as JSON would give it back, in which `stored` was kept: a tuple is a list, a key is a string.
    """
    before, after = flattened(json.loads(json.dumps(stored))), flattened(json.loads(json.dumps(now)))
    result = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            result.append(f"{name} added: {_words(after[name])}")
        elif name not in after:
            result.append(f"{name} removed: {_words(before[name])}")
        elif not _same(before[name], after[name]):
            result.append(f"{name} {_words(before[name])} → {_words(after[name])}")
    return result


def check_unchanged(stored: Mapping[str, Any], now: Mapping[str, Any], allow_changes: bool, source: str) -> list[str]:
    """The changes from the settings `stored` in the checkpoint `source` to those of `now`, in words; none if they are the same.

    Both may be nested and hold what JSON can hold. Raises CheckpointError, which names the changes, if there are any and `allow_changes`
    is not set.
    """
    found = changes(stored, now)
    if found and not allow_changes:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise CheckpointError(
            f"{source}: made with other settings: {', '.join(found[:SHOWN])}{more}; `resume.allow_changes: true` goes on from it with the "
            "new ones; or go back to the old ones; or remove the folder of the checkpoints to start over"
        )
    return found
