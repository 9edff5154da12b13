# SPDX-License-Identifier: Apache-2.0
"""What the network pickles of EDM and EDM2 hold, taken apart: tensors by name, each of which must be accounted for, and settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scm_core.interop.pickles import read_pickle
from scm_core.interop.rebuild import RefusedError, Stored
from scm_core.nn.layout import Layout


class Teacher(NamedTuple):
    """An imported network: its weights by our names, its description for `build_network`, and what is known of it (JSON values)."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    info: dict[str, Any]


class Network:
    """A pickled module, `path` for messages. Tensors are taken one after the other; `done` finds the ones that nobody took."""

    def __init__(self, module: Stored, path: Path) -> None:
        self.module, self.path = module, path
        self.tensors = dict(_tensors(module))
        self.taken: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; `RefusedError` if there is none."""
        if name not in self.tensors:
            raise RefusedError(f"{self.path}: tensor {name} is missing: this is no network of the format")
        return tuple(self.tensors[name].shape)

    def take(self, name: str, shape: Iterable[int]) -> Tensor:
        """A tensor in float32, which must have that shape and finite numbers."""
        found, wanted = self.shape(name), tuple(shape)
        if found != wanted:
            raise RefusedError(f"{self.path}: tensor {name} has shape {found}, expected {wanted}")
        value = self.tensors[name].to(torch.float32, copy=True).contiguous()
        if not value.isfinite().all():
            raise RefusedError(f"{self.path}: tensor {name} has numbers that are not finite")
        self.taken.add(name)
        return value

    def drop(self, names: Iterable[str]) -> None:
        """Leave out tensors that have no part in what the network computes."""
        self.taken.update(names)

    def done(self) -> None:
        """`RefusedError` if a tensor is left over."""
        if left := sorted(self.tensors.keys() - self.taken):
            raise RefusedError(
                f"{self.path}: tensor {left[0]} is unknown: this is another network than the format's"
                + (f" (and {len(left) - 1} more)" if len(left) > 1 else "")
            )

    def part(self, name: str) -> Stored:
        """A submodule by dotted name."""
        module = self.module
        for key in name.split("."):
            inner = _group(module, "_modules").get(key)
            if not isinstance(inner, Stored):
                raise RefusedError(f"{self.path}: it has no part {name}: this is no network of the format")
            module = inner
        return module

    def parts(self, name: str) -> dict[str, Stored]:
        """The submodules of a part, by name, in order."""
        return {key: value for key, value in _group(self.part(name), "_modules").items() if isinstance(value, Stored)}

    def levels(self, stack: str, blocks: Iterable[str], conv: str, attention: str) -> tuple[dict[int, int], list[int]]:
        """Of a stack's `blocks`: what channels `conv` gives at each side, in order, and the sides with `attention`, descending."""
        channels: dict[int, int] = {}
        attentive = set()
        for name in blocks:
            first = name.partition("x")[0]
            side = int(first) if first.isdecimal() else 0
            outputs, *_ = self.shape(f"{stack}.{name}.{conv}.weight")
            channels.setdefault(side, outputs)
            if self.has(f"{stack}.{name}.{attention}.weight"):
                attentive.add(side)
        return channels, sorted(attentive, reverse=True)

    def number(self, part: str, name: str, default: float | None = None) -> float:
        """A number that a part (the network itself: "") holds beside its tensors."""
        module = self.part(part) if part else self.module
        value = module.state.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RefusedError(
                f"{self.path}: {part or module.kind} has no number {name}: this is no network of the format"
            )
        return value

    def count(self, part: str, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number that a part holds."""
        value = self.number(part, name, default)
        if not isinstance(value, int) or not least <= value <= 2**20:
            raise RefusedError(f"{self.path}: {name}: expected a whole number of at least {least}, got {value}")
        return value

    def expect(self, part: str, settings: Mapping[str, Any]) -> None:
        """`RefusedError` unless a part's settings are these, or it does not say; tuples are lists."""
        module = self.part(part) if part else self.module
        for name, wanted in settings.items():
            found = module.state.get(name, wanted)
            found = list(found) if isinstance(found, tuple) else found
            same = (
                abs(found - wanted) < 1e-6
                if isinstance(wanted, float) and isinstance(found, int | float)
                else found == wanted
            )
            if not same:
                raise RefusedError(
                    f"{self.path}: {part}: {name} is {found!r}, and only {wanted!r} can be computed here"
                )


def _group(module: Stored, kind: str) -> dict[str, Any]:
    found = module.state.get(kind)
    return found if isinstance(found, dict) else {}


def _tensors(module: Stored, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by dotted name. (A module within itself has been refused for its depth.)"""
    for kind in ("_parameters", "_buffers"):
        for name, value in _group(module, kind).items():
            if isinstance(value, Tensor):
                yield prefix + str(name), value
    for name, inner in _group(module, "_modules").items():
        if isinstance(inner, Stored):
            yield from _tensors(inner, f"{prefix}{name}.")


def open_network(path: str | Path, kinds: Iterable[str]) -> tuple[Network, dict[str, Any]]:
    """The averaged network of a network pickle, whose class must be one of `kinds`, and the whole of the pickle.

    `FileNotFoundError`, or `RefusedError` with the file's name.
    """
    path, known = Path(path), tuple(kinds)
    data = read_pickle(path)
    ema = data.get("ema") if isinstance(data, dict) else None
    if not isinstance(ema, Stored):
        raise RefusedError(f"{path}: holds no network under 'ema': this is no network pickle of EDM or EDM2")
    if ema.kind not in known:
        raise RefusedError(
            f"{path}: holds a network of class {ema.kind[:60]!r}; only {' and '.join(known)} can be imported"
        )
    return Network(ema, path), data


def block_names(plan: Layout) -> tuple[list[str], list[str]]:
    """The names of the blocks of `plan` in EDM's and EDM2's U-Nets: enc.<side>x<side>_down, _block0, …; dec.…_in0, _in1, _up, _block0, …"""
    encoder: list[str] = []
    decoder: list[str] = []
    for names, places in ((encoder, plan.encoder), (decoder, plan.decoder)):
        index = 0
        for at, place in enumerate(places):
            side = f"{place.resolution}x{place.resolution}"
            if names is decoder and at < 2:
                names.append(f"{side}_in{at}")
            elif place.resample:
                names.append(f"{side}_{place.resample}")
                index = 0
            else:
                names.append(f"{side}_block{index}")
                index += 1
    return [f"enc.{name}" for name in encoder], [f"dec.{name}" for name in decoder]


def by_kind(weight: Tensor, heads: int) -> Tensor:
    """Rows of a layer that gives q, k and v, from EDM's order (head, element, kind) to ours: (kind, head, element)."""
    return weight.reshape(heads, -1, 3, *weight.shape[1:]).movedim(2, 0).reshape(weight.shape).contiguous()
