# SPDX-License-Identifier: Apache-2.0
"""Seeds derived from what they are for, so that randomness depends on neither batch size, process count nor resumption."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from names and numbers; hashed, because sums such as seed + step make neighbouring seeds share streams."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def generator_for(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


class Shard(torch.Generator):
    """The generator of a training step for its samples `start` to `start + count` of `total`.

    `normal` and `uniform` draw with it what a generator for all samples would give, and keep this part: a step's numbers depend neither
    on how it is cut into accumulated parts nor on the number of processes. The price is numbers drawn in vain.
    """

    total: int
    start: int
    count: int

    def __new__(cls, seed: int, total: int, start: int, count: int, device: torch.device | str = "cpu") -> Self:
        shard = super().__new__(cls, device)  # type: ignore[call-arg]
        shard.total, shard.start, shard.count = total, start, count
        shard.manual_seed(seed)
        return shard

    def __init__(self, *arguments: object, **options: object) -> None:
        """All is done in `__new__`, whose base takes no further arguments."""


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit Gaussian numbers of shape (samples, …), on the generator's device; a `Shard`'s own part of its step's."""
    return _draw(torch.randn, generator, shape, dtype)


def uniform(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) of shape (samples, …), on the generator's device; a `Shard`'s own part of its step's."""
    return _draw(torch.rand, generator, shape, dtype)


def _draw(
    function: Callable[..., Tensor], generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    options = {"generator": generator, "dtype": dtype, "device": generator.device}
    if not isinstance(generator, Shard):
        return function(*shape, **options)
    if shape[0] != generator.count:
        raise ValueError(f"shape: expected {generator.count} samples, those of the shard, got {tuple(shape)}")
    return function(generator.total, *shape[1:], **options).narrow(0, generator.start, generator.count)


def sample_noise(indices: Sequence[int], shape: Sequence[int], stream: str = "z") -> Tensor:
    """Unit Gaussian noise (len(indices), *shape) in which each sample depends on its own index and the stream's name alone."""
    return torch.stack([torch.randn(*shape, generator=generator_for("sample", stream, index)) for index in indices])
