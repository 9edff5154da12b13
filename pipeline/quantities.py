# SPDX-License-Identifier: Apache-2.0
"""Tables 5 and 7, which list quantities: sampler, quantity, size, value. Ours have the published names, with errors and runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline import measured
from pipeline.overrides import base_of
from pipeline.params import Scale, Slot
from pipeline.shown import LATENT, multistep
from pipeline.tables import INCEPTION, published
from pipeline.writing import MISSING, text_table

COLUMNS = [
    "section",
    "sampler",
    "quantity",
    "size",
    "value",
    "value_se",
    "seeds",
    "dataset",
    "features",
    "samples",
    "run",
]
PAPERS = {"table5": "ImageNet 512x512", "table7": "ImageNet 64x64"}
DISTANCES = {"fid": False, "fd_dinov2": True}  # whether it is measured in DINOv2's features
Row = dict[str, str]


def quantities(
    root: Path, name: str, slot_name: str, points: pd.DataFrame, scale: Scale, scale_name: str
) -> pd.DataFrame:
    """The published rows of Table 5 or 7, then ours."""
    # Distances in two feature spaces stand in one table: which one it is, the quantity says.
    where = {"section": "Published", "dataset": PAPERS[name], "samples": INCEPTION["samples"]}
    rows = [{**where, **row} for row in published(root, name).to_dict("records")]
    slot = scale.slots.get(slot_name)
    section = f"Ours, scale {scale_name}"
    if slot is None:
        rows.append({"section": section, "sampler": f"{slot_name}: not in this scale", "value": MISSING})
        return text_table(rows, COLUMNS)
    for size in slot.sizes:
        rows += [{"section": section, "size": size, **row} for row in _of_size(slot, slot_name, size, points)]
    return text_table(rows, COLUMNS)


def _of_size(slot: Slot, name: str, size: str, points: pd.DataFrame) -> Iterator[Row]:
    how, students = slot.evaluation, slot.sizes[size].students
    guided = len(how.guidance) > 1
    sampler = f"diffusion (NFE {how.teacher.nfe * (1 + guided)})"
    width = slot.teacher_for(size).ema_sigma_rel
    yield {"sampler": sampler, "quantity": "ema_sigma_rel", "value": "" if width is None else f"{width:g}"}
    yield from _distances(points, name, size, "teacher", sampler, how.teacher.steps, "", "_trigflow", guided)
    for method, sampler in {"sct": "sCT", "scd": "sCD"}.items():
        yield {"sampler": sampler, "quantity": "t_mid", "value": f"{how.t_mid:g}"}
        for steps in (1, 2):
            with_scale = guided and method == "scd"
            yield from _distances(
                points, name, size, method, sampler, steps, f"_{steps}step", f"_{steps}step", with_scale
            )
    if name != LATENT:
        return
    for method in multistep(slot, size):
        (steps,) = students[method].steps
        yield from _distances(points, name, size, method, "multistep sCD", steps, f"_M{steps}", f"_M{steps}", guided)
    if not multistep(slot, size):
        yield {"sampler": "multistep sCD", "quantity": "fid", "value": MISSING}
    yield {"sampler": "sCD + adaptive VSD", "quantity": "t_mid", "value": f"{how.t_mid:g}"}
    for steps in (1, 2):
        ending = f"_{steps}step"
        yield from _distances(points, name, size, "scd_vsd", "sCD + adaptive VSD", steps, ending, ending, guided)


def _distances(
    points: pd.DataFrame,
    slot: str,
    size: str,
    method: str,
    sampler: str,
    steps: int,
    at: str,
    ending: str,
    guided: bool,
) -> Iterator[Row]:
    """The selected scale and the distance in each space; FD-DINOv2 only in the table that has it."""
    assert base_of(method) == method
    for distance, dinov2 in DISTANCES.items():
        if dinov2 and slot != LATENT:
            continue
        rows = measured.reported(measured.of_model(points, slot, size, method, dinov2), steps)
        found = measured.number(rows)
        quantity = f"{distance}{ending}"
        if found is None:
            yield {"sampler": sampler, "quantity": quantity, "value": MISSING}
            continue
        first, (value, error) = rows.iloc[0], found.text()
        said = {"dataset": first.dataset, "features": first.features, "samples": str(first.samples)}
        said |= {"sampler": sampler, "seeds": str(found.seeds), "run": measured.runs(rows)}
        if guided:
            scale = measured.joined(rows, "guidance", "{:g}")
            yield {**said, "quantity": f"guidance_for_{distance}{at}", "value": scale}
        yield {**said, "quantity": quantity, "value": value, "value_se": error}


def by_size(table: pd.DataFrame) -> pd.DataFrame:
    """The same for reading: a row for each sampler and quantity, a column for each size, errors behind the values."""
    rows: dict[tuple[str, str, str], Row] = {}
    sizes = {size: "" for size in table["size"] if size}
    for row in table.to_dict("records"):
        key = (row["section"], row["sampler"], row["quantity"])
        error = f" ± {row['value_se']}" if row["value_se"] else ""
        line = rows.setdefault(key, {"section": key[0], "sampler": key[1], "quantity": key[2]})
        line[row["size"] or next(iter(sizes))] = f"{row['value']}{error}"
    return text_table(rows.values(), ["section", "sampler", "quantity", *sizes])
