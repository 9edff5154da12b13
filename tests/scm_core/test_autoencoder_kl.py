# SPDX-License-Identifier: Apache-2.0
"""Published autoencoders: equal to diffusers' own, read from its folders and from older ones, refused by name."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save_file

from scm_core import autoencoder_kl
from scm_core.autoencoder_kl import CONFIG, KNOWN, WEIGHTS, Known, load_pretrained
from scm_core.compat import prepare_torchvision
from scm_core.nn.build import load_model, save_model
from scm_core.published import PublishedFile

prepare_torchvision()
diffusers = pytest.importorskip("diffusers")

LEVELS = 3
ROOT = Path(__file__).resolve().parents[2]


def tiny(**changes: Any) -> Any:
    """A small network of diffusers' class whose weights are not those of its initialisation alone: biases, too, are random."""
    torch.manual_seed(1)
    arguments = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
        "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    network = diffusers.AutoencoderKL(**{**arguments, **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What diffusers' save_pretrained writes."""
    tiny().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def images(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def offline(url: str) -> io.BytesIO:
    raise URLError("Network is unreachable")


def test_encoding_and_decoding_are_diffusers_own(folder: Path, tmp_path: Path) -> None:
    """Before and after the model file of this project, whose weights lie in another memory layout."""
    oracle, x = tiny(), images()
    net, config, info = load_pretrained(folder, sha256(folder / WEIGHTS))
    assert info == {"source": "vae", "sha256": sha256(folder / WEIGHTS)}
    save_model(tmp_path / "vae.safetensors", net.state_dict(), config, info)
    stored = load_model(tmp_path / "vae.safetensors")
    assert stored.info == info
    with torch.no_grad():
        posterior = oracle.encode(x).latent_dist
        decoded = oracle.decode(posterior.mean).sample
        for found in (net, stored.net):
            assert (found.channels, found.latent_channels, found.downsampling) == (3, 4, 4)
            mean, logvar = found.encode(x)
            assert mean.shape == (3, 4, 4, 4)
            torch.testing.assert_close(mean, posterior.mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close((logvar / 2).exp(), posterior.std, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.decode(posterior.mean), decoded, rtol=1e-6, atol=1e-6)
    # without Stable Diffusion's factor: this is what the encoder gives
    scaled = posterior.mean * oracle.config.scaling_factor
    assert not torch.allclose(mean, scaled, rtol=0.1)


def test_the_model_file_has_the_same_bytes_each_time(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        net, config, info = load_pretrained(folder, sha256(folder / WEIGHTS))
        save_model(tmp_path / name, net.state_dict(), config, info)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")


@pytest.mark.parametrize("former", [False, True])
def test_names_of_attention_before_and_now(folder: Path, former: bool) -> None:
    """Files of 2022 call the projections query, key, value and proj_attn; the oldest have 1×1 convolutions there."""
    x, digest = images(), sha256(folder / WEIGHTS)
    expected = load_pretrained(folder, digest).net.encode(x)[0]
    tensors, old = load_file(folder / WEIGHTS), {}
    for name, value in tensors.items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if former and f".attentions.0.{now}." in name:
                name = name.replace(now, then)
                value = value[:, :, None, None] if value.ndim == 2 else value
        old[name] = value.contiguous()
    assert (old.keys() != tensors.keys()) is former
    save_file(old, folder / WEIGHTS)
    assert torch.equal(load_pretrained(folder, sha256(folder / WEIGHTS)).net.encode(x)[0], expected)


def test_the_known_config_is_the_published_file() -> None:
    """config.json of stabilityai/sd-vae-ft-mse, made from what is written here, has the published SHA-256."""
    beside = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "sample_size": 256}
    text = json.dumps({**KNOWN["sd-vae-ft-mse"].config, **beside}, indent=2, sort_keys=True) + "\n"
    assert len(text) == 547
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"
    )


def test_the_known_network_has_as_many_numbers_as_its_file_has_room_for() -> None:
    """float32 in safetensors: eight bytes, a header, four bytes for each of 83.7 million numbers in 248 tensors."""
    known = KNOWN["sd-vae-ft-mse"]
    with torch.device("meta"):
        net = autoencoder_kl.AutoencoderKL(**known.config)
    tensors = net.network.state_dict()
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert (len(tensors), net.downsampling, net.latent_channels) == (248, 8, 4)
    header = known.weights.size - 4 * numbers - 8
    assert 248 * 60 < header < 248 * 160, "bytes of the names, shapes and places of 248 tensors"


@pytest.fixture
def published(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small one as a published autoencoder `small`, with an empty folder for weights."""
    content = (folder / WEIGHTS).read_bytes()
    config = json.loads((folder / CONFIG).read_text())
    arguments = {key: value for key, value in config.items() if key not in autoencoder_kl.BESIDE}
    file = PublishedFile(
        f"small/{WEIGHTS}", ("https://host.invalid/w",), hashlib.sha256(content).hexdigest(), len(content), "MIT"
    )
    monkeypatch.setitem(KNOWN, "small", Known(file, arguments))
    monkeypatch.setenv("SCM_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights" / "small" / WEIGHTS


def test_a_published_one_is_fetched_once_and_verified(published: Path, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    first = load_pretrained("small", opener=lambda url: io.BytesIO(content))
    assert published.read_bytes() == content
    assert first.info == {"source": "small", "licence": "MIT", "sha256": sha256(published)}
    second = load_pretrained("small", opener=offline)
    assert torch.equal(first.net.encode(images())[0], second.net.encode(images())[0])


def test_offline_the_message_says_which_file_to_put_where(published: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_pretrained("small", opener=offline)
    for part in (
        str(published),
        "the VAE small",
        "unreachable",
        "https://host.invalid/w",
        "SCM_WEIGHTS",
        f"small/{WEIGHTS}",
    ):
        assert part in str(caught.value)


def test_half_a_download_is_not_kept(published: Path, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()[:-1]
    with pytest.raises(FileNotFoundError, match="gave a file of SHA-256"):
        load_pretrained("small", opener=lambda url: io.BytesIO(content))
    assert list(published.parent.iterdir()) == []


def test_another_file_of_that_name_is_refused(published: Path, folder: Path) -> None:
    published.parent.mkdir(parents=True)
    shutil.copy(folder / WEIGHTS, published)
    with published.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(
        ValueError, match=r"has SHA-256 \w+, \w+ expected for the VAE small: remove it and put .* there"
    ):
        load_pretrained("small", opener=offline)


def test_a_config_beside_a_published_file_is_compared_with_it(published: Path, folder: Path) -> None:
    published.parent.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copy(folder / name, published.parent)
    load_pretrained("small", opener=offline)
    config = json.loads((folder / CONFIG).read_text())
    (published.parent / CONFIG).write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(ValueError, match=r"config\.json describes another network than small: remove it"):
        load_pretrained("small", opener=offline)


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return edit


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without(CONFIG), "config.json is missing: a VAE is one of sd-vae-ft-mse, or a folder that diffusers' save_pretrained wrote"),
        (without(WEIGHTS), "diffusion_pytorch_model.safetensors is missing: save the autoencoder there"),
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json is no JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "must describe an AutoencoderKL (_class_name), it says None"),
        (rewritten(lambda c: c.update(_class_name="VQModel")), "must describe an AutoencoderKL (_class_name), it says 'VQModel'"),
        (rewritten(lambda c: c.update(new_feature=True)), "new_feature is no argument of AutoencoderKL that is known here"),
        (rewritten(lambda c: c.update(down_block_types=["Nothing"] * 3)), "diffusers makes no network of these arguments"),
        (rewritten(lambda c: c.update(norm_num_groups=3)), "diffusers makes no network of these arguments"),
        (rewritten(lambda c: c.update(out_channels=1)), "in_channels and out_channels must be equal, got 3, 1"),
        (rewritten(lambda c: c.update(latent_channels=8)), "holds weights of another network: of other shapes: "),
        (rewritten(lambda c: c.update(layers_per_block=2)), "holds weights of another network: without "),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_autoencoder_is_refused(folder: Path, spoil: Callable[[Path], None], words: str) -> None:
    digest = sha256(folder / WEIGHTS)
    spoil(folder)
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        load_pretrained(folder, digest)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_never_taken_unchecked(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"give the SHA-256 \(64 hex digits\) of its diffusion_pytorch_model\.safetensors, got None"
    ):
        load_pretrained(folder)
    wrong = "0" * 64
    with pytest.raises(ValueError, match=f"{wrong} expected for the VAE .*: give the right file or the right sha256"):
        load_pretrained(folder, wrong)
    with pytest.raises(ValueError, match="sd-vae-ft-mse has a published one; for other weights name their folder"):
        load_pretrained("sd-vae-ft-mse", wrong)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_pretrained(folder, sha256(path))


def test_wrong_images_and_latents_are_named(folder: Path) -> None:
    net = load_pretrained(folder, sha256(folder / WEIGHTS)).net
    with pytest.raises(
        ValueError, match=r"images must be \(B, 3, H, W\) with H and W multiples of 4, got \(1, 1, 16, 16\)"
    ):
        net.encode(images()[:1, :1])
    with pytest.raises(ValueError, match=r"multiples of 4, got \(3, 3, 18, 18\)"):
        net.encode(images(side=18))
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, h, w\), got \(1, 3, 4, 4\)"):
        net.decode(torch.zeros(1, 3, 4, 4))


def test_diffusers_is_not_imported_where_no_published_autoencoder_is_used() -> None:
    code = "import sys, scm_core.nn.build, pipeline.modelling; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
