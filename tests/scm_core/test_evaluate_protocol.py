# SPDX-License-Identifier: Apache-2.0
"""Extractors through torch-fidelity's interface, references on disk, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scm_core.data import ImageSet, from_uint8, load_source, to_uint8
from scm_core.evaluate import (
    Moments,
    Prepared,
    Subset,
    evaluate,
    extract,
    frechet_with_error,
    load_reference,
    make_reference,
    manifold_metrics,
    precision_recall,
)
from scm_core.evaluate.classifier import (
    Classifier,
    classifier_loss,
    fit_standardization,
    load_classifier,
    save_classifier,
)
from scm_core.evaluate.extractors import CLASSIFIER, Extractor, create_extractor
from scm_core.evaluate.pixels import to_rgb
from scm_core.evaluate.protocol import reference_of


def train_classifier(seed: int, steps: int = 60) -> Classifier:
    torch.manual_seed(seed)
    classifier = Classifier(resolution=8)
    digits = load_source("digits")
    optimizer = torch.optim.Adam(classifier.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(1200, (64,), generator=generator)
        terms = classifier_loss(classifier(from_uint8(digits.images[index])), digits.labels[index])
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    fit_standardization(classifier, digits.images)
    return classifier


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    save_classifier(train_classifier(seed=0), path, {"dataset": "digits"})
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Extractor:
    return create_extractor(CLASSIFIER, weights)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_source("digits")


def test_the_classifier_learns(weights: Path, digits: ImageSet) -> None:
    classifier = load_classifier(weights)
    held_out = slice(1200, None)
    logits = classifier(from_uint8(digits.images[held_out]))
    assert classifier_loss(logits, digits.labels[held_out]).accuracy > 0.85


def test_features_are_standardised_and_none_is_dead(extractor: Extractor, digits: ImageSet) -> None:
    features = extract(extractor, digits.images).double()
    assert features.shape == (1797, 64)
    torch.testing.assert_close(features.mean(0), torch.zeros(64).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(64).double(), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(features) == 64


def test_a_dead_feature_is_refused(digits: ImageSet) -> None:
    classifier = Classifier(resolution=8)
    with torch.no_grad():
        classifier.body[-1].weight[7] = 0
    with pytest.raises(ValueError, match=r"without variance.*\[7\]"):
        fit_standardization(classifier, digits.images)


def test_loss_and_accuracy() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    terms = classifier_loss(logits, torch.tensor([0, 1]))
    assert float(terms.loss) == pytest.approx((torch.log(torch.tensor(2.0)) + torch.log(torch.tensor(4 / 3))) / 2)
    assert classifier_loss(logits, torch.tensor([1, 0])).accuracy == 0


def test_the_batch_does_not_matter(extractor: Extractor, digits: ImageSet) -> None:
    images = digits.images[:50]
    torch.testing.assert_close(extract(extractor, images, 50), extract(extractor, images, 7), rtol=1e-4, atol=1e-5)


def test_grey_images_equal_their_rgb_copies(extractor: Extractor, weights: Path, digits: ImageSet) -> None:
    images = digits.images[:8]
    rgb = images.repeat(1, 3, 1, 1)
    assert torch.equal(to_rgb(images), rgb)
    assert torch.equal(extract(extractor, images), extract(extractor, rgb))
    direct = load_classifier(weights).features(from_uint8(images))
    torch.testing.assert_close(extract(extractor, images), direct.detach(), rtol=1e-4, atol=1e-5)


def test_torch_fidelity_measures_the_same_with_our_extractor(
    extractor: Extractor, weights: Path, digits: ImageSet
) -> None:
    """torch-fidelity's own calculate_metrics, given the registered name, reaches the FID of our functions."""
    from scm_core.evaluate.fidelity import torch_fidelity

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: torch.Tensor) -> None:
            self.images = to_rgb(images)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    fake, real = digits.images[:600], digits.images[600:1400]
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        cuda=False,
        fid=True,
        prc=True,
        feature_extractor=CLASSIFIER,
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    result = evaluate(
        extract(extractor, fake), make_reference(extractor, ImageSet(real, digits.labels[600:1400], "part"))
    )
    assert result.fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)  # theirs takes float32 moments
    assert result.precision == pytest.approx(theirs["precision"], abs=2e-3)  # float32 distances
    assert result.recall == pytest.approx(theirs["recall"], abs=2e-3)
    assert result.samples == 600


def test_reference_survives_the_disk(extractor: Extractor, digits: ImageSet, tmp_path: Path) -> None:
    reference = make_reference(extractor, digits).prepare()
    reference.save(tmp_path)
    loaded = load_reference(tmp_path, extractor.identity, "digits")
    for name in ("features", "mean", "cov"):
        assert torch.equal(getattr(loaded, name), getattr(reference, name))
    assert (loaded.count, loaded.dataset_sha256) == (1797, digits.digest)
    fake = extract(extractor, digits.images[:500])
    result = evaluate(fake, loaded, expected=500)
    assert result[:3] == pytest.approx(frechet_with_error(fake, Moments.of(reference.features)), rel=1e-10)
    assert (result.precision, result.recall) == precision_recall(reference.features, fake, 3)
    assert result[3:8] == pytest.approx(manifold_metrics(reference.features, fake)[:5], rel=1e-6)
    assert (result.precision_se, result.recall_se) == (None, None)
    with_errors = evaluate(fake, loaded, groups=5)
    assert with_errors[:8] == result[:8]
    assert with_errors[8:10] == manifold_metrics(reference.features, fake, groups=5)[5:]
    assert evaluate(fake, loaded, neighbours=1).recall < result.recall


def test_what_is_prepared_changes_no_bit(extractor: Extractor, digits: ImageSet, tmp_path: Path) -> None:
    reference, fake = make_reference(extractor, digits), extract(extractor, digits.images[:400])
    for name in ("plain", "prepared"):
        reference.save(tmp_path / name)
        reference = reference.prepare(neighbours=4)
    plain, prepared = (load_reference(tmp_path / name) for name in ("plain", "prepared"))
    assert plain.prepared is None
    assert prepared.prepared is not None
    assert prepared.prepared.nearest.shape == (1797, 4)
    assert torch.equal(prepared.root, plain.root)
    assert prepared.feature_set().kernel_mean == plain.feature_set().kernel_mean
    for k in (1, 3, 5):  # the last one is beyond what was prepared
        assert evaluate(fake, plain, k) == evaluate(fake, prepared, k)
    assert plain.feature_set() is plain.feature_set("cpu")


def test_few_samples_have_no_known_bias(extractor: Extractor, digits: ImageSet) -> None:
    result = evaluate(extract(extractor, digits.images[:60]), make_reference(extractor, digits))
    assert result.fid_bias is None
    assert result.samples == 60


def test_what_cannot_be_compared_is_refused(extractor: Extractor, digits: ImageSet) -> None:
    reference = make_reference(extractor, digits)
    fake = reference.features[:100]
    with pytest.raises(ValueError, match=r"^100 generated samples, expected 101: "):
        evaluate(fake, reference, expected=101)
    for bad in (torch.nan, torch.inf):
        broken = fake.clone()
        broken[7, 3] = bad
        with pytest.raises(ValueError, match=r"^generated features hold NaN or infinite values in 1 of 100 rows$"):
            evaluate(broken, reference)
    with pytest.raises(ValueError, match=r"^generated features must have 64 dimensions, got 63$"):
        evaluate(fake[:, :63], reference)


def test_a_reference_that_does_not_fit_is_refused(extractor: Extractor, digits: ImageSet, tmp_path: Path) -> None:
    make_reference(extractor, digits).save(tmp_path / "reference")
    other_weights = tmp_path / "other.safetensors"
    save_classifier(train_classifier(seed=1, steps=5), other_weights)
    with pytest.raises(ValueError, match="other weights of scm-classifier"):
        load_reference(tmp_path / "reference", create_extractor(CLASSIFIER, other_weights).identity)
    with pytest.raises(ValueError, match="not scm-classifier/logits"):
        load_reference(tmp_path / "reference", create_extractor(CLASSIFIER, other_weights, "logits").identity)
    with pytest.raises(ValueError, match="of dataset digits, not mnist5k"):
        load_reference(tmp_path / "reference", dataset="mnist5k")
    with pytest.raises(ValueError, match="must have 64 dimensions"):
        evaluate(torch.zeros(10, 32), load_reference(tmp_path / "reference"))


def test_a_damaged_reference_is_refused(extractor: Extractor, digits: ImageSet, tmp_path: Path) -> None:
    reference = make_reference(extractor, digits)
    tensors, index = tmp_path / "reference.safetensors", tmp_path / "reference.json"
    with pytest.raises(FileNotFoundError, match=r"reference\.json is missing"):
        load_reference(tmp_path)
    reference.save(tmp_path)
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load_reference(tmp_path)
    reference.save(tmp_path)
    index.write_text(index.read_text()[:-20])
    with pytest.raises(ValueError, match=r"reference\.json is corrupt"):
        load_reference(tmp_path)
    reference.save(tmp_path)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"count": 49_999}))
    with pytest.raises(ValueError, match="holds 1797 images"):
        load_reference(tmp_path)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": "scm-reference-1"}))
    with pytest.raises(
        ValueError, match=r"format scm-reference-2 \(it says 'scm-reference-1'\): make the reference again, "
    ):
        load_reference(tmp_path)
    with pytest.raises(ValueError, match=r"root \(D, D\) and nearest \(N, K\) must be float64"):
        replace(reference, prepared=Prepared(torch.zeros(3, 3).double(), torch.zeros(1797, 5).double(), 0.0))


def test_bad_weights_and_names_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown extractor 'resnet'"):
        create_extractor("resnet", weights)
    with pytest.raises(ValueError, match="no layer 'pool'"):
        create_extractor(CLASSIFIER, weights, "pool")
    with pytest.raises(FileNotFoundError, match="needs its weights there"):
        create_extractor(CLASSIFIER, tmp_path / "nothing")
    short = tmp_path / "short.safetensors"
    short.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        create_extractor(CLASSIFIER, short)
    with pytest.raises(ValueError, match="power of two"):
        Classifier(resolution=24)


def test_bad_images_are_refused(extractor: Extractor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        extract(extractor, torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="N ≥ 1"):
        extract(extractor, torch.zeros(0, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images must be"):
        extract(extractor, torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="1 or 3"):
        extract(extractor, torch.zeros(2, 2, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN"):
        extract(lambda x: torch.full((len(x), 4), torch.nan), torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_rounding_to_uint8() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert torch.equal(to_uint8(from_uint8(levels) + 0.9 / 255), levels)  # 0.45 levels: truncation passes the first …
    assert torch.equal(to_uint8(from_uint8(levels) - 0.9 / 255), levels)  # … and not this one
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([torch.nan]))
    with pytest.raises(ValueError, match="floating point"):
        to_uint8(levels)


def test_torch_fidelity_imports_in_a_fresh_process() -> None:
    code = "import scm_core.evaluate.fidelity, torchvision, torch_fidelity; print(torchvision.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_classifier_needs_no_torch_fidelity(weights: Path) -> None:
    """Its import takes seconds, of every evaluation of the demo."""
    code = """
import sys, torch
from scm_core.evaluate.extractors import create_extractor
create_extractor("scm-classifier", sys.argv[1])(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
assert not {"torch_fidelity", "torchvision", "torch._dynamo"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(weights)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_torchvision_that_loads_is_left_alone() -> None:
    """With the operators already there, as a matching build's library brings them, nothing is defined a second time."""
    code = """
import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from scm_core.compat import prepare_torchvision
assert prepare_torchvision() is False
import torchvision
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_subset_of_the_reference_is_what_pairs_are_compared_with(extractor: Extractor, tmp_path: Path) -> None:
    """FID against the moments of all, the rest against the drawn features; both survive the disk, and the key knows."""
    digits = load_source("digits")
    whole, part = make_reference(extractor, digits), make_reference(extractor, digits, subset=Subset(300, seed=7))
    drawn = Subset(300, 7).indices(len(digits))
    assert (part.count, len(part.features)) == (len(digits), 300)
    assert torch.equal(part.features, whole.features[drawn])
    torch.testing.assert_close(part.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.cov, whole.cov, rtol=1e-10, atol=1e-12)
    part.prepare().save(tmp_path)
    loaded = load_reference(tmp_path)
    assert (loaded.subset, loaded.count, loaded.key) == (Subset(300, 7), len(digits), part.key)
    fake = whole.features[::7] + 0.1
    found, all_pairs = evaluate(fake, loaded), evaluate(fake, whole)
    assert found.fid == pytest.approx(all_pairs.fid, rel=1e-9)
    assert found[3:8] == pytest.approx(manifold_metrics(whole.features[drawn], fake)[:5], rel=1e-6)
    assert found.coverage != all_pairs.coverage


def test_a_subset_has_a_name_of_its_own_and_is_none_where_there_are_no_more_images(extractor: Extractor) -> None:
    digits = load_source("digits")
    whole = make_reference(extractor, digits)
    others = [make_reference(extractor, digits, subset=Subset(*which)).key for which in ((300, 7), (300, 8), (301, 7))]
    assert len({whole.key, *others}) == 4
    assert make_reference(extractor, digits, subset=Subset(len(digits), 0)).key == whole.key


def test_a_subset_is_drawn_evenly_without_repetition() -> None:
    """Every image is as likely: over many seeds each of 20 is drawn as often, 5 at a time, within five standard deviations."""
    counts = torch.zeros(20)
    for seed in range(2000):
        drawn = Subset(5, seed).indices(20)
        assert torch.equal(drawn, drawn.unique())
        counts[drawn] += 1
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_a_reference_of_other_numbers_than_it_says_is_refused(extractor: Extractor) -> None:
    digits = load_source("digits")
    features = make_reference(extractor, digits).features
    with pytest.raises(ValueError, match=r"reference of digits: expected the features of 1797 images, got 1796"):
        reference_of([features[:-1]], len(features), "digits", digits.digest, extractor.identity, Subset(9, 0))
    with pytest.raises(
        ValueError, match=r"a subset has as many features as it says, of more images, got 1797 features"
    ):
        replace(make_reference(extractor, digits), subset=Subset(5, 0), images=1797)
