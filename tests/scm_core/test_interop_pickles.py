# SPDX-License-Identifier: Apache-2.0
"""The reader of pickles: it takes data, runs nothing, and says by name what it refuses."""

import collections
import contextlib
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scm_core.interop import RefusedError, read_pickle
from scm_core.interop.rebuild import Stored
from tests.scm_core.network_pickles import edm2_pickle

DATA = {
    "half": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).half(), requires_grad=False),
    "slice": torch.arange(40, dtype=torch.int64).reshape(5, 8)[1:3, ::2],
    "turned": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.0),
    "flags": torch.tensor([True, False]),
    "brain": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "by column": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
    "number": np.float64(0.1),
    "plain": [1, -(2**70), 0.5, None, True, "é", b"bytes", (1, (2, 3, 4)), {"a": {"b": []}}],
    "ordered": collections.OrderedDict(x=1, y=2),
}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_data_come_back_as_pickle_would_give_them(protocol: int, tmp_path: Path) -> None:
    """Tensors of every layout and type, arrays, numbers, containers."""
    found = read_pickle(write(tmp_path / "data.pkl", pickle.dumps(DATA, protocol=protocol)))
    assert found.keys() == DATA.keys()
    for name, expected in DATA.items():
        value = found[name]
        if isinstance(expected, torch.Tensor):
            assert torch.equal(value, expected)
            assert value.dtype == expected.dtype
            assert value.stride() == expected.stride()
        elif isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(value, expected)
            assert value.dtype == expected.dtype
        else:
            assert value == expected


def test_a_pickle_of_python_2_with_an_array(tmp_path: Path) -> None:
    """As in the batches of CIFAR-10: byte strings, which are read as Latin-1, and an array's numbers in one of them."""
    body = (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x02\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x04\x00\x7f\x80\xfftb"
        b"U\x06labels]q\x04(K\x03K\x07eu."
    )
    found = read_pickle(write(tmp_path / "batch", body))
    assert found["labels"] == [3, 7]
    np.testing.assert_array_equal(found["data"], np.array([[0, 127], [128, 255]], np.uint8))


def test_modules_are_taken_apart(tmp_path: Path) -> None:
    """Persistent objects and torch's containers become `Stored`; the source code that came along is not run."""
    trap = tmp_path / "trap"
    found = read_pickle(edm2_pickle(trap).write(tmp_path / "network.pkl"))
    net = found["ema"]
    assert isinstance(net, Stored)
    assert (net.kind, net.source) == ("Precond", True)
    unet = net.state["_modules"]["unet"]
    assert unet.state["_modules"]["enc"].kind == "ModuleDict"
    assert unet.state["_parameters"]["out_gain"].shape == ()
    assert not trap.exists()


class Calls:
    """Unpickled by calling a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def opcodes(text: str) -> bytes:
    return b"\x80\x04" + text.encode("latin-1") + b"."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda trap: pickle.dumps({"ema": Calls(os.system, f"touch {trap}")}), "imports 'posix.system', which is not of the format"),
        (lambda trap: pickle.dumps(Calls(exec, f"open({str(trap)!r}, 'w')")), "imports 'builtins.exec'"),
        (lambda trap: pickle.dumps(Calls(eval, "1")), "imports 'builtins.eval'"),
        (lambda trap: pickle.dumps(Calls(getattr, "a", "b")), "imports 'builtins.getattr'"),
        (lambda trap: pickle.dumps(Path("x")), "imports 'pathlib"),
        (lambda trap: pickle.dumps(torch.nn.Linear(2, 2)), r"imports 'torch\.nn\.modules\.linear\.Linear'"),
        (lambda trap: pickle.dumps(np.array(["word"])), "NumPy data of a type that is no number's"),
        (lambda trap: pickle.dumps(np.array([None], dtype=object)), "NumPy data of a type that is no number's"),
        (lambda trap: f"(S'touch {trap}'\nios\nsystem\n.".encode(), "instruction INST"),
        (lambda trap: b"(cos\nsystem\nS'true'\no.", "imports 'os.system'"),
        (lambda trap: b"\x80\x02Pabc\n.", "instruction PERSID"),
        (lambda trap: b"\x80\x02K\x01Q.", "instruction BINPERSID"),
        (lambda trap: b"\x80\x02\x82\x01.", "instruction EXT1"),
        (lambda trap: opcodes("ccollections\nOrderedDict\nK\x01R"), "calls 'collections.OrderedDict'"),
        (lambda trap: opcodes("ctorch.storage\n_load_from_bytes\n(I5\ntR"), "a storage without bytes"),
        (lambda trap: opcodes("cdnnlib.util\nEasyDict\nK\x01\x85\x81"), "makes 'dnnlib.util.EasyDict'"),
        (lambda trap: opcodes("cnumpy\nndarray\n"), "holds a bare name"),
        (lambda trap: opcodes("]K\x01K\x02s"), "puts keys into what is no dictionary"),
        (lambda trap: opcodes("}(K\x01]K\x02eu"), "appends to what is no list|damaged"),
        (lambda trap: opcodes("}(]K\x02u"), "key of type list"),
        (lambda trap: opcodes("a"), "lacks its operand"),
        (lambda trap: opcodes("h\x07"), "truncated or damaged"),
        (lambda trap: b"PK\x03\x04 a ZIP", "is damaged|truncated or damaged"),
        (lambda trap: b"\x93NUMPY", "is damaged"),
        (lambda trap: b"", "is empty"),
    ],
)  # fmt: skip
def test_what_no_data_needs_is_refused_and_nothing_runs(content: Any, words: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = write(tmp_path / "bad.pkl", content(trap))
    with pytest.raises(RefusedError, match=rf"bad\.pkl.*({words})") as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def storage_of(*replacements: tuple[bytes, bytes]) -> bytes:
    content = pickle.dumps(torch.arange(4.0), protocol=4)
    for before, after in replacements:
        assert before in content
        content = content.replace(before, after)
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # shape (4,) becomes (5,): beyond the storage
        (storage_of((b"K\x00K\x04\x85", b"K\x00K\x05\x85")), r"a tensor of shape \(5,\) that does not fit its 4 numbers"),
        # 4 numbers with stride 0 would be one number; a million of them a bomb
        (storage_of((b"K\x00K\x04\x85", b"K\x00J\x40\x42\x0f\x00\x85")), r"shape \(1000000,\) that does not fit"),
        (storage_of((b"K\x00K\x04\x85", b"K\x02K\x04\x85")), r"shape \(4,\) that does not fit"),
        (storage_of((b"FloatStorage", b"ColorStorage")), r"imports 'torch\.ColorStorage'"),
        (storage_of((b"FloatStorage", b"QUInt8Storag")), r"imports 'torch\.QUInt8Storag'"),
        (storage_of((b"little_endianq\x02\x88", b"little_endianq\x02\x89")), "big-endian"),
        (storage_of((b"\x04\0\0\0\0\0\0\0\0\0\0\0", b"\x08\0\0\0\0\0\0\0\0\0\0\0")), "a storage of 4 elements with 16 bytes"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_its_bytes(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=words):
        read_pickle(write(tmp_path / "bad.pkl", content))


def test_bombs(tmp_path: Path) -> None:
    """Nesting without end, lists that double, huge sizes and indices: refused, or read without growing."""
    deep = b"\x80\x04" + b"]" * 1000 + b"a" * 999 + b"."
    with pytest.raises(RefusedError, match="nests more than 100 containers"):
        read_pickle(write(tmp_path / "deep.pkl", deep))
    itself = b"\x80\x04]q\x00h\x00a."
    assert read_pickle(write(tmp_path / "itself.pkl", itself))[0][0] != []
    doubled = b"\x80\x04N\x85q\x00" + b"".join(b"h%c0h%ch%c\x86q%c" % (i, i, i, i + 1) for i in range(60)) + b"."
    found = read_pickle(write(tmp_path / "doubled.pkl", doubled))  # 2^60 items, were each of them looked at
    assert len(found) == 2
    for content in (
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00abc.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.",
        b"\x80\x04\x8b\xff\xff\xff\x7f.",
    ):
        with pytest.raises(RefusedError, match="truncated or damaged"):
            read_pickle(write(tmp_path / "huge.pkl", content))
    assert read_pickle(write(tmp_path / "memo.pkl", b"\x80\x04K\x01r\xff\xff\xff\x7f.")) == 1  # memo at index 2^31


def test_truncated_and_altered_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """Every beginning of a file, and thousands of random changes: nothing but `RefusedError`, or data."""
    whole = pickle.dumps(DATA, protocol=4)
    path = tmp_path / "bad.pkl"
    for end in range(0, len(whole), 7):
        with pytest.raises(RefusedError, match=r"is (truncated|damaged|empty)"):
            read_pickle(write(path, whole[:end]))
    chance = random.Random(0)
    for _ in range(2000):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        with contextlib.suppress(RefusedError):
            read_pickle(write(path, bytes(changed)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl is missing"):
        read_pickle(tmp_path / "nowhere.pkl")
