# SPDX-License-Identifier: Apache-2.0
"""Table 2: the published rows unchanged, ours at the guidance that the sweep selected; and the sweep itself."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from pipeline.params import load
from pipeline.sweep import FIELDS, REPORT, SELECT, Plan, Point, reported, sweep
from pipeline.tables import (
    PAPER_SETTING,
    TABLE2_COLUMNS,
    best_guidance,
    format_count,
    measured_note,
    our_rows,
    table2,
    to_markdown,
)

PAPER = Path(__file__).parents[2] / "reports" / "paper" / "table2.csv"


GRID = {1.0: 3.0, 1.5: 2.0, 2.0: 4.0}
DISTANCES = {"classifier": "fid", "dinov2": "fd_dinov2"}


def measured(fid: dict[float | None, float], seen: list[Point], other: dict[float | None, float] | None = None):
    """A measurement whose FID is a table by guidance, in one space or two; the reporting samples score 1 more, and by set."""

    def measure(point: Point) -> dict[str, dict[str, float]]:
        seen.append(point)
        more = (point.phase == REPORT) * (1 + (point.first_index - 1000) / 1000)
        tables = {"classifier": fid, **({"dinov2": other} if other else {})}
        return {
            space: {"nfe": 2, "fid": table[point.guidance] + more, "fid_se": 0.1} for space, table in tables.items()
        }

    return measure


def plan(steps: tuple[int, ...], grid: tuple[float, ...] | None, reports: tuple[int, ...] = (1000,)) -> Plan:
    return Plan(steps, grid, (100, 7), 500, reports)


def rows_of(steps: tuple[int, ...], fid: dict, seen: list[Point] | None = None, reports: tuple[int, ...] = (1000,)):
    """The sweep over a table's scales in one space."""
    grid = None if None in fid else tuple(fid)
    return sweep(plan(steps, grid, reports), ["classifier"], measured(fid, [] if seen is None else seen))


def test_the_best_scale_is_selected_on_one_set_and_measured_on_another() -> None:
    seen: list[Point] = []
    rows = rows_of((1, 2), GRID, seen)
    assert [(p.phase, p.steps, p.guidance) for p in seen[:5]] == [
        (SELECT, 1, 1.0),
        (SELECT, 1, 1.5),
        (SELECT, 1, 2.0),
        (REPORT, 1, 1.0),
        (REPORT, 1, 1.5),
    ]
    assert {(p.samples, p.first_index) for p in seen if p.phase == SELECT} == {(100, 7)}
    assert {(p.samples, p.first_index) for p in seen if p.phase == REPORT} == {(500, 1000)}
    assert [(row["fid"], row["best"]) for row in rows if row["phase"] == REPORT] == 2 * [(4.0, False), (3.0, True)]
    assert not any(row["best"] for row in rows if row["phase"] == SELECT)
    assert sum(p.samples for p in seen) == plan((1, 2), tuple(GRID)).most_samples()
    assert len(set(seen)) == len(seen)


def test_each_space_selects_its_own_scale_and_sets_are_reported_at_all_of_them() -> None:
    seen: list[Point] = []
    grid, reports = tuple(GRID), (1000, 1500)
    measure = measured(GRID, seen, other={1.0: 9.0, 1.5: 8.0, 2.0: 7.0})
    rows = sweep(plan((1,), grid, reports), list(DISTANCES), measure)
    assert [(p.guidance, p.first_index) for p in seen if p.phase == REPORT] == [
        (s, first) for s in (1.0, 1.5, 2.0) for first in reports
    ]
    best = {(row["space"], row["guidance"]) for row in rows if row["best"]}
    assert best == {("classifier", 1.5), ("dinov2", 2.0)}
    assert sum(p.samples for p in seen) == plan((1,), grid, reports).most_samples(spaces=2)
    entry = reported(rows, DISTANCES)["1-step"]
    assert (entry["fid"], entry["guidance"], entry["fid_without_guidance"]) == (3.25, 1.5, 4.25)
    assert (entry["fd_dinov2"], entry["fd_dinov2_guidance"], entry["fd_dinov2_without_guidance"]) == (8.25, 2.0, 10.25)
    # two sets at 3.0 and 3.5: their mean, its error from their own, their spread, the smaller one under its own name
    assert entry["fid_se"] == pytest.approx(0.1 / 2**0.5)
    assert entry["fid_sd"] == pytest.approx(0.5 / 2**0.5)
    assert (entry["fid_min"], entry["fid_sets"]) == (3.0, 2)


def test_a_best_scale_of_one_is_reported_once_and_an_unguided_model_without_a_scale() -> None:
    seen: list[Point] = []
    rows = rows_of((18,), {1.0: 1.0, 1.5: 2.0}, seen)
    assert [p.guidance for p in seen if p.phase == REPORT] == [1.0]
    assert [row["best"] for row in rows] == [False, False, True]
    unguided: list[Point] = []
    rows = rows_of((1, 2), {None: 1.0}, unguided)
    assert [(p.phase, p.steps, p.guidance) for p in unguided] == [(REPORT, 1, None), (REPORT, 2, None)]
    assert all(row["best"] for row in rows)


def test_what_is_reported_is_the_selected_scale_and_the_one_without_guidance() -> None:
    assert reported(rows_of((1, 2), GRID), DISTANCES) == {
        f"{steps}-step": {"fid": 3.0, "fid_se": 0.1, "guidance": 1.5, "fid_without_guidance": 4.0} for steps in (1, 2)
    }
    best_is_one = reported(rows_of((18,), {1.0: 1.0, 1.5: 2.0}), DISTANCES)["18-step"]
    assert best_is_one["fid"] == best_is_one["fid_without_guidance"] == 2.0
    below_one = reported(rows_of((18,), {0.5: 1.0, 1.0: 2.0}), DISTANCES)["18-step"]
    assert (below_one["guidance"], below_one["fid"]) == (0.5, 2.0)
    assert reported(rows_of((1,), {None: 1.0}), DISTANCES) == {"1-step": {"fid": 2.0, "fid_se": 0.1}}


def write_evaluation(folder: Path, rows: list[tuple[int, float | None, int, float, bool]]) -> Path:
    """An evaluation's output; rows are (steps, guidance, nfe, fid, best)."""
    folder.mkdir()
    table = [
        {"phase": REPORT, "steps": steps, "guidance": guidance, "nfe": nfe, "samples": 5000, "space": "classifier"}
        | {"fid": fid, "fid_se": 0.01, "best": best}
        for steps, guidance, nfe, fid, best in rows
    ]
    pd.DataFrame(table, columns=list(FIELDS)).to_csv(folder / "sweep.csv", index=False)
    facts = {
        "run": f"run-{folder.name}", "params": 478_000, "dataset": "digits", "features": {"classifier": "toy (8-d)"}
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(facts))
    return folder


def test_our_rows_take_the_best_scale_and_the_teacher_also_scale_one(tmp_path: Path) -> None:
    teacher = write_evaluation(tmp_path / "teacher", [(18, 1.0, 35, 0.7, False), (18, 1.3, 70, 0.2, True)])
    student = write_evaluation(
        tmp_path / "scd", [(1, 1.0, 1, 0.5, False), (1, 1.4, 1, 0.3, True), (2, 1.0, 2, 0.1, True)]
    )
    unguided = write_evaluation(tmp_path / "sct", [(1, None, 1, 0.9, True), (2, None, 2, 0.8, True)])
    assert [(r["nfe"], r["guidance"], r["fid"]) for r in our_rows(teacher, "M", "teacher", "demo")] == [
        ("35", "1.00", "0.700"),
        ("35x2", "1.30", "0.200"),
    ]
    unlabelled = write_evaluation(tmp_path / "unlabelled", [(18, None, 35, 0.7, True)])  # a teacher that nothing guides
    assert [(r["nfe"], r["guidance"]) for r in our_rows(unlabelled, "M", "teacher", "demo")] == [("35", "")]
    rows = our_rows(student, "M", "scd", "demo")
    assert [(r["method"], r["nfe"], r["guidance"], r["fid"]) for r in rows] == [
        ("sCD-M", "1", "1.40", "0.300"),
        ("sCD-M", "2", "1.00", "0.100"),
    ]
    assert all(r["section"].startswith("Ours, scale demo") and r["dataset"] == "digits" for r in rows)
    assert [(r["nfe"], r["guidance"]) for r in our_rows(unguided, "S", "sct", "demo")] == [("1", ""), ("2", "")]
    assert (best_guidance(student, 1), best_guidance(student, 2), best_guidance(unguided, 1)) == (1.4, 1.0, None)


def test_several_sets_stand_in_the_table_with_their_mean(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "sct", [(1, None, 1, 0.9, True), (1, None, 1, 0.7, True)])
    (row,) = our_rows(folder, "S", "sct", "demo")
    assert (row["fid"], row["fid_se"], row["samples"]) == ("0.800", "0.007", "5000")


def test_the_published_rows_stand_unchanged_and_ours_below_them(tmp_path: Path) -> None:
    ours = our_rows(write_evaluation(tmp_path / "sct", [(1, None, 1, 0.9, True)]), "S", "sct", "demo")
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


def test_our_rows_compare_with_the_published_ones_only_where_they_were_measured_alike() -> None:
    scales = load(PAPER.parents[2] / "params.yaml").scales
    paper, demo = scales["paper"].slots["latent_guided"], scales["demo"].slots["latent_guided"]
    assert measured_note(paper) == (
        "Rows headed *Ours* were measured on imagenet (512 × 512) in Inception's features, as the published ones."
    )
    apart = "they compare with each other, not with the published rows."
    assert measured_note(demo).startswith(
        "Rows headed *Ours* were measured on mnist5k (32 × 32) in the features of a small classifier"
    )
    assert measured_note(demo).endswith(apart)
    smaller = paper.model_copy(update={"dataset": paper.dataset.model_copy(update={"resolution": 256})})
    assert measured_note(smaller).endswith(apart)
