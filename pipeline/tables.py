# SPDX-License-Identifier: Apache-2.0
"""Tables 1, 2, 6 and E3: the paper's rows unchanged, ours beside them with what they were measured on. All cells are text, as published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from pipeline import measured
from pipeline.overrides import base_of
from pipeline.params import Params, Scale, Slot
from pipeline.paths import FLOOR
from pipeline.shown import COND, UNCOND
from pipeline.writing import MISSING, text_table

TABLE1_COLUMNS = [
    "dataset", "section", "method", "citation", "nfe", "fid", "fid_se", "size", "params", "guidance", "features", "samples", "seeds", "run"
]  # fmt: skip
TABLE2_COLUMNS = [
    "section", "method", "size", "nfe", "fid", "fid_se", "params", "guidance", "dataset", "features", "samples", "run",
    "seeds", "citation",
]  # fmt: skip
TABLE_E3_COLUMNS = [
    "section", "method", "iterations", "fid", "fid_se", "size", "batch", "dataset", "features", "samples", "seeds", "run"
]  # fmt: skip
FEATURES = {
    "classifier": "the features of a small classifier, not in Inception's",
    "inception": "Inception's features",
    "dinov2": "DINOv2's features",
}
PUBLISHED = {"pixel_uncond": ("cifar10", 32), "pixel_cond": ("imagenet", 64), "latent_guided": ("imagenet", 512)}
METHOD_NAMES = {
    "teacher": "teacher",
    "sct": "sCT",
    "scd": "sCD",
    "vsd": "VSD",
    "scd_vsd": "sCD + VSD",
}
SECTIONS = {
    "teacher": "Teacher diffusion model (TrigFlow)",
    "sct": "Consistency training (sCT)",
    "scd": "Consistency distillation (sCD)",
}
INCEPTION = {"features": "Inception v3", "samples": "50000"}
PAPER_SETTING = {"dataset": "ImageNet 512x512", **INCEPTION}


def published(root: Path, name: str) -> pd.DataFrame:
    """The rows of a table as published, all text."""
    return pd.read_csv(root / "reports" / "paper" / f"{name}.csv", dtype=str, keep_default_na=False)


def format_count(parameters: int) -> str:
    """A number of parameters as the paper prints it: 0.49M, 280M, 1.5B."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters / 1e6:.2f}M"


def cells(rows: pd.DataFrame) -> dict[str, str]:
    """The cells of a model at one point that every table has: FID, its error, what it was measured on, the runs behind it."""
    found = measured.number(rows)
    assert found is not None
    value, error = found.text()
    first = rows.iloc[0]
    return {
        "fid": value,
        "fid_se": error,
        "params": format_count(first.params),
        "guidance": measured.joined(rows, "guidance", "{:.2f}"),
        "dataset": first.dataset,
        "features": first.features,
        "samples": str(first.samples),
        "seeds": str(found.seeds),
        "run": measured.runs(rows),
    }


def our_rows(points: pd.DataFrame, slots: Iterable[str], scale: Scale, name: str, methods: Sequence[str]) -> list[dict]:
    """Rows of Tables 1 and 2: each number of steps at its best guidance, the teacher also without guidance; what was not run is missing."""
    rows = []
    for method in methods:
        for slot_name in slots:
            slot = scale.slots.get(slot_name)
            section = f"Ours, scale {name}: {SECTIONS[method]}"
            if slot is None:
                absent = {"section": section, "method": METHOD_NAMES[method], "fid": MISSING}
                rows.append({**absent, "dataset": f"{slot_name}: not in this scale"})
                continue
            for size in slot.sizes:
                label = {"section": section, "method": f"{METHOD_NAMES[method]}-{size}", "size": size}
                found = measured.of_model(points, slot_name, size, method)
                if found.empty:
                    passes = (slot.evaluation.teacher.nfe,) if method == "teacher" else (1, 2)
                    rows += [{**label, "nfe": str(nfe), "fid": MISSING} for nfe in passes]
                    continue
                rows += [{**label, **row} for row in _steps(found, method)]
    return rows


def _steps(points: pd.DataFrame, method: str) -> list[dict[str, str]]:
    """A row for each number of steps of one model."""
    rows = []
    for steps in dict.fromkeys(points.steps):
        shown = [measured.reported(points, steps)]
        plain = measured.reported(points, steps, best=False)
        if method == "teacher" and not plain.index.equals(shown[0].index):
            shown.insert(0, plain)
        for group in shown:
            guided = method == "teacher" and bool((group.guidance.fillna(1.0) != 1.0).any())
            nfe = max(group.nfe)
            rows.append({"nfe": f"{nfe // 2}x2" if guided else str(nfe), **cells(group)})
    return rows


def table1(root: Path, ours: list[dict]) -> pd.DataFrame:
    """The 69 published rows, then ours."""
    rows = [{**row, **INCEPTION} for row in published(root, "table1").to_dict("records")]
    return text_table(rows + ours, TABLE1_COLUMNS)


def table2(root: Path, ours: list[dict]) -> pd.DataFrame:
    """The 53 published rows, then ours."""
    rows = []
    for row in published(root, "table2").to_dict("records"):
        size = re.fullmatch(r"(?:EDM2|sCT|sCD)-(\w+)", row["method"])
        rows.append({**row, "size": size[1] if size else "", **PAPER_SETTING})
    return text_table(rows + ours, TABLE2_COLUMNS)


def table6(root: Path, points: pd.DataFrame, slot: Slot | None, slot_name: str, scale: str) -> pd.DataFrame:
    """VSD, sCD and both at the sizes that train VSD alone: the published rows of size M, then ours."""
    paper = published(root, "table6")
    rows = [{"section": "Published (size M)", "size": "M", **row, **PAPER_SETTING} for row in paper.to_dict("records")]
    sizes = [size for size in slot.sizes if "vsd" in slot.sizes[size].students] if slot else []
    for size in sizes or [MISSING]:
        for method in ("vsd", "scd", "scd_vsd"):
            row = {"section": f"Ours, scale {scale}", "method": METHOD_NAMES[method], "size": size}
            rows.append({**row, **_table6_cells(points, slot, slot_name, size, method)})
    errors = [f"{column}_se" for column in paper.columns if column.startswith(("fid", "fd"))]
    columns = ["section", *paper.columns, *errors, "size", "dataset", "features", "samples", "seeds", "run"]
    return text_table(rows, columns)


def _table6_cells(points: pd.DataFrame, slot: Slot | None, slot_name: str, size: str, method: str) -> dict[str, str]:
    found = measured.of_model(points, slot_name, size, method)
    if slot is None or found.empty:
        return {f"{distance}_{steps}step": MISSING for distance in ("fid", "fd_dinov2") for steps in (1, 2)}
    width = slot.student_for(size, method).ema_sigma_rel
    row: dict[str, str] = {"ema_sigma_rel": "" if width is None else f"{width:g}"}
    for steps in slot.student_for(size, method).steps:
        for distance in ("fid", "fd_dinov2"):
            rows = measured.reported(measured.of_model(points, slot_name, size, method, distance != "fid"), steps)
            value = measured.number(rows)
            row[f"{distance}_{steps}step"], row[f"{distance}_{steps}step_se"] = value.text() if value else (MISSING, "")
            row[f"guidance_for_{distance}_{steps}step"] = measured.joined(rows, "guidance", "{:.2f}")
    kept = ("dataset", "features", "samples", "seeds", "run")
    return row | {key: cell for key, cell in cells(measured.reported(found)).items() if key in kept}


def table_e3(root: Path, points: pd.DataFrame, slot: Slot | None, scale: str) -> pd.DataFrame:
    """ECT against sCT for three lengths of training: the published rows, then ours with 1 step."""
    where = {"dataset": "CIFAR-10", **INCEPTION}
    rows = [{"section": "Published", **row, **where} for row in published(root, "tableE3").to_dict("records")]
    ours = f"Ours, scale {scale}"
    names = [(size, name) for size in slot.sizes for name in slot.sizes[size].students] if slot else []
    for family, method in {"ect": "ECT", "sct": METHOD_NAMES["sct"]}.items():
        found = [(size, name) for size, name in names if name.startswith(f"{family}_") and base_of(name) == name]
        if slot is None or not found:
            rows += [{"section": ours, "method": method, "fid": MISSING}]
            continue
        for size, name in sorted(found, key=lambda pair: slot.student_for(*pair).iterations):
            own, training = measured.of_model(points, UNCOND, size, name), slot.student_for(size, name)
            row = {"section": ours, "method": method, "size": size}
            row |= {"iterations": format_iterations(training.iterations), "batch": str(training.batch)}
            measured_rows = measured.reported(own, 1)
            rows.append({**row, **(cells(measured_rows) if len(measured_rows) else {"fid": MISSING})})
    return text_table(rows, TABLE_E3_COLUMNS)


def format_iterations(count: int) -> str:
    """As the paper prints them: 400k; fewer than ten thousand as they are."""
    return f"{count // 1000}k" if count >= 10_000 and count % 1000 == 0 else str(count)


def measured_note(params: Params, slots: Iterable[str]) -> str:
    """What our rows compare with: the published ones only where they were measured in Inception's features, on the paper's data."""
    words = []
    for name in slots:
        slot = params.active.slots[name]
        space, where = slot.evaluation.spaces[0], (slot.dataset.source, slot.dataset.resolution)
        words.append(
            f"Rows headed *Ours* of {_kind(name)} were measured on {where[0]} ({where[1]} × {where[1]}) in {FEATURES[space]}"
            + (
                ", as the published ones."
                if where == PUBLISHED[name] and space == "inception"
                else ": they compare with each other, not with the published rows."
            )
        )
    return " ".join(words)


def _kind(slot: str) -> str:
    kinds = {UNCOND: "unconditional pixels", COND: "class-conditional pixels"}
    return kinds.get(slot, "latents")


def how_note(slot: Slot) -> str:
    """How our numbers of a slot came about."""
    how = slot.evaluation
    sets = f", the mean of {how.report_sets} sets" if how.report_sets > 1 else ""
    grid = ", ".join(f"{scale:g}" for scale in how.guidance)
    chosen = f"; guidance chosen on {how.select_samples} other samples from {grid}" if len(how.guidance) > 1 else ""
    return (
        f"FID ± standard error of {how.samples} samples against the training images{sets}{chosen}. The error is that of independent "
        "samples, an upper estimate for ours, which have equally many of each class; of repeated trainings (seeds) their mean stands, "
        "with the error of the mean from their spread where that is larger. "
        f"Teacher: {how.teacher.solver}, {how.teacher.steps} steps. NFE n x2: two passes for each guided evaluation. "
        f"*{MISSING}*: not run at this scale."
    )


def floor_note(folder: Path) -> str:
    """What the autoencoder costs, as a sentence, from the output of stage reconstruction."""
    facts = json.loads((folder / FLOOR).read_text())
    found = facts["reported"]
    return (
        f"Reconstruction floor: FID {found['fid']:.3f} ± {found['fid_se']:.3f} of {facts['samples']} images that were encoded, drawn from "
        f"their latent Gaussians and decoded: what would remain of a perfect model of the latents (run {facts['run']})."
        if "fid" in found
        else "Reconstruction floor: FID was not measured."
    )
