# SPDX-License-Identifier: Apache-2.0
"""Tables 1, 2, 5, 6, 7 and E3: the published rows unchanged, ours at the guidance that the sweep selected; and the sweep itself."""

import csv
import json
import types
from pathlib import Path

import pandas as pd
import pytest

from pipeline import measured as found
from pipeline.params import Params, load, validate
from pipeline.quantities import by_size, quantities
from pipeline.scaling import our_systems, ours, papers, systems
from pipeline.shown import COND, LATENT, UNCOND
from pipeline.sweep import FIELDS, REPORT, SELECT, Plan, Point, reported, sweep
from pipeline.tables import (
    PAPER_SETTING,
    SECTIONS,
    TABLE1_COLUMNS,
    TABLE2_COLUMNS,
    format_count,
    measured_note,
    our_rows,
    table1,
    table2,
    table6,
    table_e3,
)
from pipeline.webpage.tables import read_notes
from pipeline.writing import MISSING, publish_table, to_latex, to_markdown, write_table
from tests.pipeline.plain import plain

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "reports" / "paper"


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


def write_evaluation(
    folder: Path,
    rows: list[tuple[int, float | None, int, float, bool]],
    space: str = "classifier",
    error: float = 0.01,
    nimg: int | None = None,
) -> Path:
    """An evaluation's output; rows are (steps, guidance, nfe, fid, best). With `nimg` they are added as those of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [
        {"phase": REPORT, "steps": steps, "guidance": guidance, "nfe": nfe, "samples": 5000, "space": space}
        | {"fid": fid, "fid_se": error, "best": best, "nimg": nimg, "ema": None if nimg is None else 0.05}
        for steps, guidance, nfe, fid, best in rows
    ]
    file = folder / "sweep.csv"
    before = [pd.read_csv(file)] if file.exists() else []
    parts = [*before, pd.DataFrame(table, columns=list(FIELDS))]
    pd.concat([part.dropna(axis=1, how="all") for part in parts]).reindex(columns=list(FIELDS)).to_csv(
        file, index=False
    )
    facts = {"run": f"run-{folder.name}", "params": 478_000, "dataset": "digits", "reference_images": 100}
    names = {"classifier": "toy (8-d)", "dinov2": "other (8-d)"}
    (folder / "evaluation.json").write_text(json.dumps({**facts, "features": names}))
    return folder


def evaluations(folder: Path, models: dict[str, list[tuple[int, float | None, int, float, bool]]]) -> pd.DataFrame:
    """The points of models, named as a report's inputs are."""
    return found.read({name: write_evaluation(folder / name, rows) for name, rows in models.items()})


@pytest.fixture(scope="module")
def demo() -> Params:
    """Scale demo with latents alone: sizes S and M, sCD and sCT."""
    return validate(plain())


MODELS = {
    "evaluate-latent_guided-M-teacher": [(32, 1.0, 63, 0.7, False), (32, 1.3, 126, 0.2, True)],
    "evaluate-latent_guided-M-scd": [(1, 1.0, 1, 0.5, False), (1, 1.4, 1, 0.3, True), (2, 1.0, 2, 0.1, True)],
    "evaluate-latent_guided-S-sct": [(1, None, 1, 0.9, True), (2, None, 2, 0.8, True)],
}


def test_our_rows_take_the_best_scale_and_the_teacher_also_scale_one(tmp_path: Path, demo: Params) -> None:
    points = evaluations(tmp_path, MODELS)
    rows = our_rows(points, [LATENT], demo.active, "demo", tuple(SECTIONS))
    shown = {(r["method"], r.get("nfe"), r.get("guidance"), r["fid"]) for r in rows if r["fid"] != MISSING}
    assert shown == {
        ("teacher-M", "63", "1.00", "0.700"),
        ("teacher-M", "63x2", "1.30", "0.200"),
        ("sCT-S", "1", "", "0.900"),
        ("sCT-S", "2", "", "0.800"),
        ("sCD-M", "1", "1.40", "0.300"),
        ("sCD-M", "2", "1.00", "0.100"),
    }
    assert all(r["section"].startswith("Ours, scale demo") for r in rows)
    assert {r["dataset"] for r in rows if r["fid"] != MISSING} == {"digits"}
    unlabelled = evaluations(tmp_path / "b", {"evaluate-latent_guided-S-teacher": [(32, None, 63, 0.7, True)]})
    (row,) = [r for r in our_rows(unlabelled, [LATENT], demo.active, "demo", ["teacher"]) if r["fid"] != MISSING]
    assert (row["nfe"], row["guidance"]) == ("63", "")
    scales = [found.best_guidance(found.of_model(points, LATENT, "M", "scd"), steps) for steps in (1, 2)]
    assert scales == [1.4, 1.0]
    assert found.best_guidance(found.of_model(points, LATENT, "S", "sct"), 1) is None


def test_what_was_not_run_is_missing_and_never_a_number(tmp_path: Path, demo: Params) -> None:
    rows = our_rows(evaluations(tmp_path, MODELS), [LATENT], demo.active, "demo", tuple(SECTIONS))
    missing = {(r["method"], r["nfe"]) for r in rows if r["fid"] == MISSING}
    assert missing == {("teacher-S", "63"), *((name, nfe) for name in ("sCT-M", "sCD-S") for nfe in "12")}
    assert not any("run" in r or "fid_se" in r for r in rows if r["fid"] == MISSING)
    elsewhere = our_rows(found.read({}), [UNCOND, COND], demo.active, "demo", ["scd"])
    assert [(r["fid"], r["dataset"]) for r in elsewhere] == [
        (MISSING, f"{slot}: not in this scale") for slot in (UNCOND, COND)
    ]
    six = table6(ROOT, found.read({}), None, LATENT, "demo")
    assert set(six[six.section == "Ours, scale demo"].fid_1step) == {MISSING}
    five = quantities(ROOT, "table5", LATENT, found.read({}), demo.active, "demo")
    mine = five[five.section != "Published"]
    told = ("ema_sigma_rel", "t_mid")  # settings
    assert set(mine[~mine.quantity.isin(told)].value) == {MISSING}


def test_sets_and_repeated_trainings_stand_with_their_mean(tmp_path: Path, demo: Params) -> None:
    """Two sets: their own errors. Three trainings: the spread over √3, or their own errors where these are larger."""
    sets = evaluations(
        tmp_path / "a", {"evaluate-latent_guided-S-sct": [(1, None, 1, 0.9, True), (1, None, 1, 0.7, True)]}
    )
    number = found.number(found.reported(sets, 1))
    assert number is not None
    assert (number.value, number.error, number.seeds) == pytest.approx((0.8, 0.01 / 2**0.5, 1))
    names = ("scd", "scd_seed2", "scd_seed3")
    seeds = evaluations(
        tmp_path / "b",
        {
            f"evaluate-latent_guided-S-{name}": [(1, 1.2, 1, fid, True)]
            for name, fid in zip(names, (1.0, 1.2, 1.7), strict=True)
        },
    )
    assert set(seeds.method) == {"scd"}
    number = found.number(found.reported(seeds, 1))
    assert number is not None
    sd = ((0.3**2 + 0.1**2 + 0.4**2) / 2) ** 0.5
    assert (number.value, number.spread, number.error, number.seeds) == pytest.approx((1.3, sd, sd / 3**0.5, 3))
    row = next(r for r in our_rows(seeds, [LATENT], demo.active, "demo", ["scd"]) if r["fid"] != MISSING)
    assert (row["fid"], row["seeds"]) == ("1.300", "3")
    assert row["run"].split() == [f"run-evaluate-latent_guided-S-{name}" for name in names]
    equal = {f"evaluate-latent_guided-S-{name}": [(1, 1.2, 1, 1.0, True)] for name in names}
    number = found.number(found.reported(evaluations(tmp_path / "c", equal), 1))
    assert number is not None
    assert number.error == pytest.approx(0.01 / 3**0.5)


def published_rows(name: str) -> list[dict[str, str]]:
    with (PAPER / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def same_rows(table: pd.DataFrame, name: str, count: int) -> None:
    """The first rows of a table are those of a published one, cell by cell, without a run; and Markdown has every one of their values."""
    expected = published_rows(name)
    assert len(expected) == count
    for row, cells in zip(table.to_dict("records"), expected, strict=False):
        assert {key: row[key] for key in cells} == cells
        assert row["run"] == ""
    text = to_markdown(table, name)
    assert text.count("\n| ") == len(table) + table.groupby("section", sort=False).ngroups


def test_the_published_rows_stand_unchanged_and_ours_below_them(tmp_path: Path, demo: Params) -> None:
    points = evaluations(tmp_path, MODELS)
    mine = our_rows(points, [LATENT], demo.active, "demo", tuple(SECTIONS))
    two = table2(ROOT, mine)
    same_rows(two, "table2", 53)
    assert list(two.columns) == TABLE2_COLUMNS
    assert {key: two[key].iloc[0] for key in PAPER_SETTING} == PAPER_SETTING
    assert set(two["size"][:53]) == {"", "S", "M", "L", "XL", "XXL"}
    assert len(two) == 53 + len(mine)
    one = table1(ROOT, mine)
    same_rows(one, "table1", 69)
    assert list(one.columns) == TABLE1_COLUMNS
    same_rows(quantities(ROOT, "table5", LATENT, points, demo.active, "demo"), "table5", 200)
    same_rows(quantities(ROOT, "table7", COND, points, demo.active, "demo"), "table7", 32)
    six = table6(ROOT, points, demo.active.slots[LATENT], LATENT, "demo")
    same_rows(six, "table6", 3)
    same_rows(table_e3(ROOT, points, None, "demo"), "tableE3", 6)
    for table in (one, two, six):  # nothing measured here stands among what was measured on the paper's data
        assert not set(table[table.run != ""].dataset) & {"cifar10", "imagenet64", "ImageNet 512x512"}


def test_quantities_have_the_published_names_and_their_errors(tmp_path: Path, demo: Params) -> None:
    points = evaluations(tmp_path, MODELS)
    table = quantities(ROOT, "table5", LATENT, points, demo.active, "demo")
    mine = table[(table.section == "Ours, scale demo") & (table["size"] == "M")]
    known = {(r.sampler, r.quantity): (r.value, r.value_se) for r in mine.itertuples()}
    assert known[("sCD", "fid_1step")] == ("0.300", "0.010")
    assert known[("sCD", "guidance_for_fid_1step")] == ("1.4", "")
    assert known[("diffusion (NFE 126)", "fid_trigflow")] == ("0.200", "0.010")
    assert known[("sCD", "fd_dinov2_1step")] == (MISSING, "")
    paper = {r["quantity"] for r in published_rows("table5")}
    ours_only = set(mine.quantity) - paper
    assert ours_only <= {"fid"}  # of a multistep student that is not there
    wide = by_size(table)
    cell = wide[(wide.section == "Ours, scale demo") & (wide.sampler == "sCD") & (wide.quantity == "fid_1step")]
    assert cell[["S", "M"]].iloc[0].tolist() == [MISSING, "0.300 ± 0.010"]


def test_each_distance_of_table_6_has_the_guidance_of_its_own_space(tmp_path: Path) -> None:
    data = plain()
    slot = data["scales"]["demo"]["slots"][LATENT]
    scd = slot["students"]["scd"]
    vsd = {key: scd[key] for key in scd if not key.startswith(("tangent", "P_"))}
    more = {"vsd_P_mean": 0.4, "vsd_P_std": 2.0, "fake_P_mean": -0.8, "fake_P_std": 1.6, "fake_guidance": True}
    slot["students"]["vsd"] = {**vsd, "method": "vsd", **more}
    slot["sizes"]["M"]["students"]["vsd"] = {}
    params = validate(data)
    folder = write_evaluation(tmp_path / "evaluate-latent_guided-M-vsd", [(1, 1.3, 1, 0.5, True)])
    write_evaluation(folder, [(1, 1.5, 1, 7.0, True)], space="dinov2")
    table = table6(ROOT, found.read({folder.name: folder}), params.active.slots[LATENT], LATENT, "demo")
    row = table[(table.method == "VSD") & (table.run != "")].iloc[0]
    assert (row.fid_1step, row.guidance_for_fid_1step) == ("0.500", "1.30")
    assert (row.fd_dinov2_1step, row.guidance_for_fd_dinov2_1step, row.fd_dinov2_1step_se) == ("7.000", "1.50", "0.010")
    assert row.fid_2step == ""  # VSD alone has one step, as published


def test_effective_sampling_compute_and_ratios(tmp_path: Path, demo: Params) -> None:
    """Figure 1's x is parameters in billions × NFE, where guidance counts two; Figure 6's ratio is to the teacher of the same size."""
    table = systems(ROOT)
    assert len(table) == 53
    by_name = {(row.system, row.nfe): row.compute for row in table.itertuples()}
    assert by_name[("EDM2-S", 126)] == pytest.approx(0.28 * 126)
    assert by_name[("ADM-G", 500)] == pytest.approx(0.559 * 500)
    assert by_name[("sCD-XXL", 2)] == pytest.approx(3.0)
    paper = papers(ROOT, demo)
    row = paper[(paper.method == "scd") & (paper["size"] == "XXL") & (paper.steps == 2)].iloc[0]
    assert row.ratio == pytest.approx(1.88 / 1.73)
    assert len(paper) == 25
    points = evaluations(tmp_path, MODELS)
    slot = demo.active.slots[LATENT]
    mine = ours(points, slot, LATENT)
    row = mine[(mine.method == "scd") & (mine.steps == 2)].iloc[0]
    assert (row.ratio, row["size"]) == (pytest.approx(0.5), "M")
    assert row.ratio_se == pytest.approx(0.5 * ((0.01 / 0.1) ** 2 + (0.01 / 0.2) ** 2) ** 0.5)
    assert row.gflops == pytest.approx(slot.sizes["M"].network.flops(slot.items) / 1e9)
    assert set(mine[mine.method == "sct"]["size"]) == set()  # its teacher was not measured: no ratio, not a zero
    shown = our_systems(points, slot, LATENT, {"S": ["sct"], "M": ["scd"]})
    teacher = shown[shown.method == "teacher"].iloc[0]
    assert teacher.compute == pytest.approx(478_000e-9 * 126)


@pytest.mark.parametrize(
    ("number", "text"), [(478_000, "0.48M"), (280_200_000, "280M"), (1_523_400_000, "1.5B"), (9_990_000, "9.99M")]
)
def test_parameters_are_counted_as_the_paper_prints_them(number: int, text: str) -> None:
    assert format_count(number) == text


def test_our_rows_compare_with_the_published_ones_only_where_they_were_measured_alike() -> None:
    paper, demo = (load(ROOT / "params.yaml", scale) for scale in ("paper", "demo"))
    assert measured_note(paper, [LATENT]) == (
        "Rows headed *Ours* of latents were measured on imagenet (512 × 512) in Inception's features, as the published ones."
    )
    apart = "they compare with each other, not with the published rows."
    assert measured_note(demo, [LATENT]).startswith(
        "Rows headed *Ours* of latents were measured on mnist5k (32 × 32) in the features of a small classifier"
    )
    assert measured_note(demo, [LATENT]).endswith(apart)
    assert measured_note(paper, [UNCOND, COND]).count("as the published ones.") == 2
    data = load(ROOT / "params.yaml", "paper").model_dump(mode="json")
    data["scales"]["paper"]["slots"][LATENT]["dataset"]["resolution"] = 256
    assert measured_note(validate(data), [LATENT]).endswith(apart)


def test_a_table_is_written_in_three_forms(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"section": ["A & B", "Ours"], "method": ["50 % | x_1", "ours"], "fid": ["1.0", "2.0"], "run": ["", "r"]}
    )
    files = write_table(tmp_path, "t", table, "T", ["a note"])
    assert [file.name for file in files] == ["t.csv", "t.md", "t.tex"]
    assert pd.read_csv(files[0], dtype=str, keep_default_na=False).equals(table)
    text = files[1].read_text()
    assert "## A & B" in text
    assert r"| 50 % \| x_1 | 1.0 |" in text  # no column `run`, which the section does not fill
    assert "| ours | 2.0 | r |" in text
    latex = files[2].read_text()
    assert r"\subsection*{A \& B}" in latex
    assert r"50 \% | x\_1 & 1.0 \\" in latex
    assert latex.count(r"\begin{tabular}{ll}") == 1
    assert latex.count(r"\begin{tabular}{lll}") == 1


def test_the_note_of_a_scale_stands_before_all_others(tmp_path: Path) -> None:
    """Where a reader looks first, in the form that the page reads, too."""
    table, logged = pd.DataFrame({"fid": ["1.0"]}), []
    for note, lines in (
        ("Scale tiny: means nothing", ["*Scale tiny: means nothing.*", "", "a note"]),
        ("", ["a note"]),
    ):
        ctx = types.SimpleNamespace(out=tmp_path, note=note, tracker=types.SimpleNamespace(log_artifact=logged.append))
        publish_table(ctx, "t", table, "T", ["a note"])
        assert (tmp_path / "t.md").read_text().splitlines()[: 2 + len(lines)] == ["# T", "", *lines]
        assert note in str(read_notes(tmp_path / "t.md")[1][0])
    assert [path.name for path in logged] == 2 * ["t.csv", "t.md", "t.tex"]


def test_latex_has_no_character_that_it_would_read_otherwise() -> None:
    table = pd.DataFrame({"x": ["a_b^c{d}~e\\f#g$h%i&j", "σ ± 1 × 2 − 3"]})
    body = to_latex(table, "T").partition("begin{tabular}{l}")[2]
    for letter in "_#%&":
        assert body.count(letter) - body.count("\\" + letter) == 0, letter
    assert not any(letter in body for letter in "σ±×−")
