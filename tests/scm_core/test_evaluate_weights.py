# SPDX-License-Identifier: Apache-2.0
"""Weights files: found, fetched from a server on this machine, verified, read, refused."""

import hashlib
import http.server
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scm_core import published
from scm_core.evaluate import weights
from scm_core.evaluate.weights import WEIGHTS, fill, find_weights, load_tensors
from scm_core.published import WEIGHTS_HOME, PublishedFile

CONTENT = bytes(range(256)) * 9000  # more than one chunk
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HOSTS = ("https://first.invalid/", "https://second.invalid/")


class Server:
    """A file server on this machine that stands for every host: `files` by path, `asked` paths in order."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                content = outer.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def open(self, url: str) -> BinaryIO:
        """Open "https://host/path" as /host/path of this server."""
        path = url.removeprefix("https://")
        return urlopen(f"http://127.0.0.1:{self.http.server_port}/{path}", timeout=10)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights folder, with one published file, net.pth of extractor "net", at two hosts."""
    published = PublishedFile("net.pth", tuple(f"{host}net.pth" for host in HOSTS), DIGEST, len(CONTENT), "MIT")
    monkeypatch.setitem(weights.WEIGHTS, "net", published)
    monkeypatch.setenv("SCM_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def offline(url: str) -> BinaryIO:
    raise URLError("Network is unreachable")


def test_a_file_is_fetched_once(server: Server, folder: Path) -> None:
    server.files["/first.invalid/net.pth"] = CONTENT
    found = find_weights("net", opener=server.open)
    assert found == (folder / "net.pth", DIGEST)
    assert found.path.read_bytes() == CONTENT
    assert find_weights("net", opener=offline) == found
    assert server.asked == ["/first.invalid/net.pth"]
    assert [path.name for path in folder.iterdir()] == ["net.pth"]


def test_the_second_host_serves_when_the_first_does_not(server: Server, folder: Path) -> None:
    server.files["/second.invalid/net.pth"] = CONTENT
    assert find_weights("net", opener=server.open).path.read_bytes() == CONTENT
    assert server.asked == ["/first.invalid/net.pth", "/second.invalid/net.pth"]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"0", b""], ids=["short", "long", "empty"])
def test_wrong_bytes_are_not_kept(server: Server, folder: Path, content: bytes) -> None:
    server.files["/first.invalid/net.pth"] = content
    with pytest.raises(FileNotFoundError) as error:
        find_weights("net", opener=server.open)
    assert f"https://first.invalid/net.pth gave a file of SHA-256 {hashlib.sha256(content).hexdigest()}" in str(
        error.value
    )
    assert "https://second.invalid/net.pth: HTTP Error 404" in str(error.value)
    assert list(folder.iterdir()) == []


def test_an_endless_answer_is_cut_off(folder: Path) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            assert size > 0
            Endless.given += size
            return bytes(size)

    with pytest.raises(FileNotFoundError):
        find_weights("net", opener=lambda url: Endless())
    assert Endless.given <= len(HOSTS) * (len(CONTENT) + 2 * published.CHUNK)


def test_offline_says_what_to_put_where(folder: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        find_weights("net", opener=offline)
    text = str(error.value)
    for part in (str(folder / "net.pth"), "unreachable", "put net.pth there", HOSTS[0], DIGEST, "SCM_WEIGHTS"):
        assert part in text
    assert "\n" not in text


def test_a_folder_that_cannot_be_written_to_is_named(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/first.invalid/net.pth"] = CONTENT
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCM_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'file'}"):
        find_weights("net", opener=server.open)


def test_two_may_fetch_at_once(server: Server, folder: Path) -> None:
    server.files["/first.invalid/net.pth"] = CONTENT
    both, results = threading.Barrier(2, timeout=20), []

    def opener(url: str) -> BinaryIO:
        both.wait()  # neither has finished before the other has begun
        return server.open(url)

    threads = [threading.Thread(target=lambda: results.append(find_weights("net", opener=opener))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [(folder / "net.pth", DIGEST)] * 2
    assert [path.name for path in folder.iterdir()] == ["net.pth"]
    assert (folder / "net.pth").read_bytes() == CONTENT


def test_a_changed_file_is_refused(folder: Path, tmp_path: Path) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    folder.mkdir()
    for path, argument in ((folder / "net.pth", None), (tmp_path / "mine.pth", tmp_path / "mine.pth")):
        path.write_bytes(b"other")
        with pytest.raises(ValueError, match="by giving their sha256") as error:
            find_weights("net", argument, opener=offline)
        for part in (str(path), other, DIGEST, f"from {HOSTS[0]}net.pth"):
            assert part in str(error.value)


def test_own_weights_are_taken_by_their_digest(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"other")
    digest = hashlib.sha256(b"other").hexdigest()
    assert find_weights("net", mine, digest) == (mine, digest)
    assert find_weights("net", str(mine), digest.upper()) == (mine, digest)
    assert find_weights("trained here", mine) == (mine, digest)  # of a network that nobody publishes any file may be
    for name in ("net", "trained here"):
        with pytest.raises(ValueError, match=f"SHA-256 {digest}, {DIGEST} expected .* the right sha256"):
            find_weights(name, mine, DIGEST)
    with pytest.raises(ValueError, match="64 hex digits of the weights file"):
        find_weights("net", mine, digest[:8])
    with pytest.raises(ValueError, match="that weights_path names"):
        find_weights("net", sha256=digest)
    with pytest.raises(ValueError, match="trained here needs a weights file"):
        find_weights("trained here")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth is missing"):
        find_weights("net", tmp_path / "nothing.pth")


def test_where_weights_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SCM_WEIGHTS", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert WEIGHTS_HOME.folder == tmp_path / ".cache/scm/weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert WEIGHTS_HOME.folder == tmp_path / "cache/scm/weights"
    monkeypatch.setenv("SCM_WEIGHTS", "~/weights")
    assert WEIGHTS_HOME.folder == tmp_path / "weights"


@pytest.mark.parametrize("known", WEIGHTS.values(), ids=lambda known: known.file)
def test_what_is_published_is_stated_in_full(known: PublishedFile) -> None:
    assert re.fullmatch("[0-9a-f]{64}", known.sha256)
    assert known.size > 10**7
    assert all(re.fullmatch(r"https://[\w.-]+/\S+", url) for url in known.urls)
    for name in (known.file, *known.urls):  # the publishers' own digits, where a name carries them
        digits = re.search(r"-([0-9a-f]{8})\.pth$", name)
        assert digits is None or known.sha256.startswith(digits[1])


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_only_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int64)}
    torch.save(tensors, tmp_path / "good.pth")
    save_file(tensors, str(tmp_path / "good.safetensors"))
    for name in ("good.pth", "good.safetensors"):
        read = load_tensors(tmp_path / name)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)

    trap = Trap(tmp_path / "unpickled")
    for contents in ({"weights": trap}, {"weights": {"a": torch.ones(1)}}, [torch.ones(1)], {"epoch": 3}):
        torch.save(contents, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=r"bad\.pth is no tensors-only weights file") as error:
            load_tensors(tmp_path / "bad.pth")
        assert "\n" not in str(error.value)
    assert not trap.folder.exists()
    (tmp_path / "bad.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"bad\.pth is no tensors-only weights file"):
        load_tensors(tmp_path / "bad.pth")
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"bad\.safetensors is truncated or no safetensors file"):
        load_tensors(tmp_path / "bad.safetensors")


def test_a_network_is_filled_whole_or_not_at_all() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    tensors = {
        name: torch.randn(value.shape).double()
        for name, value in network.state_dict().items()
        if name != "1.num_batches_tracked"
    }
    with pytest.raises(ValueError, match=r"f\.pth holds weights of another network: without 0\.bias"):
        fill(network, {name: value for name, value in tensors.items() if name != "0.bias"}, "f.pth")
    assert network[0].weight.is_meta
    fill(network, tensors, "f.pth")
    assert torch.equal(network[0].weight, tensors["0.weight"].float())
    assert not any(value.is_meta or value.requires_grad for value in network.state_dict(keep_vars=True).values())
