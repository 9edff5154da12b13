# SPDX-License-Identifier: Apache-2.0
"""What changed between a checkpoint's settings and those of the run that goes on from it."""

import json
import re
from typing import Any

import pytest

from scm_core.train.checkpoint import CheckpointError
from scm_core.train.resume import check_unchanged

STORED: dict[str, Any] = {
    "code": "1a2b3c4d",
    "training": {"lr": 0.01, "betas": (0.9, 0.99), "optimizer": {"name": "adam", "fused": True}, "clip": None},
    "augment": {},
}


def changed(**training: Any) -> dict[str, Any]:
    return {**STORED, "training": {**STORED["training"], **training}}


def test_nothing_changed() -> None:
    """Through JSON and back: a tuple is a list, 1 is 1.0, NaN is NaN, the order of keys means nothing."""
    stored = {"b": (1, 2.0), "a": {"x": 1, "nan": float("nan"), "list": [{"y": 1}, float("nan")]}}
    now = {"a": {"list": ({"y": 1.0}, float("nan")), "nan": float("nan"), "x": 1.0}, "b": [1, 2]}
    assert check_unchanged(json.loads(json.dumps(stored)), now, False, "step-1") == []
    assert check_unchanged(STORED, STORED, False, "step-1") == []


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (changed(lr=0.02), ["training.lr 0.01 → 0.02"]),
        (changed(optimizer={"name": "radam", "fused": True}), ["training.optimizer.name adam → radam"]),
        (changed(optimizer={"name": "adam"}), ["training.optimizer.fused removed: true"]),
        (changed(optimizer={"name": "adam", "fused": 1}), ["training.optimizer.fused true → 1"]),
        (changed(warmup=100), ["training.warmup added: 100"]),
        (changed(clip=False), ["training.clip null → false"]),
        (changed(betas=[0.9, 0.999]), ["training.betas [0.9, 0.99] → [0.9, 0.999]"]),
        (changed(betas=[0.9]), ["training.betas [0.9, 0.99] → [0.9]"]),
        (changed(clip=[{"a": True}]), ['training.clip null → [{"a": true}]']),
        ({**STORED, "augment": {"flip": True}}, ["augment removed: {}", "augment.flip added: true"]),
        ({**STORED, "code": "5e6f7a8b", "augment": ""}, ['augment {} → ""', "code 1a2b3c4d → 5e6f7a8b"]),
        ({**STORED, "code": "x" * 200}, [f"code 1a2b3c4d → {'x' * 59}…"]),
        ({**STORED, "code": "a, b →\n"}, [r'code 1a2b3c4d → "a, b →\n"']),
    ],
)
def test_every_change_is_named(now: dict[str, Any], words: list[str]) -> None:
    """With `allow_changes` the changes in words, without it an error with the same words, the source and the remedies."""
    stored = json.loads(json.dumps(STORED))
    assert check_unchanged(stored, now, True, "runs/x/step-00000500") == words
    with pytest.raises(CheckpointError) as caught:
        check_unchanged(stored, now, False, "runs/x/step-00000500")
    assert str(caught.value).startswith(
        f"runs/x/step-00000500: made with other settings: {', '.join(words)}; `resume.allow_changes: true` goes on"
    )
    assert "remove the folder" in str(caught.value)


def test_many_changes_are_counted() -> None:
    """An error names the first eight; the list for the log has all of them."""
    now = {f"name{i}": i for i in range(12)}
    with pytest.raises(CheckpointError, match=re.escape("name5 added: 5 and 4 more; ")):
        check_unchanged({}, now, False, "here")
    assert len(check_unchanged({}, now, True, "here")) == 12
