# SPDX-License-Identifier: Apache-2.0
"""Images and latents per second from the store: `python benchmarks/bench_data.py [SECTION …]`.

Beside it, from the same arrays: uncompressed PNG files in an uncompressed ZIP with a dataset.json, read with Pillow (the layout of EDM2's
dataset tool; its latents are .npy files in such a ZIP), and webdataset with the same files in tars. images: 64×64 RGB, as ImageNet 64.
latents: mean and standard deviation, 4×64×64 each, as ImageNet 512. One process, one thread, whole epochs in batches of random items, with
labels; webdataset streams its shards through its shuffle buffer, which is how it is random. Rates are medians over rounds in which the
ways take turns, each opening its files anew. warm: the files are in the page cache. cold: before each epoch the kernel drops the files'
pages (posix_fadvise), and its count of what was read from the disk is on the page. How fast that can be is the disk's to say: its row is
the store's files read from end to end, in pieces of 16 MB.

Writes benchmarks/results/data.json and .md. Sections that are not named keep their results.
"""

import argparse
import io
import json
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from report import RESULTS, arguments_of, processor, write  # noqa: E402
from torch import Tensor  # noqa: E402

from scm_core.data import ImageSet, latent_store, load_images, load_latents, save_images, save_latents  # noqa: E402

TARGETS = {"zip": 5.0, "webdataset": 2.0}  # times faster
COUNTS = {"images": 30_000, "latents": 4_000}
BATCHES = {"images": 256, "latents": 64}
PER_TAR = {"images": 5000, "latents": 500}
SHUFFLE = 1000  # items in webdataset's buffer
ROUNDS = 5
PIECE = 1 << 24
NAMES = {"store": "this store", "zip": "files in a ZIP", "webdataset": "webdataset"}

Batches = Iterator[tuple[Tensor, ...]]


# ---- the data, written in each way -------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    """An image (C, H, W) as an uncompressed PNG file, as EDM2's tool writes it."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_all(kind: str, folder: Path) -> dict[str, list[Path]]:
    """The same random items in each way; the files that each reads."""
    count, generator = COUNTS[kind], torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 1000
    if kind == "images":
        images = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
        save_images(ImageSet(images, labels, "made up"), folder / "store")
        encode, suffix, items = png, "png", images.numpy()
    else:
        both = torch.randn(count, 8, 64, 64, generator=generator)
        mean, std = both[:, :4].contiguous(), both[:, 4:].abs().contiguous()
        save_latents(latent_store(mean, std, labels, 0.5, "made up"), folder / "store")
        encode, suffix, items = npy, "npy", torch.cat([mean, std], dim=1).numpy()
    names = [f"{i // 1000:05d}/img{i:08d}.{suffix}" for i in range(count)]
    tars = [folder / f"{k:04d}.tar" for k in range(count // PER_TAR[kind])]
    with zipfile.ZipFile(folder / "items.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in tars:
            with tarfile.open(path, "w") as tar:
                for i in range(int(path.stem) * PER_TAR[kind], (int(path.stem) + 1) * PER_TAR[kind]):
                    data = encode(items[i])
                    archive.writestr(names[i], data)
                    for ending, content in ((suffix, data), ("cls", str(int(labels[i])).encode())):
                        member = tarfile.TarInfo(f"{i:08d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        described = {"labels": [[name, int(label)] for name, label in zip(names, labels, strict=True)]}
        archive.writestr("dataset.json", json.dumps(described))
    files = {"store": sorted((folder / "store").iterdir()), "zip": [folder / "items.zip"], "webdataset": tars}
    for path in (path for paths in files.values() for path in paths):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return files


# ---- the ways to read them ---------------------------------------------------------------------------------------------------


def from_store(kind: str, files: list[Path], order: Tensor) -> Batches:
    """Gathered from the mapped shards."""
    if kind == "images":
        images = load_images(files[0].parent)
        for index in order.split(BATCHES[kind]):
            yield images.images[index], images.labels[index]
    else:
        store = load_latents(files[0].parent)
        for index in order.split(BATCHES[kind]):
            yield store.mean[index], store.std[index], store.labels[index]


def from_zip(kind: str, files: list[Path], order: Tensor) -> Batches:
    """Each item a file: found in the ZIP's directory, read, decoded, stacked."""
    with zipfile.ZipFile(files[0]) as archive:
        described = json.loads(archive.read("dataset.json"))["labels"]
        for index in order.split(BATCHES[kind]):
            items, labels = [], []
            for i in index.tolist():
                name, label = described[i]
                with archive.open(name) as file:
                    items.append(np.asarray(Image.open(file)).transpose(2, 0, 1) if kind == "images" else np.load(file))
                labels.append(label)
            yield *split(kind, torch.from_numpy(np.stack(items))), torch.tensor(labels)


def from_webdataset(kind: str, files: list[Path], order: Tensor) -> Batches:
    """Shards in random order, streamed through a shuffle buffer; `order` gives no more than the seed."""
    import webdataset

    seed = int(order[0])
    stream = webdataset.WebDataset([str(path) for path in files], shardshuffle=len(files), seed=seed, empty_check=False)
    stream = stream.shuffle(SHUFFLE, rng=random.Random(seed))
    pair = stream.decode("rgb8").to_tuple("png" if kind == "images" else "npy", "cls")
    for items, labels in pair.batched(BATCHES[kind], collation_fn=lambda rows: tuple(zip(*rows, strict=True))):
        array = np.stack(items)
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if kind == "images" else array
        yield *split(kind, torch.from_numpy(array)), torch.tensor(labels)


def split(kind: str, items: Tensor) -> tuple[Tensor, ...]:
    """Images as they are; latents as mean and standard deviation."""
    return (items,) if kind == "images" else tuple(items.chunk(2, dim=1))


WAYS: dict[str, Callable[[str, list[Path], Tensor], Batches]] = {
    "store": from_store,
    "zip": from_zip,
    "webdataset": from_webdataset,
}


# ---- measuring ---------------------------------------------------------------------------------------------------------------


def drop(files: list[Path]) -> None:
    """Have the kernel forget the files' pages, none of which may be mapped."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_from_disk() -> int:
    """What this process has had the kernel read from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def read_through(files: list[Path]) -> float:
    """Seconds to read the files in order, which is as fast as the disk is."""
    start = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(PIECE):
                pass
    return time.perf_counter() - start


def epoch(way: str, kind: str, files: list[Path], seed: int) -> tuple[float, int, Tensor]:
    """Seconds and bytes from the disk of an epoch, and the labels that came out, in order."""
    order = torch.randperm(COUNTS[kind], generator=torch.Generator().manual_seed(seed))
    labels = []
    before, start = bytes_from_disk(), time.perf_counter()
    for *_, found in WAYS[way](kind, files, order):
        labels.append(found)
    return time.perf_counter() - start, bytes_from_disk() - before, torch.cat(labels)


def check(kind: str, files: dict[str, list[Path]]) -> None:
    """All ways give the same items: those of two of them by index, webdataset's by what is in them."""
    order = torch.randperm(COUNTS[kind], generator=torch.Generator().manual_seed(0))[: BATCHES[kind]]
    ours, theirs = (next(iter(WAYS[way](kind, files[way], order))) for way in ("store", "zip"))
    if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise RuntimeError(f"{kind}: the ZIP gives other items than the store")
    for *parts, labels in WAYS["webdataset"](kind, files["webdataset"], order):
        known = next(iter(from_store(kind, files["store"], torch.arange(COUNTS[kind])[labels[0] :: 1000])))
        if not any(torch.equal(parts[0][0], item) for item in known[0]):
            raise RuntimeError(f"{kind}: webdataset gives other items than the store")
        break


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """Rates of every way, warm and cold, in rounds."""
    files = write_all(kind, folder)
    check(kind, files)
    expected = (torch.arange(COUNTS[kind]) % 1000).sort().values
    found: dict[str, Any] = {
        "count": COUNTS[kind],
        "batch": BATCHES[kind],
        "megabytes": {way: sum(path.stat().st_size for path in paths) / 1e6 for way, paths in files.items()},
    }
    for state in ("warm", "cold"):
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        read: dict[str, list[int]] = {way: [] for way in WAYS}
        disk_seconds = []
        for turn in range(ROUNDS + 1):
            if state == "cold":
                drop(files["store"])
                disk_seconds.append(read_through(files["store"]))
            for way in WAYS:
                if state == "cold":
                    drop(files[way])
                taken, disk, labels = epoch(way, kind, files[way], turn)
                if not torch.equal(labels.sort().values, expected):
                    raise RuntimeError(f"{way}: not every item came once")
                if turn:  # the first warms up
                    seconds[way].append(taken)
                    read[way].append(disk)
        found[state] = {
            way: {
                "per_second": COUNTS[kind] / statistics.median(seconds[way]),
                "range": [COUNTS[kind] / max(seconds[way]), COUNTS[kind] / min(seconds[way])],
                "megabytes_from_disk": statistics.median(read[way]) / 1e6,
            }
            for way in WAYS
        }
        if disk_seconds:
            found["disk_per_second"] = COUNTS[kind] / statistics.median(disk_seconds)
        print(kind, state, {way: round(values["per_second"]) for way, values in found[state].items()}, flush=True)
    return found


# ---- the page ----------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    versions = {name: version(name) for name in ("torch", "numpy", "pillow", "webdataset")}
    return {"processor": processor(), "python": platform.python_version(), **versions}


def ratio(rates: dict[str, Any], other: str) -> float:
    """How many times faster the store is."""
    return rates["store"]["per_second"] / rates[other]["per_second"]


def markdown(report: dict[str, Any]) -> str:
    """The page."""
    m = report["machine"]
    lines = [
        "# Reading data",
        "",
        f"Items per second of one process on one thread: whole epochs in random order, medians of {ROUNDS} rounds with the range in "
        f"brackets. {m['processor']}; Python {m['python']}, torch {m['torch']}, NumPy {m['numpy']}, Pillow {m['pillow']}, webdataset "
        f"{m['webdataset']}. "
        "`python benchmarks/bench_data.py` says what is compared.",
    ]
    for kind, found in report["sections"].items():
        what = "64×64 RGB images" if kind == "images" else "latents (mean and standard deviation, 4×64×64 each)"
        lines += ["", f"## {found['count']:,} {what}, batches of {found['batch']}", ""]
        lines += ["| way | on disk | warm | cold | read from the disk, cold |", "|---|---|---|---|---|"]
        for way, name in NAMES.items():
            cells = [f"{found['megabytes'][way]:.0f} MB"]
            for state in ("warm", "cold"):
                rate = found[state][way]
                low, high = rate["range"]
                cells.append(f"{rate['per_second']:,.0f} ({low:,.0f}–{high:,.0f})")
            lines.append(f"| {name} | {' | '.join(cells)} | {found['cold'][way]['megabytes_from_disk']:.0f} MB |")
        lines.append(f"| the disk, in order | | | {found['disk_per_second']:,.0f} | |")
        lines += ["", "| the store is faster than | target | warm | cold |", "|---|---|---|---|"]
        for other, target in TARGETS.items():
            ratios = [ratio(found[state], other) for state in ("warm", "cold")]
            cells = [f"{value:.1f}× {'met' if value >= target else '**missed**'}" for value in ratios]
            lines.append(f"| {NAMES[other]} | {target:g}× | {' | '.join(cells)} |")
    lines += ["", "Cold, a way that keeps up with the disk cannot be overtaken by more than the disk has left."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the sections that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where the files are written, on the disk to measure; removed afterwards"
    )
    arguments = arguments_of(parser, "section", COUNTS)
    torch.set_num_threads(1)
    path = RESULTS / "data.json"
    sections: dict[str, Any] = json.loads(path.read_text())["sections"] if path.exists() else {}
    for kind in arguments.sections or COUNTS:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            sections[kind] = measure(kind, Path(folder))
    write(
        {"machine": machine(), "sections": {kind: sections[kind] for kind in COUNTS if kind in sections}},
        path,
        markdown,
    )


if __name__ == "__main__":
    main()
