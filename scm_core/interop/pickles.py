# SPDX-License-Identifier: Apache-2.0
"""Pickles of other projects, read without running anything of them: a machine of the opcodes that data needs, and nothing else.

A pickle is a program. This module knows a few of its instructions (Python's `pickletools` documents them all), `rebuild` the dozen names
that data and the network pickles of EDM and EDM2 import. No name of a file is ever looked up in Python, and whatever else a file holds is
refused, by name.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scm_core.interop.rebuild import (
    CALLS,
    LOAD,
    NAMES,
    PLAIN,
    TORCH_TYPES,
    Array,
    Name,
    RefusedError,
    Storage,
    Stored,
    Type,
)

MOST_STEPS = 5_000_000  # instructions; a network has some ten thousand
MOST_NESTED = 100  # containers within each other; a network has some twenty
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # that torch.save's older format begins with


def read_pickle(path: str | Path) -> Any:
    """Return the contents of a pickle as dictionaries, lists (sets, too), tuples, numbers, strings, arrays, tensors and `Stored`.

    Takes data and network pickles of EDM's and EDM2's format (protocols 2 to 4), running nothing. `FileNotFoundError`, or `RefusedError` (a
    `ValueError`) that names the file and what in it is damaged, unknown or too much.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: put the file there")
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise RefusedError(f"{path} is empty: get it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            machine = Machine(view)
            try:
                return _finished(machine.run(), {})
            except RefusedError as error:
                raise RefusedError(f"{path}: {error}") from None


class Machine:
    """Runs one pickle of a stream up to its STOP."""

    def __init__(self, stream: Any, storages: bool = False) -> None:
        self.stream = stream
        self.storages = storages  # whether torch's references to storages, persistent ids, may occur
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the pickle describes; `RefusedError` for all that it may not hold."""
        steps, at = 0, 0
        try:
            for opcode, argument, position in pickletools.genops(self.stream):
                steps, at = steps + 1, position or 0
                if steps > MOST_STEPS:
                    raise RefusedError(f"has more than {MOST_STEPS} instructions, which no network needs")
                if opcode.name == "STOP":
                    return self.pop()
                if opcode.name in CONSTANTS:
                    self.stack.append(CONSTANTS[opcode.name])
                elif opcode.name in LITERALS:
                    self.stack.append(argument)
                elif action := ACTIONS.get(opcode.name):
                    action(self, argument)
                else:
                    raise RefusedError(f"has the instruction {opcode.name} (at byte {at}), which no data needs")
        except RefusedError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            what = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RefusedError(f"is truncated or damaged (after byte {at}: {what}): get it again") from None
        raise RefusedError("is truncated: get it again")  # genops has said so before

    def pop(self) -> Any:
        """The top of the stack."""
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise RefusedError("is damaged: an instruction lacks its operand")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        """All that lies above the last mark."""
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise RefusedError("is damaged: it puts keys into what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | bytes):
                raise RefusedError(f"has a key of type {type(key).__name__}")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def dictionary(self) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_items(items)

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise RefusedError("is damaged: it appends to what is no list")
        self.stack[-1].extend(items)

    def name(self, module: Any, name: Any) -> None:
        text = f"{module}.{name}"
        if (
            not isinstance(module, str)
            or not isinstance(name, str)
            or (text not in NAMES and not self.is_storage(text))
        ):
            raise RefusedError(f"imports {text[:200]!r}, which is not of the format: nothing of the file was run")
        self.stack.append(Name(text))

    def is_storage(self, text: str) -> bool:
        module, _, name = text.rpartition(".")
        return self.storages and module == "torch" and name in TORCH_TYPES

    def stacked_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def call(self) -> None:
        arguments, what = self.pop(), self.pop()
        called = {**CALLS, LOAD: load_storage}
        if not isinstance(what, Name) or what.text not in called or not isinstance(arguments, tuple):
            raise RefusedError(f"calls {getattr(what, 'text', type(what).__name__)!r}, which is not of the format")
        try:
            self.stack.append(called[what.text](*arguments))
        except RefusedError:
            raise
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise RefusedError(
                f"is damaged: {what.text} with wrong arguments ({str(error).partition(chr(10))[0]})"
            ) from None

    def new(self) -> None:
        arguments, what = self.pop(), self.pop()
        if not isinstance(what, Name) or what.text not in PLAIN or arguments != ():
            raise RefusedError(f"makes {getattr(what, 'text', type(what).__name__)!r}, which is not of the format")
        self.stack.append({} if PLAIN[what.text] is dict else Stored(what.text.rpartition(".")[2]))

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Stored) and isinstance(state, dict) and all(isinstance(key, str) for key in state):
            target.state = state
        elif isinstance(target, Array) and isinstance(state, tuple):
            target.fill(state)
        elif isinstance(target, Type) and isinstance(state, tuple):
            target.order(state)
        elif not (isinstance(target, dict) and state in ({}, None)):
            raise RefusedError(f"sets the state of a {type(target).__name__}, which is not of the format")

    def storage(self) -> None:
        """torch's reference: ('storage', type, key, device, number of elements or bytes, None)."""
        match self.pop() if self.storages else None:
            case ("storage", Name(text), str(), str(), int(count), _):
                self.stack.append((text.rpartition(".")[2], count))
            case _:
                raise RefusedError("has the instruction BINPERSID, which no data needs")


def _finished(value: Any, done: dict[int, Any], depth: int = 0) -> Any:
    """`value` with its arrays in place of what they were read into; each container once, however often it is referred to."""
    if depth > MOST_NESTED:
        raise RefusedError(f"nests more than {MOST_NESTED} containers, which no network does")
    if isinstance(value, Array):
        if value.value is None:
            raise RefusedError("is damaged: a NumPy array without its numbers")
        return value.value
    if isinstance(value, Name | Storage | Type):
        raise RefusedError(f"holds a bare {type(value).__name__.lower()}, which is no data")
    if not isinstance(value, dict | list | tuple | Stored):
        return value
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, tuple):
        done[id(value)] = tuple(_finished(item, done, depth + 1) for item in value)
        return done[id(value)]
    done[id(value)] = value  # before its items: it may contain itself
    if isinstance(value, list):
        value[:] = [_finished(item, done, depth + 1) for item in value]
    else:
        items = value.state if isinstance(value, Stored) else value
        for key, item in list(items.items()):
            items[key] = _finished(item, done, depth + 1)
    return value


def load_storage(data: bytes) -> Storage:
    """A storage in torch.save's older format: magic, version, system, reference and list of keys as pickles, then count and raw bytes."""
    if not isinstance(data, bytes):
        raise RefusedError("is damaged: a storage without bytes")
    if data[:2] == b"PK":
        raise RefusedError("has a tensor in torch's ZIP format, which the networks' pickles do not use")
    stream = _Stream(data)
    magic, version, system, reference, keys = (Machine(stream, storages=True).run() for _ in range(5))
    if (magic, version) != (MAGIC, PROTOCOL) or not isinstance(reference, tuple) or not isinstance(keys, list):
        raise RefusedError("is damaged: a storage without torch's header")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("has tensors in big-endian order, which is not read here")
    kind, count = reference
    dtype, raw = TORCH_TYPES[kind], memoryview(data)[stream.tell() :]
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != count or len(raw) - 8 != count * dtype.itemsize:
        raise RefusedError(f"is damaged: a storage of {count} elements with {max(0, len(raw) - 8)} bytes")
    # a copy, as torch wants memory that may be written to
    return Storage(torch.frombuffer(bytearray(raw[8:]), dtype=dtype) if count else torch.empty(0, dtype=dtype))


class _Stream:
    """Bytes as what `pickletools.genops` reads from."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        self.at += len(part)
        return part

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        return self.read((end + 1 if end >= 0 else len(self.data)) - self.at)

    def tell(self) -> int:
        return self.at


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.since_mark(),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_SET": lambda m, _: m.stack.append([]),
    "DICT": lambda m, _: m.dictionary(),
    "LIST": lambda m, _: m.stack.append(m.since_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "SETITEM": lambda m, _: m.set_item(),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "ADDITEMS": lambda m, _: m.append(m.since_mark()),
    "GET": lambda m, index: m.stack.append(m.memo[int(index)]),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "PUT": lambda m, index: m.put(int(index)),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GLOBAL": lambda m, text: m.name(*text.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.stacked_name(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.new(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.storage(),
}
