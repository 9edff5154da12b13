# SPDX-License-Identifier: Apache-2.0
"""Inception v3, DINOv2 and the classifier through our path and through torch-fidelity's; precision; what is refused."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from scm_core.disk import file_digest
from scm_core.evaluate import Moments, extract, frechet_with_error
from scm_core.evaluate.classifier import Classifier, save_classifier
from scm_core.evaluate.dinov2 import VitSize
from scm_core.evaluate.extractors import (
    CLASSIFIER,
    DINOV2,
    INCEPTION,
    Extractor,
    ExtractorIdentity,
    create_extractor,
)
from scm_core.evaluate.fidelity import Dinov2Features
from scm_core.evaluate.weights import WEIGHTS
from scm_core.precision import full_precision

import torch_fidelity  # isort: skip  # after fidelity, which makes its import work
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # isort: skip
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # isort: skip
from torch_fidelity.utils import get_featuresdict_from_dataset  # isort: skip

TINY, TINY_DINOV2 = VitSize(dim=24, depth=2, heads=3), "test-dinov2"


class TinyDinov2(Dinov2Features):
    """The extractor with a network that a test can afford."""

    size = TINY


class Images(torch.utils.data.Dataset):
    """What torch-fidelity takes as an input."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def pictures(count: int, resolution: int, seed: int = 0, contrast: float = 1.0) -> Tensor:
    """Smooth random RGB images (count, 3, resolution, resolution), uint8."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=(resolution, resolution), mode="bilinear")
    return (127.5 + 60 * contrast * fine).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the real Inception v3, with the statistics of its normalisations measured on a few images, so
    that no layer's activations vanish."""
    fetch = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    torch.manual_seed(0)
    with mock.patch(fetch, return_value={}), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3(INCEPTION, ["2048"])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of one batch
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        network.train()(pictures(6, 48))
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import timm

    network = timm.create_model("vit_large_patch14_dinov2", embed_dim=TINY.dim, depth=TINY.depth, num_heads=TINY.heads)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.3 * torch.randn(value.shape, generator=generator) for name, value in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("dinov2") / "tiny.pth"
    torch.save(weights, path)
    torch_fidelity.register_feature_extractor(TINY_DINOV2, TinyDinov2)
    yield path
    del FEATURE_EXTRACTORS_REGISTRY[TINY_DINOV2]


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_classifier(Classifier(channels=3, resolution=32), path)
    return path


def fidelity_fid(name: str, layer: str, weights: Path, fake: Tensor, real: Tensor) -> float:
    """The FID of torch-fidelity's own calculate_metrics."""
    return torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        cuda=False,
        fid=True,
        feature_extractor=name,
        feature_layer_fid=layer,
        feature_extractor_weights_path=str(weights),
        batch_size=16,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]


def our_fid(extractor: Extractor, fake: Tensor, real: Tensor) -> float:
    return frechet_with_error(extract(extractor, fake, 16), Moments.of(extract(extractor, real, 16))).value


def test_inception_measures_what_torch_fidelity_measures(inception_file: Path) -> None:
    fake, real = pictures(18, 32, seed=1), pictures(20, 32, seed=2, contrast=1.3)
    ours = create_extractor(INCEPTION, inception_file, "64", sha256=file_digest(inception_file))
    value = our_fid(ours, fake, real)
    assert value > 0.01
    # theirs takes covariances of float32 features in float64 too, and the root by eigenvalues of a product
    assert value == pytest.approx(fidelity_fid(INCEPTION, "64", inception_file, fake, real), rel=1e-6)


@pytest.mark.slow
def test_inceptions_features_are_torch_fidelitys(inception_file: Path) -> None:
    """All 2048, bit for bit, whether read from the .pth or passed through our own reading; and for any batch."""
    images = pictures(7, 40, seed=3)
    theirs = FeatureExtractorInceptionV3(INCEPTION, ["2048"], str(inception_file))
    expected = get_featuresdict_from_dataset(Images(images), theirs, 7, False, True, False)["2048"]
    extractor = create_extractor(INCEPTION, inception_file, sha256=file_digest(inception_file))
    assert torch.equal(extractor(images), expected)
    assert expected.shape == (7, 2048)
    assert expected.std(0).median() > 0.01
    single = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(single, expected, rtol=1e-6, atol=1e-6)


def test_dinov2_measures_the_same_through_torch_fidelity(dinov2_file: Path) -> None:
    fake, real = pictures(40, 20, seed=1), pictures(50, 20, seed=2) // 2
    value = our_fid(create_extractor(TINY_DINOV2, dinov2_file), fake, real)
    assert value == pytest.approx(fidelity_fid(TINY_DINOV2, "features", dinov2_file, fake, real), rel=1e-6)


def test_the_classifier_measures_the_same_through_torch_fidelity(classifier_file: Path) -> None:
    fake, real = pictures(100, 32, seed=1), pictures(110, 32, seed=2, contrast=1.3)
    value = our_fid(create_extractor(CLASSIFIER, classifier_file), fake, real)
    assert value == pytest.approx(fidelity_fid(CLASSIFIER, "features", classifier_file, fake, real), rel=1e-6)


@pytest.fixture(params=[TINY_DINOV2, CLASSIFIER])
def extractor(request: pytest.FixtureRequest, dinov2_file: Path, classifier_file: Path) -> Extractor:
    return create_extractor(request.param, dinov2_file if request.param == TINY_DINOV2 else classifier_file)


def test_the_batch_does_not_matter(extractor: Extractor) -> None:
    images = pictures(7, 32)
    single = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(extractor(images), single, rtol=1e-6, atol=1e-6)


def test_images_pass_in_chunks(extractor: Extractor) -> None:
    seen: list[int] = []
    extractor.module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    images = pictures(7, 32)
    small = Extractor(extractor.module, extractor.identity, batch=3)
    chunks = torch.cat([extractor(chunk) for chunk in images.split(3)])
    seen.clear()
    assert torch.equal(small(images), chunks)
    assert seen == [3, 3, 1]
    seen.clear()
    extractor(images)
    assert seen == [7]


def test_the_two_large_networks_come_with_a_bound(dinov2_file: Path, classifier_file: Path) -> None:
    assert create_extractor(TINY_DINOV2, dinov2_file).batch == 64
    assert create_extractor(TINY_DINOV2, dinov2_file, batch=5).batch == 5
    assert create_extractor(CLASSIFIER, classifier_file).batch is None
    with pytest.raises(ValueError, match="batch must be ≥ 1, got 0"):
        create_extractor(CLASSIFIER, classifier_file, batch=0)


class Probe(torch_fidelity.FeatureExtractorBase):
    """Notes under which settings it computes, and fails when told to."""

    def __init__(self) -> None:
        super().__init__("probe", ["features"])
        self.seen: dict[str, object] = {}
        self.fail = False

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = images.float().flatten(1)
        self.seen = settings() | {"grad": torch.is_grad_enabled(), "dtype": (x @ x.T).dtype}
        if self.fail:
            raise RuntimeError("out of memory")
        return (x,)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features",)


def settings() -> dict[str, object]:
    backends = torch.backends
    return {
        "products": backends.cuda.matmul.fp32_precision,
        "convolutions": backends.cudnn.conv.fp32_precision,
        "products on the CPU": backends.mkldnn.matmul.fp32_precision,
        "convolutions on the CPU": backends.mkldnn.conv.fp32_precision,
        "benchmark": backends.cudnn.benchmark,
        "deterministic": backends.cudnn.deterministic,
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def by_the_old_names() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def by_the_new_names() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def reset() -> Iterator[None]:
    """torch's defaults after a test that changes them."""
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("faster", [by_the_old_names, by_the_new_names])
@pytest.mark.usefixtures("reset")
def test_features_are_of_full_precision_whatever_is_set(faster: Callable[[], None]) -> None:
    faster()
    torch.backends.cudnn.benchmark = True
    probe = Probe()
    extractor = Extractor(probe, ExtractorIdentity("probe", "features", ""))
    images = pictures(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = settings()
        assert before["products"] == "tf32"
        assert before["autocast"]
        extractor(images)
        assert settings() == before
        probe.fail = True
        with pytest.raises(RuntimeError, match="out of memory"):
            extractor(images)
        assert settings() == before
    assert probe.seen == {
        "products": "ieee",
        "convolutions": "ieee",
        "products on the CPU": "ieee",
        "convolutions on the CPU": "ieee",
        "benchmark": False,
        "deterministic": True,
        "autocast": False,
        "grad": False,
        "dtype": torch.float32,
    }


@pytest.mark.usefixtures("reset")
def test_autocast_does_not_reach_the_features(extractor: Extractor) -> None:
    images = pictures(3, 32)
    expected = extractor(images)
    by_the_old_names()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images), expected)
        with full_precision(torch.device("cpu")):
            assert torch.equal(extractor(images), expected)  # nested


def test_what_identifies_features(inception_file: Path, dinov2_file: Path, classifier_file: Path) -> None:
    own = file_digest(inception_file)
    assert create_extractor(INCEPTION, inception_file, sha256=own).identity.to_json() == {
        "name": "inception-v3-compat",
        "layer": "2048",
        "weights_sha256": own,
        "preprocessing": "tf1-bilinear-299",
        "dtype": "float32",
    }
    assert create_extractor(TINY_DINOV2, dinov2_file).identity == ExtractorIdentity(
        TINY_DINOV2, "features", file_digest(dinov2_file), "pil-bicubic-224", "float32"
    )
    assert create_extractor(CLASSIFIER, classifier_file, "logits").identity == ExtractorIdentity(
        CLASSIFIER, "logits", file_digest(classifier_file), "none", "float32"
    )


def test_other_weights_than_the_published_are_refused(inception_file: Path, tmp_path: Path) -> None:
    found = file_digest(inception_file)
    with pytest.raises(ValueError, match=f"{found}, {WEIGHTS[INCEPTION].sha256} expected for extractor {INCEPTION}"):
        create_extractor(INCEPTION, inception_file)
    wrong = hashlib.sha256(b"").hexdigest()
    with pytest.raises(ValueError, match=f"{found}, {wrong} expected .* right sha256"):
        create_extractor(INCEPTION, inception_file, sha256=wrong)
    (tmp_path / "dinov2.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{wrong}, {WEIGHTS[DINOV2].sha256} expected"):
        create_extractor(DINOV2, tmp_path / "dinov2.pth")


def test_published_weights_are_looked_for_in_the_weights_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCM_WEIGHTS", str(tmp_path))
    (tmp_path / "dinov2_vitl14_pretrain.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{tmp_path}/dinov2_vitl14_pretrain.pth has SHA-256"):
        create_extractor(DINOV2)
    with pytest.raises(ValueError, match=f"{tmp_path}/dinov2_vitl14_pretrain.pth has SHA-256"):
        Dinov2Features(DINOV2, ["features"])
    with pytest.raises(ValueError, match="scm-classifier needs a weights file"):
        create_extractor(CLASSIFIER)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", [INCEPTION, DINOV2, "vgg16"])
def test_nothing_is_unpickled(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    trap = Trap(tmp_path / "unpickled")
    torch.save({"weights": trap}, path)
    with pytest.raises(ValueError, match="no tensors-only weights file"):
        create_extractor(name, path, sha256=file_digest(path))
    assert not trap.folder.exists()


def test_weights_of_another_network_are_refused(inception_file: Path, dinov2_file: Path, tmp_path: Path) -> None:
    weights = torch.load(inception_file)
    name = "Mixed_5b.branch1x1.conv.weight"
    torch.save({("renamed" if key == name else key): value for key, value in weights.items()}, tmp_path / "renamed.pth")
    with pytest.raises(ValueError, match=rf"renamed\.pth .* without {name}; with unexpected renamed$"):
        create_extractor(INCEPTION, tmp_path / "renamed.pth", sha256=file_digest(tmp_path / "renamed.pth"))
    with pytest.raises(ValueError, match=r"holds weights of another network: .* and \d+ more"):
        create_extractor(INCEPTION, dinov2_file, sha256=file_digest(dinov2_file))
    with pytest.raises(ValueError, match=r"of another network: without blocks\.10.* of other shapes"):
        create_extractor(DINOV2, dinov2_file, sha256=file_digest(dinov2_file))


def test_images_that_are_no_pixels_are_refused(extractor: Extractor) -> None:
    with pytest.raises(ValueError, match=r"uint8 pixels 0…255 .* got torch\.float32 .*\.to_uint8"):
        extractor(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 1 or 3, H, W\), got torch.uint8 of shape \(2, 4, 32, 32\)"):
        extractor(torch.zeros(2, 4, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"of shape \(3, 32, 32\)"):
        extractor(torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\)"):
        extractor.module(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        extractor.module(torch.rand(2, 3, 32, 32))


def test_a_device_that_is_not_there_is_named(classifier_file: Path) -> None:
    with pytest.raises(ValueError, match="device 'tpu' cannot be used"):
        create_extractor(CLASSIFIER, classifier_file, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' cannot be used"):
            create_extractor(CLASSIFIER, classifier_file, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_features(dinov2_file: Path) -> None:
    images = pictures(7, 32)
    expected = create_extractor(TINY_DINOV2, dinov2_file)(images)
    on_gpu = create_extractor(TINY_DINOV2, dinov2_file, device="cuda")
    found = on_gpu(images)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(on_gpu(images), found)
