# SPDX-License-Identifier: Apache-2.0
"""Small data sets in exactly the formats in which CIFAR-10, ImageNet and people's own images come."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from scm_core.data.sources import cifar10

WNIDS = ("n01440764", "n01443537", "n02105855", "n15075141")
PER_CLASS = 5


def encoded(seed: int, size: tuple[int, int] = (40, 32), mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """A smooth random picture of (width, height) as a file's bytes."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (4, 5, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8
    )
    planes = [Image.fromarray(coarse[..., k]).resize(size, Image.Resampling.BICUBIC) for k in range(coarse.shape[2])]
    image = Image.merge(mode, planes) if len(planes) > 1 else planes[0].convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def imagenet_files() -> dict[str, bytes]:
    """`n01440764/n01440764_12.JPEG` → bytes; among them a CMYK file, a grey one, and a PNG, as ImageNet has them; sizes differ."""
    files = {}
    for c, wnid in enumerate(WNIDS):
        for k in range(PER_CLASS):
            seed = 10 * c + k
            mode, kind = {(2, 1): ("RGB", "PNG"), (1, 0): ("CMYK", "JPEG"), (1, 2): ("L", "JPEG")}.get(
                (c, k), ("RGB", "JPEG")
            )
            files[f"{wnid}/{wnid}_{7 * k + 3}.JPEG"] = encoded(seed, (37 + 5 * k, 70 - 9 * k), mode, kind)
    return files


def write_tree(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The files below a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar_bytes(files: Mapping[str, bytes]) -> bytes:
    """A tar, uncompressed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def class_tars(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """`n01440764.tar` → bytes, its images without folder; neither classes nor images in order."""
    inside: dict[str, dict[str, bytes]] = {}
    for name, data in reversed(files.items()):
        wnid, file = name.split("/")
        inside.setdefault(wnid, {})[file] = data
    return {f"{wnid}.tar": tar_bytes(images) for wnid, images in inside.items()}


def write_parquet(folder: Path, files: Mapping[str, bytes], shards: int = 2, group: int = 3) -> Path:
    """train-00000-of-00002.parquet, … with the columns image {bytes, path} and label, shuffled, paths as in imagenet-1k's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    names = list(files)
    np.random.default_rng(0).shuffle(names)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for k in range(shards):
        rows = [
            {"bytes": files[name], "path": f"{Path(name).stem}_{name.split('/')[0]}.JPEG"} for name in names[k::shards]
        ]
        labels = [WNIDS.index(name.split("/")[0]) for name in names[k::shards]]
        table = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
        pq.write_table(table, folder / f"train-{k:05d}-of-{shards:05d}.parquet", row_group_size=group)
    return folder


def cifar10_archive(path: Path, per_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """An archive of CIFAR-10's binary version with other images; the training set's images and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * per_batch, 3, 32, 32), dtype=np.uint8)
    labels = rng.permutation(np.arange(6 * per_batch) % 10).astype(np.uint8)
    records = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    parts = {name: part.tobytes() for name, part in zip(names, np.split(records, 6), strict=True)}
    parts |= {"batches.meta.txt": ("\n".join(cifar10.CLASSES) + "\n\n").encode(), "readme.html": b"<html></html>"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in ("batches.meta.txt", "data_batch_1.bin", "data_batch_5.bin", "data_batch_2.bin", *parts):
            if name in parts:
                member = tarfile.TarInfo(f"{cifar10.TOP}/{name}")
                data = parts.pop(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return images[: 5 * per_batch], labels[: 5 * per_batch].astype(np.int64)


def write_zip(path: Path, files: Mapping[str, bytes], labels: Mapping[str, int] | None = None) -> Path:
    """An uncompressed ZIP with dataset.json if there are labels: the layout of EDM2's dataset tool."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in files.items():
            file.writestr(name, data)
        if labels is not None:
            file.writestr("dataset.json", json.dumps({"labels": [[name, label] for name, label in labels.items()]}))
    return path
