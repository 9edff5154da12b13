# SPDX-License-Identifier: Apache-2.0
"""Encoding an image set: what is written, shared work, kills and full disks, and what is refused."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scm_core.data import ImageSet, encode_images, finish_latents, from_uint8, load_latents, writing
from scm_core.data.encoding import encode_set
from scm_core.disk import StoreError, file_digest
from scm_core.vae import VAE

COUNT, BATCH, PER_SHARD = 50, 4, 10
DISK = "80k"  # the store takes 26 kB, a shard's draft among them
CONTEXT = multiprocessing.get_context("fork")
CHANNEL_MEAN, CHANNEL_STD = (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)  # the paper's


@pytest.fixture
def images() -> ImageSet:
    pixels = torch.randint(0, 256, (COUNT, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(COUNT) % 10, "noise")


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(width=8).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of ten images: a latent takes 4·4·4 float32 twice."""
    monkeypatch.setattr(writing, "SHARD_BYTES", PER_SHARD * 2 * 4 * 64)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def finished(folder: Path, vae: VAE, images: ImageSet) -> dict[str, str]:
    """The digests of the store's files."""
    finish_latents(encode_set(vae, images, folder, BATCH), images.labels, 0.5, images.name)
    return digests(folder)


def test_a_store_holds_what_the_encoder_gives(vae: VAE, images: ImageSet, tmp_path: Path) -> None:
    """In batches that start at each shard's first image; statistics by the law of total variance, over all shards, in float64."""
    seen: list[int] = []
    encode = vae.encode

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        return encode(x)

    vae.encode = counted  # type: ignore[method-assign]
    finished(tmp_path, vae, images)
    assert seen == [4, 4, 2] * 5
    store = load_latents(tmp_path, verify=True)
    mean, std = encode_images(encode, images.images, COUNT)
    torch.testing.assert_close(store.mean[:], mean)
    torch.testing.assert_close(store.std[:], std)
    wide = mean.double()
    variance = wide.var(dim=(0, 2, 3), correction=0) + std.double().square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(store.channel_mean.double(), wide.mean(dim=(0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(store.channel_std.double(), variance.sqrt(), rtol=1e-6, atol=0)
    assert torch.equal(store.labels, images.labels)


@pytest.mark.parametrize("given", [False, True])
def test_scaling_and_back(vae: VAE, images: ImageSet, tmp_path: Path, given: bool) -> None:
    """To 1e-6 of a latent's size, with the measured statistics and with the paper's."""
    writer = encode_set(vae, images, tmp_path, BATCH)
    statistics = (torch.tensor(CHANNEL_MEAN), torch.tensor(CHANNEL_STD)) if given else (None, None)
    finish_latents(writer, images.labels, 0.5, images.name, *statistics)
    store = load_latents(tmp_path)
    if given:
        assert (store.channel_mean.tolist(), store.channel_std.tolist()) == (
            torch.tensor(CHANNEL_MEAN).tolist(),
            torch.tensor(CHANNEL_STD).tolist(),
        )
    latents = store.mean[:] + store.std[:] * torch.randn(store.mean.shape, generator=torch.Generator().manual_seed(1))
    x0 = store.scale(latents)
    for c in range(4):
        expected = (latents[:, c].double() - store.channel_mean[c].double()) * 0.5 / store.channel_std[c].double()
        torch.testing.assert_close(x0[:, c].double(), expected, rtol=1e-6, atol=1e-6)
    assert (store.decode_scale(x0) - latents).abs().max() <= 1e-6 * latents.abs().max().clamp(min=1)


def killed_after(calls: int, vae: VAE, images: ImageSet, folder: Path) -> None:
    """kill -9 a process that encodes, before the call of the encoder with that number."""
    encode = vae.encode

    def encoding() -> None:
        left = calls

        def counted(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return encode(x)

        vae.encode = counted  # type: ignore[method-assign]
        encode_set(vae, images, folder, BATCH)

    child = CONTEXT.Process(target=encoding)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("calls", [0, 3, 6, 8, 14])
def test_a_killed_encoding_goes_on_to_the_same_bytes(vae: VAE, images: ImageSet, tmp_path: Path, calls: int) -> None:
    """Killed before the first shard, between shards (3 and 6 batches) and within one; what was made is not made again."""
    whole = finished(tmp_path / "whole", vae, images)
    assert len([name for name in whole if name.startswith("mean-")]) == COUNT // PER_SHARD
    killed_after(calls, vae, images, tmp_path / "killed")
    seen: list[int] = []
    encode = vae.encode
    vae.encode = lambda x: (seen.append(len(x)), encode(x))[1]  # type: ignore[method-assign, func-returns-value]
    assert finished(tmp_path / "killed", vae, images) == whole
    assert len(seen) == 15 - 3 * (calls // 3)


def test_several_processes_make_the_same_bytes(
    vae: VAE, images: ImageSet, tmp_path: Path, processes: Callable[..., list[int]]
) -> None:
    """Each makes some, nobody makes what another has; any of them may end it."""
    whole = finished(tmp_path / "whole", vae, images)
    begin = CONTEXT.Barrier(3)

    def encoding(rank: int) -> int:
        made, encode = 0, vae.encode

        def counted(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal made
            made += len(x)
            time.sleep(0.1)  # as long as a network takes: nobody is done before all have begun
            return encode(x)

        begin.wait(60)
        vae.encode = counted  # type: ignore[method-assign]
        encode_set(vae, images, tmp_path / "shared", BATCH, shard=(rank, 3))
        return made

    made = processes(encoding, 3)
    assert (sum(made), min(made) > 0) == (COUNT, True)
    assert finished(tmp_path / "shared", vae, images) == whole


def test_a_full_disk_in_the_middle(vae: VAE, images: ImageSet, tmp_path: Path, small_disk: Path) -> None:
    """The first shards stay; with space again the encoding goes on to the same bytes."""
    whole = finished(tmp_path / "whole", vae, images)
    folder, encode, calls = small_disk / "latents", vae.encode, 0

    def filling(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 8:  # in the third shard
            (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free))
        return encode(x)

    vae.encode = filling  # type: ignore[method-assign]
    with pytest.raises(
        StoreError, match=r"writing shard 2 failed: No space left on device; free some space there and start again"
    ):
        encode_set(vae, images, folder, BATCH)
    (small_disk / "other").unlink()
    seen: list[int] = []
    vae.encode = lambda x: (seen.append(len(x)), encode(x))[1]  # type: ignore[method-assign, func-returns-value]
    assert finished(folder, vae, images) == whole
    assert len(seen) == 9, "batches of the three shards that were not there"


@pytest.mark.parametrize(("spoiled", "value"), [(0, torch.nan), (0, torch.inf), (1, torch.nan), (1, 300.0)])
def test_latents_that_are_not_finite_are_named_and_not_written(
    vae: VAE, images: ImageSet, tmp_path: Path, spoiled: int, value: float
) -> None:
    """Mean or log-variance; e^150 is no float32."""
    encode, bad = vae.encode, from_uint8(images.images[25:26])

    def broken(x: Tensor) -> tuple[Tensor, Tensor]:
        result = encode(x)
        result[spoiled][(x == bad).all(dim=(1, 2, 3))] = value
        return result

    vae.encode = broken  # type: ignore[method-assign]
    words = r"image set noise, images 24…27: the encoder returned NaN or infinite latents; check the VAE's weights"
    with pytest.raises(StoreError, match=words):
        encode_set(vae, images, tmp_path, BATCH)
    assert {path.name for path in tmp_path.glob("mean-*")} == {"mean-00000.npy", "mean-00001.npy"}


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 16, 16), "its images are 3×16×16, and the VAE takes 1 channels and sides that are multiples of 4"),
        ((1, 18, 16), "its images are 1×18×16, and the VAE takes 1 channels and sides that are multiples of 4"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_made(
    vae: VAE, tmp_path: Path, shape: tuple[int, ...], words: str
) -> None:
    images = ImageSet(torch.zeros(2, *shape, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "other")
    with pytest.raises(StoreError, match=f"image set other: {words}"):
        encode_set(vae, images, tmp_path / "s", BATCH)
    assert not (tmp_path / "s").exists()


def test_progress_counts_images(vae: VAE, images: ImageSet, tmp_path: Path) -> None:
    seen: list[int] = []
    encode_set(vae, images, tmp_path, BATCH, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == COUNT
