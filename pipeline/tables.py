# SPDX-License-Identifier: Apache-2.0
"""Tables as CSV and Markdown: the paper's rows unchanged, ours beside them with what they were measured on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from pipeline.files import read_json
from pipeline.params import Slot
from pipeline.paths import FACTS, FLOOR, MANIFEST, SWEEP
from pipeline.sweep import REPORT, mean_of

TABLE2_COLUMNS = [
    "section",
    "method",
    "size",
    "nfe",
    "fid",
    "fid_se",
    "params",
    "guidance",
    "dataset",
    "features",
    "samples",
    "run",
]
FEATURES = {
    "classifier": "the features of a small classifier, not in Inception's",
    "inception": "Inception's features",
    "dinov2": "DINOv2's features",
}
PUBLISHED = ("imagenet", 512, "inception")  # what Table 2 was measured on
METHOD_NAMES = {"teacher": "teacher", "sct": "sCT", "scd": "sCD"}
SECTIONS = {
    "teacher": "Teacher diffusion model (TrigFlow)",
    "sct": "Consistency training (sCT)",
    "scd": "Consistency distillation (sCD)",
}
PAPER_SETTING = {"dataset": "ImageNet 512x512", "features": "Inception v3", "samples": "50000"}


def format_count(parameters: int) -> str:
    """A number of parameters as the paper prints it: 0.49M, 280M, 1.5B."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters / 1e6:.2f}M"


def read_evaluation(folder: Path) -> tuple[pd.DataFrame, dict]:
    """The points of an evaluation of the published average in the space of FID, and the facts about it."""
    sweep = pd.read_csv(folder / SWEEP)
    return sweep[(sweep.space != "dinov2") & sweep.ema.isna() & sweep.nimg.isna()], json.loads(
        (folder / FACTS).read_text()
    )


def measured_points(folder: Path, scale: str, name: str) -> pd.DataFrame:
    """Every row of one evaluation, digits as they are, with the model and what it was measured with in front.

    `name` is evaluate-<slot>-<size>-<method>. `model_sha256` and `reference_sha256` are the digests of their manifests, which hold those
    of every file; `key` in the row names the samples.
    """
    _, slot, size, method = name.split("-")
    facts, made = json.loads((folder / FACTS).read_text()), read_json(folder / MANIFEST) or {}
    inputs = made.get("inputs", {})
    model, reference = inputs.get("teacher" if method == "teacher" else "student", {}), inputs.get("reference", {})
    own = {
        "scale": scale,
        "slot": slot,
        "size": size,
        "method": method,
        "run": facts["run"],
        "model": facts["model_run"],
        "model_sha256": model.get("digest"),
        "dataset": facts["dataset"],
        "reference": reference.get("run"),
        "reference_sha256": reference.get("digest"),
        "reference_images": facts["reference_images"],
    }
    # As text: a key of decimal digits must not become a number, nor a number lose its last digit.
    rows = pd.read_csv(folder / SWEEP, dtype=str, keep_default_na=False).to_dict("records")
    return pd.DataFrame([{**own, "features": facts["features"][row["space"]], **row} for row in rows])


def best_guidance(folder: Path, steps: int) -> float | None:
    """The scale that an evaluation selected for its sampler of `steps` steps; None for an unguided model."""
    points, _ = read_evaluation(folder)
    (scale,) = points[(points.steps == steps) & (points.phase == REPORT) & points.best].guidance.unique()
    return None if pd.isna(scale) else float(scale)


def our_rows(folder: Path, size: str, method: str, scale: str) -> list[dict[str, str]]:
    """Rows of one evaluated model: each number of steps at its best guidance, the teacher also without guidance; means over the sets."""
    points, facts = read_evaluation(folder)
    points = points[(points.phase == REPORT) & (points.best | (method == "teacher"))]
    rows = []
    for (_, guidance), group in points.groupby(["steps", "guidance"], dropna=False):
        first = group.iloc[0]
        fid, error = mean_of(group.to_dict("records"))
        guided_teacher = method == "teacher" and not pd.isna(guidance) and guidance != 1.0
        rows.append(
            {
                "section": f"Ours, scale {scale}: {SECTIONS[method]}",
                "method": f"{METHOD_NAMES[method]}-{size}",
                "size": size,
                "nfe": f"{first.nfe // 2}x2" if guided_teacher else str(first.nfe),
                "fid": f"{fid:.3f}",
                "fid_se": f"{error:.3f}",
                "params": format_count(facts["params"]),
                "guidance": "" if pd.isna(guidance) else f"{guidance:.2f}",
                "dataset": facts["dataset"],
                "features": facts["features"][first.space],
                "samples": str(first.samples),
                "run": facts["run"],
            }
        )
    return rows


def table2(paper: Path, ours: list[dict[str, str]]) -> pd.DataFrame:
    """Table 2: the 53 published rows, then ours; all cells are text, as published."""
    published = pd.read_csv(paper, dtype=str, keep_default_na=False)
    rows = []
    for row in published.to_dict("records"):
        size = re.fullmatch(r"(?:EDM2|sCT|sCD)-(\w+)", row["method"])
        kept = {key: row[key] for key in ("section", "method", "nfe", "fid", "params")}
        rows.append({**kept, "size": size[1] if size else "", **PAPER_SETTING})
    return pd.DataFrame(rows + ours, columns=TABLE2_COLUMNS).fillna("")


def measured_note(slot: Slot) -> str:
    """What our rows compare with: the published ones only where they were measured in Inception's features, on the paper's data."""
    measured = (slot.dataset.source, slot.dataset.resolution, slot.evaluation.spaces[0])
    source, side, space = measured
    where = f"Rows headed *Ours* were measured on {source} ({side} × {side}) in {FEATURES[space]}"
    if measured == PUBLISHED:
        return f"{where}, as the published ones."
    return f"{where}: they compare with each other, not with the published rows."


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


def to_markdown(table: pd.DataFrame, title: str, notes: list[str]) -> str:
    """A table as Markdown, a heading for each section."""
    columns = [column for column in table.columns if column != "section"]
    lines = [f"# {title}", "", *notes, ""]
    for section, group in table.groupby("section", sort=False):
        lines += [f"## {section}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in group.to_dict("records")]
        lines.append("")
    return "\n".join(lines)
