# SPDX-License-Identifier: Apache-2.0
"""Claims: the rule by which they are judged, what each of them measures, and that a missing run never decides one."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline import measured
from pipeline.claims import (
    COLUMNS,
    FAILS,
    HOLDS,
    OPEN,
    Absent,
    Claim,
    Evidence,
    Found,
    claim,
    judged,
    over_guidance,
    table,
)
from pipeline.curves import curve, figure5_table
from pipeline.headlines import claims, got_worse
from pipeline.params import Params, load, validate
from pipeline.shown import ITEMS, LATENT
from pipeline.sweep import FIELDS
from tests.pipeline.plain import plain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> Params:
    """The demo as it is."""
    return load(ROOT / "params.yaml", "demo")


def row(slot: str, size: str, method: str, **numbers: Any) -> dict[str, Any]:
    """A measured point, reported at the best guidance unless it says otherwise."""
    base, _, seed = method.partition("_seed")
    empty = dict.fromkeys(FIELDS)
    own = {"slot": slot, "size": size, "method": base, "seed": int(seed or 1), "run": f"run-{size}-{method}"}
    own |= {"params": 1000, "dataset": "toy", "reference_images": 10, "features": "toy (8-d)", "skipped": 0}
    known = {
        "phase": "report",
        "steps": 1,
        "guidance": 1.2,
        "best": True,
        "space": "classifier",
        "nfe": 1,
        "samples": 5000,
    }
    return {**empty, **own, **known, "fid_se": 0.01, "precision_se": 0.01, "recall_se": 0.01, **numbers}


def evidence(params: Params, *rows: dict[str, Any]) -> Evidence:
    columns = [*measured.OWN, *FIELDS]
    return Evidence(pd.DataFrame(rows, columns=columns), params, ROOT)


def found(seen: Evidence, name: str) -> Claim:
    (wanted,) = [c for c in claims(seen) if c.id == name]
    return wanted


@pytest.mark.parametrize(
    ("margin", "error", "verdict"),
    [(0.3, 0.1, HOLDS), (0.19, 0.1, OPEN), (-0.19, 0.1, OPEN), (-0.21, 0.1, FAILS), (0.0, 0.0, OPEN), (0.1, 0.0, HOLDS)],
)  # fmt: skip
def test_two_standard_errors_decide(margin: float, error: float, verdict: str) -> None:
    assert judged(margin, error) == verdict


def test_the_sign_of_a_count_decides() -> None:
    assert [judged(margin, None) for margin in (0.1, 0.0, -0.1)] == [HOLDS, HOLDS, FAILS]


def test_without_any_run_nothing_is_decided_but_what_is_counted(demo: Params) -> None:
    judgements = {c.id: c for c in claims(evidence(demo))}
    assert {name for name, c in judgements.items() if c.verdict != OPEN} == {"iteration_cost"}
    assert all(
        c.ours == "missing" and c.why and not c.runs for name, c in judgements.items() if name != "iteration_cost"
    )
    assert judgements["iteration_cost"].ours == "2.000"  # sCD with guidance: 6 passes to the teacher's 3
    assert list(table(judgements.values(), "demo", evidence(demo).points).columns) == COLUMNS


def test_a_claim_names_the_data_and_features_of_its_own_runs(demo: Params) -> None:
    rows = [
        row(LATENT, "M", "teacher", fid=1.0, steps=18, nfe=70),
        row(LATENT, "M", "scd", fid=1.0, steps=2),
        row("pixel_uncond", "S", "sct_2000", fid=1.0, dataset="others", features="others (4-d)"),
        row("pixel_uncond", "S", "ect_2000", fid=1.5, dataset="others", features="others (4-d)"),
    ]
    seen = evidence(demo, *rows)
    shown = table(claims(seen), "demo", seen.points).set_index("id")
    assert list(shown.loc["two_step_gap_M", ["dataset", "features"]]) == ["toy", "toy (8-d)"]
    assert list(shown.loc["sct_against_ect", ["dataset", "features"]]) == ["others", "others (4-d)"]
    assert list(shown.loc["iteration_cost", ["dataset", "features"]]) == ["", ""]


def test_a_scale_without_latents_has_claims_too() -> None:
    params = load(ROOT / "params.yaml", "one-gpu")
    assert {c.verdict for c in claims(evidence(params))} == {OPEN}


@pytest.mark.parametrize(("fid", "verdict"), [(0.95, HOLDS), (1.08, OPEN), (1.3, FAILS)])
def test_the_two_step_gap_is_the_ratio_with_both_errors(demo: Params, fid: float, verdict: str) -> None:
    seen = evidence(
        demo,
        row(LATENT, "M", "teacher", fid=1.0, fid_se=0.01, steps=18, nfe=70),
        row(LATENT, "M", "scd", fid=fid, fid_se=0.02, steps=2),
    )
    gap = found(seen, "two_step_gap_M")
    assert (gap.verdict, gap.ours) == (verdict, f"{fid:.3f}")
    error = fid * ((0.02 / fid) ** 2 + 0.01**2) ** 0.5
    assert float(gap.standard_error) == pytest.approx(error, abs=5e-4)
    assert gap.runs == "run-M-scd run-M-teacher"
    assert gap.why.endswith("trainings: 1") or verdict == OPEN  # whose why goes on with the margin
    assert gap.paper.endswith("1.087 (XXL)")  # 1.88 / 1.73
    assert found(seen, "two_step_gap_S").verdict == OPEN


def test_sampling_compute_counts_passes_and_parameters(demo: Params) -> None:
    teacher = row(LATENT, "M", "teacher", fid=1.0, steps=18, nfe=70)
    cheap = found(evidence(demo, teacher, row(LATENT, "M", "scd", fid=1.0, steps=2, nfe=2)), "sampling_compute")
    assert (cheap.verdict, cheap.ours, cheap.standard_error) == (HOLDS, "0.029", "")
    dear = found(evidence(demo, teacher, row(LATENT, "M", "scd", fid=1.0, steps=2, nfe=8)), "sampling_compute")
    assert dear.verdict == FAILS
    assert cheap.paper == "0.049 (sCD-XXL over MAR)"  # 1.5 · 2 / (0.481 · 128)


def sweep(method: str, column: str, values: dict[float, float], **more: Any) -> list[dict[str, Any]]:
    return [
        row(LATENT, "M", method, phase="select", best=False, guidance=scale, fid=1.0, **{column: value}, **more)
        for scale, value in values.items()
    ]


def test_vsd_is_compared_at_equal_guidance(demo: Params) -> None:
    """At the scales that both have; errors do not shrink with their number, as the noise is the same."""
    rows = [
        *sweep("vsd", "recall", {1.0: 0.5, 1.5: 0.3, 1.7: 0.0}),
        *sweep("scd", "recall", {1.0: 0.6, 1.5: 0.5, 2.0: 0.9}),
    ]
    result = found(evidence(demo, *rows), "vsd_recall")
    assert (result.verdict, result.ours) == (HOLDS, "-0.150")
    assert float(result.standard_error) == pytest.approx(0.01 * 2**0.5, abs=5e-4)
    assert found(evidence(demo, *rows), "vsd_precision").verdict == OPEN
    swapped = [*sweep("scd", "recall", {1.0: 0.5}), *sweep("vsd", "recall", {1.0: 0.6})]
    assert found(evidence(demo, *swapped), "vsd_recall").verdict == FAILS
    with pytest.raises(Absent):
        over_guidance(pd.DataFrame({"guidance": []}), pd.DataFrame({"guidance": [1.0]}), "recall", "x")


def test_guidance_is_judged_between_its_ends(demo: Params) -> None:
    rows = sweep("scd", "precision", {1.0: 0.5, 1.5: 0.2, 2.0: 0.8}, steps=2)
    assert found(evidence(demo, *rows), "guidance_precision")[3:7:3] == ("0.300", HOLDS)


def test_ablations_compare_trainings_by_their_spread(demo: Params) -> None:
    def trainings(method: str, *fids: float) -> list[dict[str, Any]]:
        return [row(LATENT, "S", f"{method}{f'_seed{i}' * (i > 1)}", fid=fid) for i, fid in enumerate(fids, 1)]

    base = trainings("scd_norm", 1.0, 1.1, 1.2)
    far = found(evidence(demo, *base, *trainings("scd_raw", 2.0, 2.1, 2.2)), "normalised_against_raw")
    assert (far.verdict, far.ours) == (HOLDS, "1.000")
    assert float(far.standard_error) == pytest.approx((2 * 0.1**2 / 3) ** 0.5, abs=5e-4)
    assert len(far.runs.split()) == 6
    near = found(evidence(demo, *base, *trainings("scd_raw", 1.05, 1.15, 1.25)), "normalised_against_raw")
    assert near.verdict == OPEN
    assert "trainings: 3" in far.why
    discrete = [*trainings("dscd_16", 3.0), *trainings("dscd_1024", 1.5)]
    assert found(evidence(demo, *base, *discrete), "discrete_improves").verdict == HOLDS
    assert found(evidence(demo, *base, *discrete), "continuous_against_discrete").verdict == HOLDS


@pytest.mark.parametrize(("clipped", "verdict"), [(1.0, HOLDS), (0.9, OPEN), (0.8, FAILS)])
def test_not_worse_is_shown_against_what_counts_as_worse(demo: Params, clipped: float, verdict: str) -> None:
    """Equally good is not worse, though the difference is nothing; one that is a quarter better is."""
    seen = evidence(demo, row(LATENT, "S", "scd_norm", fid=1.0), row(LATENT, "S", "scd_clip", fid=clipped))
    result = found(seen, "normalised_against_clipped")
    assert (result.verdict, result.ours) == (verdict, f"{1 / clipped:.3f}")


def test_recall_that_is_not_there_cannot_be_kept(demo: Params) -> None:
    """A loss of less than 0.05 of a recall of 0.02 says nothing."""

    def kept(teacher: float, student: float) -> Claim:
        rows = [*sweep("teacher", "recall", {1.0: teacher}, steps=18), *sweep("scd", "recall", {1.0: student}, steps=2)]
        return found(evidence(demo, *rows), "scd_keeps_recall")

    assert (kept(0.5, 0.49).verdict, kept(0.5, 0.4).verdict) == (HOLDS, FAILS)
    nothing = kept(0.02, 0.02)
    assert (nothing.verdict, nothing.ours) == (OPEN, "0.000")
    assert "its teacher's recall is 0.020" in nothing.why


def test_the_papers_own_sizes_are_judged_by_the_number_that_ours_is(demo: Params) -> None:
    """Largest over smallest ratio of Table 2, less one: 2.26 / 2.00 over 1.93 / 1.80."""
    seen = evidence(demo)
    expected = (2.26 / 2.00) / (1.93 / 1.80) - 1
    assert found(seen, "constant_ratio").paper == f"{expected:.3f} (1.072 to 1.130)"


def test_ect_and_sct_are_compared_after_the_longest_training_of_both(demo: Params) -> None:
    fids = {"ect_500": 1.0, "sct_500": 2.0, "ect_2000": 0.9, "sct_2000": 0.5}
    rows = [row("pixel_uncond", "S", name, fid=fid) for name, fid in fids.items()]
    result = found(evidence(demo, *rows), "sct_against_ect")
    assert (result.verdict, result.ours, result.paper) == (HOLDS, "-0.400", "-0.51 (3.09 − 3.60)")
    assert result.why.startswith("2000 iterations")


def curve_of(demo: Params, fids: list[float], skipped: int = 0) -> Evidence:
    """sCD of size S, measured after 500, 1000, 3000 and 6000 iterations of 64 and at the end."""
    seen = [64 * n for n in (500, 1000, 3000, 6000)]
    rows = [row(LATENT, "S", "scd", fid=f, nimg=n, ema=0.05, skipped=skipped) for f, n in zip(fids, seen, strict=False)]
    return evidence(demo, *rows, row(LATENT, "S", "scd", fid=fids[-1], skipped=skipped))


def test_a_curve_ends_with_the_training(demo: Params) -> None:
    seen = curve_of(demo, [3.0, 2.0, 1.5, 1.05, 1.0])
    slot = demo.active.slots[LATENT]
    points = curve(seen.points, slot, LATENT, "S", "scd", 1)
    assert list(points.iterations) == [500, 1000, 3000, 6000, slot.student_for("S", "scd").iterations]
    assert list(points.fid) == [3.0, 2.0, 1.5, 1.05, 1.0]
    other_average = {**row(LATENT, "S", "scd", fid=9.0), "ema": 0.1}
    again = evidence(demo, *seen.points.to_dict("records"), other_average)
    assert list(curve(again.points, slot, LATENT, "S", "scd", 1).fid) == [3.0, 2.0, 1.5, 1.05, 1.0]
    panels = figure5_table(seen.points, slot, LATENT, "S", 1)
    assert panels.empty  # none of the ablations was measured


def test_convergence_is_the_first_point_near_the_last(demo: Params) -> None:
    slot = demo.active.slots[LATENT]
    result = found(curve_of(demo, [3.0, 2.0, 1.5, 1.05, 1.0]), "training_compute")
    student, teacher = slot.student_for("S", "scd"), slot.teacher_for("S")
    expected = 6000 * student.batch * 6 / (teacher.iterations * teacher.batch * 3)  # passes: two to one
    assert float(result.ours) == pytest.approx(expected, abs=5e-4)
    assert result.verdict == FAILS
    assert "iteration 6000" in result.why


@pytest.mark.parametrize(
    ("fids", "verdict", "iteration"),
    [
        (
            [1.0, 1.0],
            OPEN,
            500,
        ),  # near at the first one that was measured, whose cost is half the teacher's: perhaps before
        ([3.0, 1.0, 1.0], FAILS, 1000),  # not at half of it
        ([3.0, 1.0, 3.0, 1.0, 1.0], FAILS, 6000),  # where it comes to stay, not where it passes by
        ([1.0], OPEN, 9000),
    ],
)
def test_what_was_not_measured_decides_no_convergence(
    demo: Params, fids: list[float], verdict: str, iteration: int
) -> None:
    slot = demo.active.slots[LATENT]
    assert slot.student_for("S", "scd").iterations == 9000
    seen = curve_of(demo, fids) if len(fids) > 1 else evidence(demo, row(LATENT, "S", "scd", fid=1.0))
    result = found(seen, "training_compute")
    student, teacher = slot.student_for("S", "scd"), slot.teacher_for("S")
    assert float(result.ours) == pytest.approx(
        iteration * student.batch * 6 / (teacher.iterations * teacher.batch * 3), abs=5e-4
    )
    assert result.verdict == verdict
    assert ("nothing was measured between 0.000 and that" in result.why) == (verdict == OPEN)


@pytest.mark.parametrize(
    ("fids", "skipped", "count"),
    [([3.0, 2.0, 1.5, 1.05, 1.0], 0, "0"), ([3.0, 2.0, 1.0, 1.05, 1.2], 0, "1"), ([3.0, 2.0, 1.5, 1.05, 1.0], 2, "1")],
)
def test_stability_is_no_skipped_step_and_no_way_back(
    demo: Params, fids: list[float], skipped: int, count: str
) -> None:
    result = found(curve_of(demo, fids, skipped), "stable_training")
    assert (result.ours, result.verdict) == (count, HOLDS if count == "0" else FAILS)


def test_noise_is_no_way_back() -> None:
    points = pd.DataFrame({"fid": [1.0, 1.02], "fid_se": [0.01, 0.01]})
    assert got_worse(points) is False
    assert got_worse(points.assign(fid_se=0.001)) is True
    assert got_worse(points.tail(1)) is None


def test_a_claim_says_what_is_missing() -> None:
    def nothing() -> Found:
        raise Absent("no run of X")

    assert claim("a", "b", "c", "d", nothing) == Claim("a", "b", "c", "missing", "", "d", OPEN, "no run of X", "")


def test_what_claims_read_is_among_their_inputs(demo: Params) -> None:
    """Every student that a claim looks at is one that the item names."""
    shown = {(m.slot, m.size, m.method) for m in ITEMS["claims"].models(demo)}
    for name in ("figure5", "figure7", "table5", "tableE3"):
        assert {(m.slot, m.size, m.method) for m in ITEMS[name].models(demo)} <= shown
    plain_demo = validate(plain())
    assert {m.method for m in ITEMS["claims"].models(plain_demo)} == {"teacher", "scd", "sct"}
