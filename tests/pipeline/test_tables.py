# SPDX-License-Identifier: Apache-2.0
"""Table 2: the published rows unchanged, ours at the guidance that the sweep selected; and the sweep itself."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from pipeline.evaluation import FIELDS, REPORT, SELECT, Point, count_points, reported, sweep
from pipeline.tables import PAPER_SETTING, TABLE2_COLUMNS, best_guidance, format_count, our_rows, table2, to_markdown

PAPER = Path(__file__).parents[2] / "reports" / "paper" / "table2.csv"


def measured(fid: dict[float | None, float], seen: list[Point]):
    """A measurement whose FID is a table by guidance; the reporting samples score 1 more."""

    def measure(point: Point) -> dict[str, float]:
        seen.append(point)
        value = fid[point.guidance] + (point.phase == REPORT)
        return {"nfe": 2, "fid": value, "fid_se": 0.1, "precision": 0.5, "recall": 0.5}

    return measure


def test_the_best_scale_is_selected_on_one_set_and_measured_on_another() -> None:
    seen: list[Point] = []
    rows = sweep((1, 2), (1.0, 1.5, 2.0), (100, 7), (500, 1000), measured({1.0: 3.0, 1.5: 2.0, 2.0: 4.0}, seen))
    assert [(p.phase, p.steps, p.guidance) for p in seen[:5]] == [
        (SELECT, 1, 1.0),
        (SELECT, 1, 1.5),
        (SELECT, 1, 2.0),
        (REPORT, 1, 1.0),
        (REPORT, 1, 1.5),
    ]
    assert {(p.samples, p.first_index) for p in seen if p.phase == SELECT} == {(100, 7)}
    assert {(p.samples, p.first_index) for p in seen if p.phase == REPORT} == {(500, 1000)}
    assert [row["fid"] for row in rows if row["phase"] == REPORT] == [4.0, 3.0, 4.0, 3.0]
    assert sum(p.samples for p in seen) <= count_points((1, 2), (1.0, 1.5, 2.0), 100, 500)
    assert len({p.key for p in seen}) == len(seen)


def test_a_best_scale_of_one_is_reported_once_and_an_unguided_model_without_a_scale() -> None:
    seen: list[Point] = []
    sweep((18,), (1.0, 1.5), (10, 0), (20, 50), measured({1.0: 1.0, 1.5: 2.0}, seen))
    assert [p.guidance for p in seen if p.phase == REPORT] == [1.0]
    unguided: list[Point] = []
    sweep((1, 2), None, (10, 0), (20, 50), measured({None: 1.0}, unguided))
    assert [(p.phase, p.steps, p.guidance) for p in unguided] == [(REPORT, 1, None), (REPORT, 2, None)]


def test_what_is_reported_is_the_selected_scale_and_the_one_without_guidance() -> None:
    fid = {1.0: 3.0, 1.5: 2.0, 2.0: 4.0}
    rows = sweep((1, 2), tuple(fid), (100, 7), (500, 1000), measured(fid, []))
    assert reported(rows) == {
        f"{steps}-step": {"fid": 3.0, "fid_se": 0.1, "guidance": 1.5, "fid_without_guidance": 4.0} for steps in (1, 2)
    }
    best_is_one = sweep((18,), (1.0, 1.5), (10, 0), (20, 50), measured({1.0: 1.0, 1.5: 2.0}, []))
    assert reported(best_is_one)["18-step"]["fid"] == reported(best_is_one)["18-step"]["fid_without_guidance"] == 2.0
    below_one = sweep((18,), (0.5, 1.0), (10, 0), (20, 50), measured({0.5: 1.0, 1.0: 2.0}, []))
    assert (reported(below_one)["18-step"]["guidance"], reported(below_one)["18-step"]["fid"]) == (0.5, 2.0)
    assert reported(sweep((1,), None, (10, 0), (20, 50), measured({None: 1.0}, []))) == {
        "1-step": {"fid": 2.0, "fid_se": 0.1}
    }


def write_evaluation(folder: Path, rows: list[tuple[int, float | None, int, float]]) -> Path:
    """An evaluation's output; rows are (steps, guidance, nfe, fid)."""
    folder.mkdir()
    lines = [[REPORT, steps, guidance, nfe, 5000, 0, fid, 0.01, 0.8, 0.7] for steps, guidance, nfe, fid in rows]
    pd.DataFrame(lines, columns=list(FIELDS)).to_csv(folder / "sweep.csv", index=False)
    facts = {"run": f"run-{folder.name}", "params": 478_000, "dataset": "digits", "features": "toy (8-d)"}
    (folder / "evaluation.json").write_text(json.dumps(facts))
    return folder


def test_our_rows_take_the_best_scale_and_the_teacher_also_scale_one(tmp_path: Path) -> None:
    teacher = write_evaluation(tmp_path / "teacher", [(18, 1.0, 35, 0.7), (18, 1.3, 70, 0.2)])
    student = write_evaluation(tmp_path / "scd", [(1, 1.0, 1, 0.5), (1, 1.4, 1, 0.3), (2, 1.0, 2, 0.1)])
    unguided = write_evaluation(tmp_path / "sct", [(1, None, 1, 0.9), (2, None, 2, 0.8)])
    assert [(r["nfe"], r["guidance"], r["fid"]) for r in our_rows(teacher, "M", "teacher", "demo")] == [
        ("35", "1.00", "0.700"),
        ("35x2", "1.30", "0.200"),
    ]
    unlabelled = write_evaluation(tmp_path / "unlabelled", [(18, None, 35, 0.7)])  # a teacher that nothing guides
    assert [(r["nfe"], r["guidance"]) for r in our_rows(unlabelled, "M", "teacher", "demo")] == [("35", "")]
    rows = our_rows(student, "M", "scd", "demo")
    assert [(r["method"], r["nfe"], r["guidance"], r["fid"]) for r in rows] == [
        ("sCD-M", "1", "1.40", "0.300"),
        ("sCD-M", "2", "1.00", "0.100"),
    ]
    assert all(r["section"].startswith("Ours, scale demo") and r["dataset"] == "digits" for r in rows)
    assert [(r["nfe"], r["guidance"]) for r in our_rows(unguided, "S", "sct", "demo")] == [("1", ""), ("2", "")]
    assert (best_guidance(student, 1), best_guidance(student, 2), best_guidance(unguided, 1)) == (1.4, 1.0, None)


def test_the_published_rows_stand_unchanged_and_ours_below_them(tmp_path: Path) -> None:
    ours = our_rows(write_evaluation(tmp_path / "sct", [(1, None, 1, 0.9)]), "S", "sct", "demo")
    table = table2(PAPER, ours)
    with PAPER.open() as file:
        published = list(csv.DictReader(file))
    assert list(table.columns) == TABLE2_COLUMNS
    assert len(published) == 53
    assert len(table) == 54
    for row, expected in zip(table.to_dict("records"), published, strict=False):
        assert {key: row[key] for key in ("section", "method", "nfe", "fid", "params")} == {
            key: expected[key] for key in ("section", "method", "nfe", "fid", "params")
        }
        assert {key: row[key] for key in PAPER_SETTING} == PAPER_SETTING
        assert row["run"] == ""
    assert set(table["size"][:53]) == {"", "S", "M", "L", "XL", "XXL"}
    text = to_markdown(table, "Table 2", ["note"])
    assert text.count("\n| ") == 54 + table["section"].nunique()


@pytest.mark.parametrize(
    ("number", "text"), [(478_000, "0.48M"), (280_200_000, "280M"), (1_523_400_000, "1.5B"), (9_990_000, "9.99M")]
)
def test_parameters_are_counted_as_the_paper_prints_them(number: int, text: str) -> None:
    assert format_count(number) == text
