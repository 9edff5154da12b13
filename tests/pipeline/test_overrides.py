# SPDX-License-Identifier: Apache-2.0
"""Repeated trainings of a student: names, sections, and what is refused."""

from typing import Any

import pytest

from pipeline.overrides import base_of, repetitions, seed_of, with_repetitions
from pipeline.params import Params, ParamsError, validate
from tests.pipeline.plain import plain

SLOT = "latent_guided"


def with_size(**more: Any) -> Params:
    """Scale demo with keys laid over those of size S."""
    data = plain()
    size = data["scales"]["demo"]["slots"][SLOT]["sizes"]["S"]
    size |= more
    return validate(data)


def test_names_of_repetitions_lead_back_to_their_student() -> None:
    names = ["scd", *repetitions("scd", 3)]
    assert names == ["scd", "scd_seed2", "scd_seed3"]
    assert [base_of(name) for name in names] == ["scd"] * 3
    assert [seed_of(name) for name in names] == [1, 2, 3]
    assert (base_of("dscd_64"), seed_of("dscd_64")) == ("dscd_64", 1)
    trained = ["sct", "scd", "scd_seed2", "sct_seed2", "scd_raw"]
    assert with_repetitions(["scd", "sct", "vsd"], trained) == ["scd", "scd_seed2", "sct", "sct_seed2"]


def test_a_repeated_student_has_the_section_of_its_size() -> None:
    params = with_size(students={"scd": {"batch": 7}, "sct": {}}, repeats={"scd": 3})
    students = params.active.slots[SLOT].sizes["S"].students
    assert list(students) == ["scd", "sct", "scd_seed2", "scd_seed3"]
    assert students["scd"] == students["scd_seed2"] == students["scd_seed3"]
    assert students["scd"].batch == 7
    assert list(params.active.slots[SLOT].sizes["M"].students) == ["scd", "sct"]


def test_parameters_that_were_written_out_are_read_again() -> None:
    params = with_size(repeats={"sct": 2})
    assert validate(params.model_dump(mode="json")) == params


@pytest.mark.parametrize(
    ("repeats", "words"),
    [
        ({"scdd": 2}, r"sizes\.S\.repeats\.scdd: unknown key; known keys here are scd, sct"),
        ({"scd": 1}, r"sizes\.S\.repeats\.scd: must be at least 2, got 1"),
        ({"scd": 1000}, r"sizes\.S\.repeats\.scd: must be at most 100, got 1000"),
        ({"scd": "3"}, r"sizes\.S\.repeats\.scd: must be an integer, got '3'"),
        (3, r"sizes\.S\.repeats: must be a section of keys with values, got 3"),
    ],
)
def test_what_cannot_be_repeated_is_named(repeats: Any, words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        with_size(repeats=repeats)


def test_a_student_has_no_name_of_a_repetition() -> None:
    data = plain()
    slot = data["scales"]["demo"]["slots"][SLOT]
    slot["students"]["scd_seed2"] = slot["students"]["scd"]
    with pytest.raises(ParamsError, match=r"students\.scd_seed2: is the name of a repeated training"):
        validate(data)
