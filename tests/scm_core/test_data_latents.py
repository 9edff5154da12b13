# SPDX-License-Identifier: Apache-2.0
"""Latent stores: scaling to σ_d, sampling, disk; and the order of the data."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scm_core.data import BatchOrder, LatentStore, encode_images, from_uint8, latent_store, load_latents, save_latents


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store() -> LatentStore:
    scale = torch.tensor([0.5, 2.0, 5.0])[:, None, None]
    mean = normal(400, 3, 4, 4, seed=0) * scale + torch.tensor([1.0, -2.0, 0.0])[:, None, None]
    std = (normal(400, 3, 4, 4, seed=1) * 0.3).exp() * scale
    return latent_store(mean, std, torch.arange(400) % 10, sigma_data=0.5, name="toy")


def test_samples_have_mean_zero_and_standard_deviation_sigma_data(store: LatentStore) -> None:
    generator = torch.Generator().manual_seed(100)  # not the seed the means were drawn with
    x0 = torch.cat([store.sample(torch.arange(400), generator) for _ in range(20)])
    for channel in range(3):
        values = x0[:, channel]
        # The store's own mean and variance are exact; 128,000 draws of ε leave an error of about 0.3%.
        assert abs(float(values.mean())) < 0.01
        assert float(values.std()) == pytest.approx(0.5, rel=0.01)


def test_given_scaling_is_the_papers_formula() -> None:
    mean, std = normal(5, 4, 2, 2, seed=0), torch.zeros(5, 4, 2, 2)
    channel_mean = torch.tensor([1.56, -0.695, 0.483, 0.729])
    channel_std = torch.tensor([5.27, 5.91, 4.21, 4.31])
    store = latent_store(mean, std, torch.zeros(5, dtype=torch.int64), 0.5, "x", channel_mean, channel_std)
    x0 = store.sample(torch.tensor([3]))
    for c in range(4):
        torch.testing.assert_close(x0[0, c], (mean[3, c] - channel_mean[c]) * 0.5 / channel_std[c])


def test_decode_scale_inverts_scale(store: LatentStore) -> None:
    latents = normal(7, 3, 4, 4, seed=2)
    torch.testing.assert_close(store.decode_scale(store.scale(latents)), latents, rtol=1e-5, atol=1e-6)
    wide = latents.double()
    assert store.scale(wide).dtype == torch.float64


def test_sampling_noise_comes_from_the_generator(store: LatentStore) -> None:
    index = torch.tensor([5, 5, 9])
    x0 = store.sample(index, torch.Generator().manual_seed(1))
    assert torch.equal(x0, store.sample(index, torch.Generator().manual_seed(1)))
    assert not torch.equal(x0[0], x0[1])
    eps = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(store.decode_scale(x0), store.mean[index] + store.std[index] * eps, rtol=1e-4, atol=1e-5)


def test_encoding_in_batches() -> None:
    images = torch.randint(0, 256, (10, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = encode_images(lambda x: (x * 2, x), images, batch=3)
    torch.testing.assert_close(mean, from_uint8(images) * 2)
    torch.testing.assert_close(std.square(), from_uint8(images).exp())
    with pytest.raises(ValueError, match="NaN"):
        encode_images(lambda x: (x * torch.nan, x), images)
    with pytest.raises(ValueError, match="infinite"):
        encode_images(lambda x: (x, 200 * x.abs().add(1)), images)  # finite, but not its exponential
    with pytest.raises(ValueError, match="batch must be"):
        encode_images(lambda x: (x, x), images, batch=0)


def test_latents_survive_the_disk(store: LatentStore, tmp_path: Path) -> None:
    save_latents(store, tmp_path)
    loaded = load_latents(tmp_path)
    for name in ("mean", "std", "labels", "channel_mean", "channel_std"):
        assert torch.equal(getattr(loaded, name)[:], getattr(store, name))
    assert torch.equal(
        loaded.sample(torch.tensor([7, 399, 7]), torch.Generator().manual_seed(0)),
        store.sample(torch.tensor([7, 399, 7]), torch.Generator().manual_seed(0)),
    )
    assert (loaded.sigma_data, loaded.name, loaded.shape, len(loaded)) == (0.5, "toy", (3, 4, 4), 400)
    data = bytearray((tmp_path / "std-00000.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "std-00000.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"std-00000\.npy is corrupt"):
        load_latents(tmp_path, verify=True)


def test_impossible_latents_are_refused() -> None:
    mean, labels = normal(5, 4, 2, 2, seed=0), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="channel_std must be finite and > 0"):
        latent_store(mean * 0, mean * 0, labels, 0.5, "flat")
    with pytest.raises(ValueError, match="disagree"):
        latent_store(mean, mean[:3], labels, 0.5, "x")
    for sigma_data in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma_data must be finite and > 0"):
            latent_store(mean, mean.abs(), labels, sigma_data, "x")
    with pytest.raises(ValueError, match="channel_mean must be finite"):
        latent_store(mean, mean.abs(), labels, 0.5, "x", torch.full((4,), math.nan), torch.ones(4))
    good = latent_store(mean, mean.abs(), labels, 0.5, "x")
    for key, wrong in (
        ("mean", mean.half()), ("std", mean.double()), ("labels", labels.int()), ("labels", labels.float()),
        ("channel_mean", good.channel_mean.double()), ("channel_std", good.channel_std.bfloat16()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"latents x: {key} must be torch.(float32|int64), got {wrong.dtype}"):
            replace(good, **{key: wrong})
    with pytest.raises(ValueError, match="both or neither"):
        latent_store(mean, mean.abs(), labels, 0.5, "x", channel_mean=torch.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        latent_store(mean, mean.abs(), labels, 0.5, "x", torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (100, 33), (1, 2)])
def test_every_epoch_is_a_permutation(n: int, batch: int) -> None:
    order = BatchOrder(n, batch, seed=0)
    stream = torch.cat([order.indices(step) for step in range(4 * n // batch + 2)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_order_depends_on_the_step_alone() -> None:
    walked, jumped = BatchOrder(50, 16, seed=3), BatchOrder(50, 16, seed=3)
    steps = {step: walked.indices(step) for step in range(40)}
    for step in reversed(range(40)):
        assert torch.equal(jumped.indices(step), steps[step])
    assert walked.images_seen(40) == 640


def test_epochs_and_seeds_differ() -> None:
    # the seed of an epoch: SHA-256 of what it is for
    seed = int.from_bytes(hashlib.sha256(b"batch order 3 5").digest()[:8], "little") >> 1
    expected = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(BatchOrder(100, 10, seed=3).permutation(5), expected)
    permutations = [BatchOrder(100, 10, seed).permutation(epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(p.tolist()) for p in permutations}) == 9


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="batch must be"):
        BatchOrder(10, 0, 0)
    with pytest.raises(ValueError, match="n must be"):
        BatchOrder(0, 1, 0)
    with pytest.raises(ValueError, match="step must be"):
        BatchOrder(10, 1, 0).indices(-1)
