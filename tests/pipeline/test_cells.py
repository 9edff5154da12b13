# SPDX-License-Identifier: Apache-2.0
"""Numbers of tables under names that another run gives them too, and how far apart two of them lie."""

import json
import math
from pathlib import Path

import pytest

from pipeline.cells import Name, Number, dump, numbers, parse, read_rows, verdicts

ROOT = Path(__file__).resolve().parents[2]


def evaluation(phase: str, guidance: str, best: str, fid: str, steps: str = "2") -> dict[str, str]:
    """A row of evaluations.csv, as far as it matters."""
    own = {
        "slot": "latent",
        "size": "S",
        "method": "scd",
        "run": f"run-{fid}",
        "dataset": "mnist",
        "phase": phase,
        "steps": steps,
    }
    return {**own, "guidance": guidance, "samples": "200", "best": best, "fid": fid, "fid_se": "0.5", "kid": "7"}


def test_what_was_chosen_is_no_part_of_a_name() -> None:
    """The number at the best guidance is compared with that of another run, whichever scale was the best there."""
    one = numbers("e.csv", [evaluation("report", "1.0", "False", "3"), evaluation("report", "1.2", "True", "2")])
    other = numbers("e.csv", [evaluation("report", "1.0", "False", "3.1"), evaluation("report", "1.3", "True", "2.1")])
    assert set(one) == set(other)
    assert sorted(number.value for number in one.values()) == [2, 3]
    both = numbers(
        "e.csv", [evaluation("report", "1.0", "True", "3")]
    )  # selected, and without guidance: both numbers are there
    assert set(both) == set(one)
    assert {number.value for number in both.values()} == {3}


def test_the_points_of_a_sweep_are_known_by_their_guidance_and_steps() -> None:
    rows = [
        evaluation("select", scale, "False", fid, steps)
        for scale, fid in (("1.0", "3"), ("1.2", "2"))
        for steps in "12"
    ]
    found = numbers("e.csv", rows)
    assert len(found) == 4
    assert {dict(name.row)["role"] for name in found} == {"guidance 1.0", "guidance 1.2"}
    assert str(next(iter(found))) == "e.csv: latent, S, scd, select, steps 1, guidance 1.0: fid"


def test_published_rows_are_left_out_and_equal_rows_counted() -> None:
    rows = [
        {"method": "EDM2-S", "nfe": "63x2", "fid": "2.29", "fid_se": "", "run": ""},
        {"method": "sCD-S", "nfe": "1", "fid": "0.322", "fid_se": "0.033", "run": "evaluate-S-scd-1"},
        {"method": "sCD-S", "nfe": "2", "fid": "0.289", "fid_se": "0.025", "run": "evaluate-S-scd-1"},
    ]
    found = numbers("table2.csv", rows)
    assert [(name.which, number.value, number.se) for name, number in found.items()] == [
        (1, 0.322, 0.033),
        (2, 0.289, 0.025),
    ]
    assert str(list(found)[1]) == "table2.csv: sCD-S (2): fid"


def test_numbers_without_errors_count_where_a_file_has_none() -> None:
    rows = [
        {"quantity": "rms", "method": "ddim", "intervals": n, "value": v} for n, v in (("8", "0.1"), ("64", "0.01"))
    ]
    found = numbers("figure3.csv", rows)
    assert [(name.which, number.value, number.se) for name, number in found.items()] == [
        (1, 0.1, None),
        (1, 0.01, None),
    ]


def test_claims() -> None:
    row = {
        "id": "gap",
        "statement": "in words",
        "ours": "1.07",
        "standard_error": "0.02",
        "verdict": "holds",
        "runs": "a b",
    }
    assert list(numbers("claims.csv", [row]).values()) == [Number(1.07, 0.02, "", "a b")]
    assert verdicts([row]) == {"gap": "holds"}


def test_every_published_table_can_be_read() -> None:
    for file in (ROOT / "reports/paper").glob("*.csv"):
        assert numbers(file.name, [{**row, "run": ""} for row in read_rows(file)]) == {}


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        ((1.0, 0.3), (2.5, 0.4), 3.0),  # 1.5 / sqrt(0.09 + 0.16)
        ((1.0, 0.3), (1.0, 0.3), 0.0),
        ((0.0, 0.0), (0.1, 0.0), math.inf),
        ((1.0, None), (2.0, 0.5), 2.0),
    ],
)
def test_how_far_apart(a: tuple[float, float], b: tuple[float, float], apart: float) -> None:
    assert Number(*a, "", "").apart(Number(*b, "", "")) == pytest.approx(apart)


def test_the_same_digit_by_digit() -> None:
    assert Number(0.1, 0.2, "100", "one").same(Number(0.1, 0.2, "200", "other"))
    assert Number(math.nan, None, "", "").same(Number(math.nan, None, "", ""))
    assert not Number(0.1, 0.2, "", "").same(Number(0.1, 0.2000000001, "", ""))


def test_numbers_survive_json() -> None:
    name = Name("t.csv", (("method", "sCD-S"),), 2, "fid")
    found = {
        name: Number(0.1 + 0.2, 1e-17, "5000", "run-1 run-2"),
        name._replace(which=1): Number(math.inf, None, "", ""),
    }
    entries = json.loads(json.dumps(dump(found, {"run-1": "0", "run-2": "0"}), allow_nan=False))
    assert parse(entries) == found
    assert [entry["seed"] for entry in entries] == ["0", ""]
