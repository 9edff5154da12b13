# SPDX-License-Identifier: Apache-2.0
"""Which claims claims.csv judges, and how each is measured. `pipeline.claims` has the rule."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from pipeline import measured
from pipeline.ablations import ablations
from pipeline.claims import (
    FIGURE,
    Absent,
    Claim,
    Evidence,
    Found,
    claim,
    difference,
    needed,
    over_guidance,
    sizes_of,
    trainings,
)
from pipeline.costs import training_flops
from pipeline.curves import curve
from pipeline.scaling import compute, papers, ratio, systems
from pipeline.shown import LATENT

GAP = 0.10  # "within 10 %"
SHARE = 0.10  # "less than 10 %" of the sampling compute
TRAINING = 0.20  # "under 20 %" of the teacher's training compute
TWICE, ABOUT = 2.0, 0.2  # "about 2×"; how far off is still about: ours
CONSTANT = 0.10  # largest over smallest ratio of "about constant": ours
RECALL = 0.05  # what sCD may lose of its teacher's recall and still be said not to trade it: ours


def claims(seen: Evidence) -> Iterator[Claim]:
    """All of them, in the paper's order."""
    slot = seen.slot()
    table = papers(seen.root, seen.params)
    scd2 = table[(table.method == "scd") & (table.steps == 2)]
    for size in list(sizes_of(slot, "scd")) or ["any"]:
        yield claim(
            f"two_step_gap_{size}",
            f"2-step FID of sCD-{size} within 10 % of its teacher's, both at their best guidance",
            " ".join(f"{row.ratio:.3f} ({row.size})" for row in scd2.itertuples()),
            f"ratio < {1 + GAP:g}",
            lambda size=size: two_step_gap(seen, size),  # type: ignore[misc]
        )
    yield claim(
        "sampling_compute",
        "2-step sCD takes less than 10 % of the effective sampling compute (parameters × NFE) of the best earlier model; here, of "
        "its teacher",
        papers_share(seen),
        f"ratio < {SHARE:g}",
        lambda: sampling_compute(seen),
    )
    yield claim(
        "stable_training",
        "continuous-time training is stable: no step is skipped for a loss or gradient that is not finite, and FID at the end is not worse "
        "than at an earlier checkpoint by more than two standard errors (sCD, sCT, multistep and sCD + VSD with normalised tangents)",
        FIGURE,
        "number of unstable students = 0",
        lambda: stable_training(seen),
    )
    ratios = f"{scd2.ratio.max() / scd2.ratio.min() - 1:.3f} ({scd2.ratio.min():.3f} to {scd2.ratio.max():.3f})"
    yield claim(
        "constant_ratio",
        "the ratio of sCD's 2-step FID to its teacher's is about constant over sizes",
        ratios,
        f"largest / smallest − 1 < {CONSTANT:g} (ours)",
        lambda: constant_ratio(seen),
    )
    for column, word, sign in (("precision", "above", 1), ("recall", "below", -1)):
        yield claim(
            f"vsd_{column}",
            f"VSD trades recall for precision: its {column} with 1 step is {word} sCD's at equal guidance",
            FIGURE,
            f"difference {'>' if sign > 0 else '<'} 0",
            lambda column=column, sign=sign: vsd_against_scd(seen, column, sign),  # type: ignore[misc]
        )
    yield claim(
        "scd_keeps_recall",
        "sCD does not trade it: its 2-step recall is not below its teacher's at equal guidance",
        FIGURE,
        f"loss < {RECALL:g} (ours)",
        lambda: scd_keeps_recall(seen),
    )
    for column, word, sign in (("precision", "raises precision", 1), ("recall", "lowers recall", -1)):
        yield claim(
            f"guidance_{column}",
            f"guidance {word} of sCD with 2 steps: from the lowest to the highest scale",
            FIGURE,
            f"difference {'>' if sign > 0 else '<'} 0",
            lambda column=column, sign=sign: guidance(seen, column, sign),  # type: ignore[misc]
        )
    yield claim(
        "training_compute",
        "sCD converges in under 20 % of its teacher's training compute",
        "< 0.20",
        f"model FLOPs until the 1-step FID stays within 10 % of its last, over the teacher's < {TRAINING:g}",
        lambda: training_compute(seen),
    )
    yield claim(
        "iteration_cost",
        "an iteration of sCD with guidance costs about twice one of its teacher",
        "about 2",
        f"ratio of model FLOPs within {ABOUT:g} of {TWICE:g} (ours)",
        lambda: iteration_cost(seen),
    )
    yield from ablations(seen)


def two_step_gap(seen: Evidence, size: str) -> Found:
    rows, teacher = seen.rows(LATENT, size, "scd", 2), seen.rows(LATENT, size, "teacher")
    found = ratio(needed(rows, "sCD with 2 steps"), needed(teacher, "its teacher"))
    scales = [measured.joined(part, "guidance", "{:g}") for part in (rows, teacher)]
    why = f"guidance {scales[0]} and {scales[1]}, {rows.samples.iloc[0]} samples, {trainings(rows, teacher)}"
    return Found(found.value, 1 + GAP - found.value, found.error, why, measured.runs(rows, teacher))


def papers_share(seen: Evidence) -> str:
    """2-step sCD-XXL against the earlier system of the lowest FID."""
    table = systems(seen.root)
    best = table[table.method == "other"].nsmallest(1, "fid").iloc[0]
    own = table[(table.method == "scd") & (table.steps == 2)].nsmallest(1, "fid").iloc[0]
    return f"{own.compute / best.compute:.3f} ({own.system} over {best.system})"


def sampling_compute(seen: Evidence) -> Found:
    slot = seen.slot()
    size = list(sizes_of(slot, "scd"))[-1:] or [""]
    student, teacher = seen.rows(LATENT, size[0], "scd", 2), seen.rows(LATENT, size[0], "teacher")
    needed(student, "sCD with 2 steps")
    needed(teacher, "its teacher")
    a, b = (compute(float(part.params.iloc[0]), int(part.nfe.max())) for part in (student, teacher))
    why = f"size {size[0]}: NFE {student.nfe.max()} against {teacher.nfe.max()}; a count. No earlier model is measured here"
    return Found(a / b, SHARE - a / b, None, why, measured.runs(student, teacher))


def stable_training(seen: Evidence) -> Found:
    points = seen.points[seen.points.method != "teacher"]
    unstable, checked, curves, used = [], 0, 0, []
    for (name, size, method), rows in points.groupby(["slot", "size", "method"], sort=False):
        slot = seen.params.active.slots[name]
        student = slot.student_for(size, method)
        continuous = getattr(student, "tangent_engine", None) and getattr(student, "tangent_normalize", "") == "norm"
        if not continuous:
            continue
        checked += int(rows.seed.nunique())
        used.append(rows)
        bad = rows[rows.skipped > 0]
        worse = got_worse(curve(seen.points, slot, name, size, method, student.steps[0]))
        curves += worse is not None
        if len(bad) or worse:
            unstable.append(f"{method}-{size} ({name})")
    if not checked:
        raise Absent("no continuous-time student at this scale")
    why = f"{checked} trainings, {curves} students with earlier checkpoints" + (
        f"; {', '.join(unstable)}" if unstable else ""
    )
    return Found(len(unstable), -float(len(unstable)), None, why, measured.runs(*used), digits=0)


def got_worse(found: pd.DataFrame) -> bool | None:
    """Whether the last FID is above an earlier one by more than two standard errors; None without earlier ones."""
    if len(found) < 2:
        return None
    last, best = found.iloc[-1], found.iloc[:-1].nsmallest(1, "fid").iloc[0]
    return bool(last.fid - best.fid > 2 * (last.fid_se**2 + best.fid_se**2) ** 0.5)


def constant_ratio(seen: Evidence) -> Found:
    sizes = list(sizes_of(seen.slot(), "scd"))
    if len(sizes) < 2:
        raise Absent("sCD at two sizes or more is not trained at this scale")
    found, parts = {}, []
    for size in sizes:
        rows, teacher = seen.rows(LATENT, size, "scd", 2), seen.rows(LATENT, size, "teacher")
        found[size] = ratio(needed(rows, "sCD with 2 steps"), needed(teacher, "its teacher"))
        parts += [rows, teacher]
    top, low = max(found.values()), min(found.values())
    spread = ratio(top, low)
    why = ", ".join(f"{size} {n.value:.3f} ± {n.error:.3f}" for size, n in found.items()) + f"; {trainings(*parts)}"
    return Found(spread.value - 1, CONSTANT - (spread.value - 1), spread.error, why, measured.runs(*parts))


def vsd_against_scd(seen: Evidence, column: str, sign: int) -> Found:
    sizes = list(sizes_of(seen.slot(), "scd", "vsd"))
    if not sizes:
        raise Absent("VSD alone is not trained at this scale")
    a, b = seen.sweep(sizes[-1], "vsd", 1), seen.sweep(sizes[-1], "scd", 1)
    value, error, count = over_guidance(a, b, column, "VSD and sCD")
    why = f"size {sizes[-1]}, mean over {count} scales, {trainings(a, b)}"
    return Found(value, sign * value, error, why, measured.runs(a, b))


def scd_keeps_recall(seen: Evidence) -> Found:
    size = (list(sizes_of(seen.slot(), "scd")) or [""])[-1]
    a, b = seen.sweep(size, "teacher"), seen.sweep(size, "scd", 2)
    value, error, count = over_guidance(a, b, "recall", "the teacher and sCD")
    why = f"size {size}, mean over {count} scales, {trainings(a, b)}"
    most = a[a.guidance.isin(b.guidance)].recall.mean()
    nothing = f"its teacher's recall is {most:.3f}: there is no such loss to be had" if most <= RECALL else ""
    return Found(value, RECALL - value, error, why, measured.runs(a, b), undecided=nothing)


def guidance(seen: Evidence, column: str, sign: int) -> Found:
    size = (list(sizes_of(seen.slot(), "scd")) or [""])[-1]
    rows = seen.sweep(size, "scd", 2)
    if rows.guidance.nunique() < 2:
        raise Absent("no guidance sweep of sCD at this scale")
    low, high = rows.guidance.min(), rows.guidance.max()
    ends = [needed(rows[rows.guidance == s], "sCD with 2 steps", column) for s in (high, low)]
    value, error = difference(*ends)
    why = f"size {size}, from {low:g} to {high:g}, {trainings(rows)}"
    return Found(value, sign * value, error, why, measured.runs(rows))


def training_compute(seen: Evidence) -> Found:
    slot = seen.slot()
    kept = [size for size in sizes_of(slot, "scd") if slot and slot.student_for(size, "scd").snapshots]
    size = (kept or list(sizes_of(slot, "scd")) or [""])[-1]
    if slot is None or not size:
        raise Absent("no run of sCD at this scale")
    found = curve(seen.points, slot, LATENT, size, "scd", 1)
    if found.empty:
        raise Absent("no run of sCD at this scale")
    far = found.index[found.fid > (1 + GAP) * found.fid.iloc[-1]]  # the last one, at the end, is never among them
    near = found.iloc[far[-1] + 1 if len(far) else 0]
    each = training_flops(slot, size, "scd") / slot.student_for(size, "scd").iterations
    costs = found.iterations * each / training_flops(slot, size, "teacher")
    value, least = costs[near.name], costs[far[-1]] if len(far) else 0.0
    shown = ", ".join(f"{row.iterations}: {row.fid:.3f}" for row in found.itertuples())
    why = f"size {size}, reached at iteration {near.iterations} of the measured ones ({shown})"
    if len(found) == 1:
        why = f"size {size}, all its iterations"
    undecided = f"nothing was measured between {least:.3f} and that" if least < TRAINING <= value else ""
    runs = " ".join(dict.fromkeys(" ".join(found.run).split()))
    return Found(value, TRAINING - value, None, why, runs, undecided=undecided)


def iteration_cost(seen: Evidence) -> Found:
    slot = seen.slot()
    for size in list(sizes_of(slot, "scd"))[-1:]:
        assert slot is not None
        if slot.student_for(size, "scd").guidance is None:
            break
        each = {
            name: training_flops(slot, size, name) / training.iterations / training.batch
            for name, training in (("scd", slot.student_for(size, "scd")), ("teacher", slot.teacher_for(size)))
        }
        value = each["scd"] / each["teacher"]
        why = (
            "counted, per image; a backward pass as two, a tangent as one; times are in benchmarks/results/step_cost.md"
        )
        return Found(value, ABOUT - abs(value - TWICE), None, why)
    raise Absent("no guided sCD at this scale")
