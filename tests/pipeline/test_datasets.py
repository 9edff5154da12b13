# SPDX-License-Identifier: Apache-2.0
"""Each source from its files to an evaluated sample: store, loader, a training step, samples, metrics; and what the stage refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.datasets import Dataset
from pipeline.errors import ParamsError
from pipeline.modelling import image_data
from pipeline.params import validate
from scm_core.data import Sharded, Wanted, load_images, open_source, set_name, store_images, to_uint8
from scm_core.data.loader import Prefetcher
from scm_core.data.sources import BrokenImagesError, cifar10
from scm_core.data.writing import UNFINISHED
from scm_core.disk import file_digest
from scm_core.evaluate.classifier import Classifier, fit_standardization, save_classifier
from scm_core.evaluate.extractors import create_extractor
from scm_core.evaluate.protocol import evaluate, extract, make_reference
from scm_core.nn.build import build_network
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.sampling import sample_diffusion
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import train_step
from tests.pipeline.plain import plain
from tests.scm_core.replicas import (
    cifar10_archive,
    class_tars,
    imagenet_files,
    tar_bytes,
    write_parquet,
    write_tree,
    write_zip,
)

FILES = imagenet_files()
LABELS = {name: k % 4 for k, name in enumerate(sorted(FILES))}
SIGMA_DATA = 0.5


def archive(data: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    monkeypatch.setattr(cifar10, "PER_BATCH", 12)
    path = data / cifar10.ARCHIVE.file
    cifar10_archive(path, 12)
    known = replace(cifar10.ARCHIVE, sha256=file_digest(path), size=path.stat().st_size)
    monkeypatch.setattr(cifar10, "ARCHIVE", known)
    return Wanted("cifar10", 32, 3, 10)


def tree(data: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    write_tree(data / "imagenet" / "train", FILES)
    return Wanted("imagenet", 32, 3, 4)


def tar(data: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    (data / "imagenet").mkdir()
    (data / "imagenet" / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(class_tars(FILES)))
    return Wanted("imagenet", 32, 3, 4)


def parquet(data: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    write_parquet(data / "imagenet", FILES)
    return Wanted("imagenet", 32, 3, 4)


def archived(data: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    return Wanted("images", 32, 3, 4, write_zip(data / "mine.zip", FILES, LABELS))


def folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> Wanted:
    return Wanted("images", 32, 1, 4, write_tree(data / "mine", FILES))


SOURCES = [archive, tree, tar, parquet, archived, folder]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCM_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("source", SOURCES)
def test_from_its_files_to_an_evaluated_sample(
    source: Callable[[Path, pytest.MonkeyPatch], Wanted], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = source(data, monkeypatch)
    opened = open_source(wanted)
    store_images(wanted, tmp_path / "store")
    shutil.rmtree(data)  # from here on the store is all there is
    images = load_images(tmp_path / "store", verify=True)
    assert isinstance(images.images, Sharded)
    assert (
        images.name
        == wanted.name
        == {"cifar10": "cifar10", "imagenet": "imagenet-32", "images": "mine-32"}[wanted.source]
    )
    assert images.shape == (wanted.channels, 32, 32)
    assert torch.equal(images.labels, opened.labels)
    assert images.num_labels == wanted.labels

    # the loader: batches that a thread prepares, from indices in any order
    settings = TrainSettings(iterations=2, batch=8, lr=1e-3, seed=0, ema_sigma_rel=0.1)
    batches = image_data(images, labelled=True).batches(settings)
    with Prefetcher(batches, depth=2) as fetch:
        batch, again = fetch(0), batches(0)
    assert torch.equal(to_uint8(batch.x0), images.images[again.indices])
    assert batch.labels is not None
    assert torch.equal(batch.labels, images.labels[again.indices])

    # one step of training, samples, their metrics
    torch.manual_seed(0)
    config = {"architecture": "small", "channels": wanted.channels, "resolution": 32, "width": 8, "blocks": 2}
    net = build_network({**config, "labels": wanted.labels})
    state = TrainState(net, settings, heads={"logvar": LogVarHead(0.0)})
    objective = DiffusionObjective(net, state.heads["logvar"], SIGMA_DATA, -0.4, 1.2, 0.1)  # type: ignore[arg-type]
    terms = train_step(state, objective, batch)
    assert torch.isfinite(terms.loss)
    z = SIGMA_DATA * torch.randn(12, *images.shape)
    with torch.no_grad():
        x0 = sample_diffusion(lambda x, t: net(x, t, torch.arange(12) % wanted.labels), z, 3, SIGMA_DATA)
    classifier = Classifier(wanted.channels, wanted.labels, 4, 32)
    fit_standardization(classifier, images.images)
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    extractor = create_extractor("scm-classifier", tmp_path / "classifier.safetensors")
    reference = make_reference(extractor, images, batch=7)
    assert (reference.dataset, reference.count) == (wanted.name, len(images))
    result = evaluate(extract(extractor, to_uint8(x0)), reference)
    assert result.fid > 0
    assert 0 <= result.precision <= 1


def test_several_processes_make_the_same_store(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tree(data, monkeypatch)
    shown: list[tuple[int, int]] = []
    store_images(wanted, tmp_path / "one", progress=lambda done, total: shown.append((done, total)))
    store_images(wanted, tmp_path / "three", processes=3)
    assert shown[-1] == (20, 20)
    one, three = ({p.name: file_digest(p) for p in (tmp_path / name).iterdir()} for name in ("one", "three"))
    assert one == three


def test_all_broken_images_are_named_and_the_other_shards_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shards of one image; after a repair only those of the broken ones are made."""
    from scm_core.data import writing

    monkeypatch.setattr(writing, "SHARD_BYTES", 2 * 3 * 32 * 32)
    wanted = tree(data, monkeypatch)
    bad = [sorted(FILES)[k] for k in (0, 1, 7, 15, 16, 18, 19)]
    for name in bad:
        (data / "imagenet/train" / name).write_bytes(FILES[name][:150])
    with pytest.raises(BrokenImagesError) as error:
        store_images(wanted, tmp_path / "store")
    assert set(error.value.whys) == set(bad)
    text = str(error.value)
    assert "train: 7 images cannot be used: " in text
    assert f"{bad[0]} does not decode" in text
    assert "; and 2 more; replace or remove them" in text
    made = {int(p.stem.split("-")[1]) for p in (tmp_path / "store").glob("images-*.npy")}
    assert made == set(range(10)) - {0, 3, 7, 8, 9}
    assert (tmp_path / "store" / UNFINISHED).is_dir()
    for name in bad:
        (data / "imagenet/train" / name).write_bytes(FILES[name])
    store_images(wanted, tmp_path / "store")
    store_images(wanted, tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes()


def test_a_set_that_changed_meanwhile_is_not_gone_on_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tree(data, monkeypatch)
    name = sorted(FILES)[4]
    (data / "imagenet/train" / name).write_bytes(b"")
    with pytest.raises(BrokenImagesError):
        store_images(wanted, tmp_path / "store")
    (data / "imagenet/train" / name).unlink()
    with pytest.raises(ValueError, match="was begun as a store of other items or with other data; remove"):
        store_images(wanted, tmp_path / "store")


def test_names_of_sets() -> None:
    assert set_name("images", 64, "data/cats.zip") == "cats-64"
    with pytest.raises(
        ValueError, match="known are cifar10, digits, imagenet, images, mnist5k, of which images needs a path"
    ):
        open_source(Wanted("images", 32, 3, 0))


GOOD: dict[str, dict[str, Any]] = {
    "cifar10": {"source": "cifar10", "resolution": 32, "channels": 3, "labels": 0},
    "imagenet": {"source": "imagenet", "resolution": 64, "channels": 3, "labels": 1000},
    "images": {"source": "images", "resolution": 64, "channels": 1, "labels": 0, "path": "data/x.zip"},
    "digits": {"source": "digits", "resolution": 8, "channels": 1, "labels": 10},
}


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        ("cifar10", {"resolution": 64}, "resolution: must be 32 for source cifar10, got 64"),
        ("cifar10", {"channels": 1}, "channels: must be 3 for source cifar10, got 1"),
        ("cifar10", {"labels": 100}, r"labels: must be 10 \(or 0: unlabelled\) for source cifar10, got 100"),
        ("imagenet", {"labels": 0}, "labels: must be 1000, or the number of classes of a subset, for source imagenet, got 0"),
        ("imagenet", {"channels": 1}, "channels: must be 3 for source imagenet, got 1"),
        ("imagenet", {"path": "x"}, "path: must be given for source images, and only for it"),
        ("images", {"path": None}, "path: must be given for source images, and only for it"),
        ("images", {"channels": 4}, "channels: must be 1 or 3 for source images, got 4"),
        ("digits", {"channels": 3}, "channels: must be 1 for source digits, got 3"),
    ],
)  # fmt: skip
def test_impossible_sections_are_refused(source: str, change: Mapping[str, Any], words: str) -> None:
    data = plain()
    slots = data["scales"]["smoke"]["slots"]
    slot = {key: value for key, value in slots["latent_guided"].items() if key not in ("vae", "figure2")}
    slots["pixel_cond"] = {**slot, "dataset": {**GOOD[source], **change}}
    with pytest.raises(ParamsError, match=rf"pixel_cond\.dataset\.{words}"):
        validate(data)


def test_processes_are_no_part_of_what_images_are_known_by() -> None:
    section = Dataset(**GOOD["images"], engine={"processes": 8})
    assert section.keys() == tuple(f".dataset.{key}" for key in ("source", "resolution", "channels", "labels", "path"))
    assert Dataset(**GOOD["cifar10"]).keys() == tuple(
        f".dataset.{key}" for key in ("source", "resolution", "channels", "labels")
    )


@pytest.fixture
def repository(repo_copy: Path, user_env: Callable[[Path], dict[str, str]], tmp_path: Path) -> Callable[..., Any]:
    """Runs stage dataset in a copy of the repository, whose slot pixel_cond has that section."""

    def run(section: Mapping[str, Any]) -> "subprocess.CompletedProcess[str]":
        params = plain()
        slots = params["scales"]["smoke"]["slots"]
        slot = {key: value for key, value in slots["latent_guided"].items() if key not in ("vae", "figure2")}
        slot["sizes"] = {"S": slot["sizes"]["S"]}
        slots["pixel_cond"] = {**slot, "dataset": dict(section)}
        (repo_copy / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        command = [sys.executable, "-m", "pipeline", "run", "dataset", "scale=smoke", "slot=pixel_cond"]
        env = {**user_env(repo_copy), "SCM_DATA": str(tmp_path / "data"), "SCM_TRACKING": "off"}
        return subprocess.run(command, cwd=repo_copy, env=env, capture_output=True, text=True, check=False)

    return run


def test_the_stage_publishes_a_store(
    repository: Callable[..., Any], repo_copy: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By two processes; what is published is the store alone, and its manifest does not say how many made it."""
    write_zip(repo_copy / "mine.zip", FILES, LABELS)
    section = {"source": "images", "resolution": 32, "channels": 3, "labels": 4, "path": "mine.zip"}
    done = repository({**section, "engine": {"processes": 2}})
    assert done.returncode == 0, done.stdout + done.stderr
    folder = repo_copy / "runs/smoke/pixel_cond/dataset"
    assert {path.name for path in folder.iterdir()} == {"images-00000.npy", "labels.npy", "index.json", "manifest.json"}
    assert load_images(folder, verify=True).labels.tolist() == [LABELS[name] for name in sorted(FILES)]
    made = json.loads((folder / "manifest.json").read_text())
    assert "engine" not in json.dumps(made["params"])
    assert not list((repo_copy / "runs/smoke/.work").glob("*/"))
    assert repository(section).returncode == 0
    assert json.loads((folder / "manifest.json").read_text()) == made


def test_the_stage_says_in_a_sentence_what_is_wrong(repository: Callable[..., Any], data: Path) -> None:
    done = repository({"source": "imagenet", "resolution": 32, "channels": 3, "labels": 4})
    assert done.returncode == 1
    assert f"error: dataset-pixel_cond: {data}/imagenet: holds no ImageNet; put there" in done.stderr
    write_tree(data / "imagenet", {**FILES, sorted(FILES)[2]: b"torn"})
    done = repository({"source": "imagenet", "resolution": 32, "channels": 3, "labels": 4, "engine": {"processes": 2}})
    assert done.returncode == 1
    name = sorted(FILES)[2]
    assert f"error: dataset-pixel_cond: {data}/imagenet: 1 image cannot be used: {name} does not decode" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "traceback in" not in done.stderr
