# SPDX-License-Identifier: Apache-2.0
"""DINOv2 against a plain network in float64, its pixels against Pillow, and the files that are not its weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from scm_core.compat import prepare_torchvision
from scm_core.evaluate.dinov2 import VitSize, load_dinov2, normalize, resample_positions, resize_bicubic

TINY = VitSize(dim=24, depth=2, heads=3)
PATCHES = 37  # along each side of the 518×518 images of DINOv2's training


def random_weights(size: VitSize = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Weights under the publisher's names, large enough that attention, layer scales and GELU all matter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, around: float = 0.0, scale: float = 0.5) -> Tensor:
        return around + scale * torch.randn(*shape, generator=generator)

    dim = size.dim
    tensors = {
        "cls_token": draw(1, 1, dim),
        "mask_token": draw(1, dim),
        "pos_embed": draw(1, 1 + PATCHES**2, dim),
        "patch_embed.proj.weight": draw(dim, 3, 14, 14, scale=0.05),
        "patch_embed.proj.bias": draw(dim),
        "norm.weight": draw(dim, around=1.0),
        "norm.bias": draw(dim),
    }
    for i in range(size.depth):
        for norm, scale in (("norm1", "ls1"), ("norm2", "ls2")):
            tensors[f"blocks.{i}.{norm}.weight"] = draw(dim, around=1.0)
            tensors[f"blocks.{i}.{norm}.bias"] = draw(dim)
            tensors[f"blocks.{i}.{scale}.gamma"] = draw(dim, around=1.0)
        for layer, out, inner in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            tensors[f"blocks.{i}.{layer}.weight"] = draw(out, inner, scale=inner**-0.5)
            tensors[f"blocks.{i}.{layer}.bias"] = draw(out)
    return tensors


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pth"
    torch.save(random_weights(), path)
    return path


def cubic_weights(position: float, n: int) -> np.ndarray:
    """Weights (n,) of Keys' cubic convolution with a = −3/4 at a position between samples 0 … n−1, the edges repeated."""
    weights, a = np.zeros(n), -0.75
    for i in range(math.floor(position) - 1, math.floor(position) + 3):
        s = abs(position - i)
        inner = (a + 2) * s**3 - (a + 3) * s**2 + 1
        outer = a * (s**3 - 5 * s**2 + 8 * s - 4)
        weights[min(max(i, 0), n - 1)] += inner if s <= 1 else outer if s < 2 else 0.0
    return weights


def plain_positions(embedding: Tensor, grid: int) -> Tensor:
    """The positional embedding at grid², by sums over all patches: patch i lies at (i + ½)·n/(grid + 0.1) − ½."""
    n = math.isqrt(embedding.shape[1] - 1)
    rows = np.stack([cubic_weights((i + 0.5) * n / (grid + 0.1) - 0.5, n) for i in range(grid)])
    patches = embedding[0, 1:].double().numpy().reshape(n, n, -1)
    resampled = np.einsum("yi,xj,ijd->yxd", rows, rows, patches).reshape(grid * grid, -1)
    return torch.cat([embedding[0, :1].double(), torch.from_numpy(resampled)])


def plain_dinov2(tensors: dict[str, Tensor], size: VitSize, image: Tensor) -> Tensor:
    """The class token (D,) of one normalised image (3, 224, 224), a token, a head and a product at a time, in float64."""
    w = {name: value.double() for name, value in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    kernel = w["patch_embed.proj.weight"].reshape(size.dim, -1)
    tokens = [w["cls_token"][0, 0]]
    for row in range(16):
        for column in range(16):
            patch = image.double()[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
            tokens.append(kernel @ patch.reshape(-1) + w["patch_embed.proj.bias"])
    x = torch.stack(tokens) + plain_positions(tensors["pos_embed"], 16)
    width = size.dim // size.heads
    for i in range(size.depth):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(size.dim, dim=-1)
        heads = []
        for part in (slice(h * width, (h + 1) * width) for h in range(size.heads)):
            scores = (q[:, part] @ k[:, part].T / math.sqrt(width)).exp()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v[:, part])
        x = x + w[f"blocks.{i}.ls1.gamma"] * linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + w[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[0]


def test_the_network_equals_a_plain_one(tiny_file: Path) -> None:
    images = normalize(torch.randint(256, (3, 3, 224, 224), dtype=torch.uint8))
    with torch.no_grad():
        found = load_dinov2(tiny_file, TINY)(images)
    expected = torch.stack([plain_dinov2(random_weights(), TINY, image) for image in images])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)  # of values that vary by 1


@pytest.mark.parametrize(("n", "grid"), [(37, 16), (16, 37), (5, 4)])
def test_positions_are_resampled_as_dinov2_does(n: int, grid: int) -> None:
    embedding = torch.randn(1, 1 + n * n, 6)
    found = resample_positions(embedding, grid)
    torch.testing.assert_close(found[0].double(), plain_positions(embedding, grid), rtol=0, atol=1e-5)


def test_positions_of_the_right_number_stay() -> None:
    embedding = torch.randn(1, 257, 6)
    assert torch.equal(resample_positions(embedding, 16), embedding)
    with pytest.raises(ValueError, match=r"must be \(1, 1 \+ n², D\), got \(1, 20, 6\)"):
        resample_positions(embedding[:, :20], 16)


@pytest.mark.parametrize("shape", [(32, 32), (512, 512), (224, 224), (100, 300)], ids=str)
def test_every_pixel_is_pillows(shape: tuple[int, int]) -> None:
    images = torch.randint(256, (5, 3, *shape), dtype=torch.uint8)
    found = resize_bicubic(images)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    for image, resized in zip(images, found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy(), mode="RGB")
        expected = np.array(picture.resize((224, 224), Image.Resampling.BICUBIC))
        assert np.array_equal(resized.permute(1, 2, 0).numpy(), expected)


def test_shrinking_is_antialiased() -> None:
    """A checkerboard of single pixels is grey at half its size; picking pixels would leave it black and white."""
    board = 255 * ((torch.arange(448)[:, None] + torch.arange(448)) % 2).to(torch.uint8)
    grey = resize_bicubic(board.expand(1, 3, 448, 448))[..., 4:-4, 4:-4].float()
    assert (grey - 127.5).abs().max() <= 1.5


def test_pixels_are_normalised_as_torchvision_does() -> None:
    prepare_torchvision()
    from torchvision import transforms

    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    theirs = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    expected = torch.stack([theirs(image.permute(1, 2, 0).numpy()) for image in images])
    assert torch.equal(normalize(images), expected)


def test_both_formats_of_the_weights_are_read(tiny_file: Path, tmp_path: Path) -> None:
    """timm publishes the same names as safetensors, without the mask token."""
    timms = {name: value for name, value in random_weights().items() if name != "mask_token"}
    save_file(timms, str(tmp_path / "model.safetensors"))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = [load_dinov2(path, TINY)(images) for path in (tiny_file, tmp_path / "model.safetensors")]
    assert torch.equal(*features)


def test_half_precision_weights_compute_in_float32(tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in random_weights().items()}, tmp_path / "half.pth")
    network = load_dinov2(tmp_path / "half.pth", TINY)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


def test_other_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"

    def refusal(tensors: dict[str, Tensor], size: VitSize = TINY) -> str:
        torch.save(tensors, path)
        with pytest.raises(ValueError, match="weights of another network") as error:
            load_dinov2(path, size)
        return str(error.value)

    weights = random_weights()
    assert str(path) in refusal(weights | {"register_tokens": torch.zeros(1, 4, 24)})
    assert "with unexpected register_tokens" in refusal(weights | {"register_tokens": torch.zeros(1, 4, 24)})
    missing = {name: value for name, value in weights.items() if name != "blocks.1.ls2.gamma"}
    assert "without blocks.1.ls2.gamma" in refusal(missing)
    assert "without pos_embed" in refusal({name: value for name, value in weights.items() if name != "pos_embed"})
    wider = refusal(random_weights(VitSize(dim=36, depth=2, heads=3)))
    assert "of other shapes: blocks.0.attn.proj.bias" in wider
    assert "more" in wider
    deeper = refusal(random_weights(VitSize(dim=24, depth=3, heads=3)))
    assert "with unexpected blocks.2.attn.proj.bias" in deeper
    assert "\n" not in wider + deeper
