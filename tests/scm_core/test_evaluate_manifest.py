# SPDX-License-Identifier: Apache-2.0
"""Cache keys: equal descriptions have one, and every ingredient changes it."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest

from scm_core.evaluate.manifest import ImagesManifest, SampleManifest, identities, manifest_json, manifest_key

IDENTITY = {"name": "scm-classifier", "layer": "features", "weights_sha256": "c" * 64, "dtype": "float32"}
SAMPLES: dict[str, Any] = {
    "model_sha256": "a" * 64,
    "sampler": "consistency",
    "steps": 2,
    "times": (1.56, 1.1),
    "guidance": 1.5,
    "sigma_data": 0.5,
    "noise": "sample_noise z, step i",
    "first_index": 0,
    "labels": "index mod 10",
    "decoder_sha256": "b" * 64,
    "dtype": "float32",
    "code": "0123abcd",
    "chunk": 500,
    "extractors": {"classifier": IDENTITY},
}
OTHER_SAMPLES: dict[str, list[Any]] = {
    "model_sha256": ["d" * 64],
    "sampler": ["heun"],
    "steps": [1, 3],
    "times": [None, (1.56,), (1.1, 1.56), (math.nextafter(1.56, 2), 1.1)],
    "guidance": [None, 1.0, math.nextafter(1.5, 2)],
    "sigma_data": [1.0, math.nextafter(0.5, 1)],
    "noise": ["sample_noise y"],
    "first_index": [50_000],
    "labels": ["none"],
    "decoder_sha256": [None, "d" * 64],
    "dtype": ["bfloat16"],
    "code": [None, "4567"],
    "chunk": [250],
    "extractors": [
        {"classifier": IDENTITY | {"weights_sha256": "d" * 64}},
        {"classifier": IDENTITY | {"layer": "logits"}},
        {"classifier": IDENTITY | {"dtype": "float16"}},
        {"classifier": IDENTITY | {"resize": "bicubic"}},
        {"inception": IDENTITY},
        {"classifier": IDENTITY, "inception": IDENTITY},
    ],
}
IMAGES: dict[str, Any] = {"images_sha256": "a" * 64, "size": 5000, "chunk": 500, "extractors": {"classifier": IDENTITY}}
OTHER_IMAGES: dict[str, list[Any]] = {
    "images_sha256": ["d" * 64],
    "size": [4999],
    "chunk": [250],
    "extractors": OTHER_SAMPLES["extractors"],
}


def test_every_field_is_in_the_tables_below() -> None:
    """A field that is added to a manifest needs its line in this test, and may have no default that lets callers forget it."""
    for cls, values, others in ((SampleManifest, SAMPLES, OTHER_SAMPLES), (ImagesManifest, IMAGES, OTHER_IMAGES)):
        fields = dataclasses.fields(cls)
        assert {field.name for field in fields} == set(values) == set(others)
        assert all(field.default is field.default_factory is dataclasses.MISSING for field in fields)


@pytest.mark.parametrize(("field", "value"), [(name, v) for name, values in OTHER_SAMPLES.items() for v in values])
def test_any_changed_ingredient_of_samples_changes_the_key(field: str, value: Any) -> None:
    base = SampleManifest(**SAMPLES)
    assert SampleManifest(**SAMPLES | {field: value}).key != base.key == SampleManifest(**SAMPLES).key
    with pytest.raises(TypeError, match=field):
        SampleManifest(**{name: v for name, v in SAMPLES.items() if name != field})


@pytest.mark.parametrize(("field", "value"), [(name, v) for name, values in OTHER_IMAGES.items() for v in values])
def test_any_changed_ingredient_of_an_image_set_changes_the_key(field: str, value: Any) -> None:
    assert ImagesManifest(**IMAGES | {field: value}).key != ImagesManifest(**IMAGES).key


def test_the_two_kinds_are_told_apart() -> None:
    assert SampleManifest(**SAMPLES).to_json()["kind"] != ImagesManifest(**IMAGES).to_json()["kind"]


def test_the_key_is_the_hash_of_the_canonical_json() -> None:
    text = '{"a":[1,0.1,true,null],"b":{"c":"é"}}'
    value = {"b": {"c": "é"}, "a": (1.0, 0.1, True, None)}
    assert manifest_json(value) == text
    assert manifest_key(value) == hashlib.sha256(text.encode()).hexdigest()


def test_equal_numbers_have_one_key_and_truth_is_no_number() -> None:
    assert manifest_json({"x": 1}) == manifest_json({"x": 1.0}) == manifest_json({"x": np.float64(1)})
    assert manifest_json([0.0]) == manifest_json([-0.0]) == manifest_json([0])
    assert manifest_json([True]) != manifest_json([1])
    assert manifest_json([1e300]) == "[1e+300]"
    assert manifest_json([2**60 + 1]) == f"[{2**60 + 1}]"
    manifest = SampleManifest(**SAMPLES | {"guidance": 2, "times": [1.5, 1]})
    assert manifest.key == SampleManifest(**SAMPLES | {"guidance": 2.0, "times": (1.5, 1.0)}).key


def test_what_went_through_a_file_has_the_same_key() -> None:
    manifest = SampleManifest(**SAMPLES).to_json()
    assert manifest_key(json.loads(json.dumps(manifest))) == manifest_key(manifest)


def test_a_manifest_does_not_follow_its_caller() -> None:
    extractors = {"classifier": dict(IDENTITY)}
    manifest = SampleManifest(**SAMPLES | {"extractors": extractors})
    key = manifest.key
    extractors["classifier"]["layer"] = "logits"
    assert manifest.key == key
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.steps = 5  # type: ignore[misc]


def test_identities_of_extractors() -> None:
    class Named:
        def __init__(self, layer: str) -> None:
            self.layer, self.identity = layer, self

        def to_json(self) -> dict[str, str]:
            return {"layer": self.layer}

        def __call__(self, images: Any) -> Any:
            raise NotImplementedError

    assert identities({"a": Named("x"), "b": Named("y")}) == {"a": {"layer": "x"}, "b": {"layer": "y"}}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": {"b": [0, math.nan]}}, r"manifest\.a\.b\[1\]: expected a finite number, got nan"),
        ({"a": -math.inf}, r"manifest\.a: expected a finite number, got -inf"),
        ({"a": {1: 2}}, r"manifest\.a: expected names as keys, got 1"),
        ({"a": {1, 2}}, r"manifest\.a: .*, got set"),
        ({"a": np.float32(1)}, r"manifest\.a: .*, got float32"),
        ({"a": b"x"}, r"manifest\.a: .*, got bytes"),
    ],
)
def test_what_has_no_key(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        manifest_json(value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_sha256", "A" * 64, "SHA-256"),
        ("model_sha256", None, "SHA-256"),
        ("decoder_sha256", "abc", "SHA-256"),
        ("sampler", "", "expected words"),
        ("code", "", "expected words"),
        ("steps", 0, "≥ 1, got 0"),
        ("steps", True, "≥ 1, got True"),
        ("steps", 2.0, "≥ 1, got 2.0"),
        ("first_index", -1, "≥ 0, got -1"),
        ("chunk", 0, "≥ 1, got 0"),
        ("guidance", math.nan, "finite"),
        ("times", (1.5, math.inf), "finite"),
        ("extractors", {}, "identity"),
        ("extractors", {"classifier": "weights"}, "identity"),
    ],
)
def test_bad_ingredients_are_named(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{words}"):
        SampleManifest(**SAMPLES | {field: value})
