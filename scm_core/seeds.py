# SPDX-License-Identifier: Apache-2.0
"""Seeds derived from what they are for, so that randomness depends on neither batch size, process count nor resumption."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from names and numbers; hashed, because sums such as seed + step make neighbouring seeds share streams."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def generator_for(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def sample_noise(indices: Sequence[int], shape: Sequence[int], stream: str = "z") -> Tensor:
    """Unit Gaussian noise (len(indices), *shape) in which each sample depends on its own index and the stream's name alone."""
    return torch.stack([torch.randn(*shape, generator=generator_for("sample", stream, index)) for index in indices])
