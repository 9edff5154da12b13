# SPDX-License-Identifier: Apache-2.0
"""Figures 1 and 6: the cost of sampling beside FID, of the paper's systems and of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from pipeline import measured
from pipeline.measured import Number
from pipeline.params import Params, Slot
from pipeline.shown import LATENT
from pipeline.tables import published

FAMILIES = {"EDM2": "teacher", "sCT": "sct", "sCD": "scd"}
COLUMNS = ["source", "size", "gflops", "fid", "fid_se", "method", "steps", "ratio", "ratio_se", "seeds", "run"]
UNITS = {"M": 1e-3, "B": 1.0}  # to billions


def evaluations(nfe: str) -> int:
    """Forward passes of one sample: 250x2 is two for each of 250."""
    count, _, twice = nfe.partition("x")
    return int(count) * int(twice or 1)


def billions(params: str) -> float:
    """A number of parameters as the paper prints it, in billions."""
    return float(params[:-1]) * UNITS[params[-1]]


def compute(params: float, nfe: int) -> float:
    """Effective sampling compute (Figure 1): parameters in billions × forward passes."""
    return params * nfe


def systems(root: Path) -> pd.DataFrame:
    """Every system of the paper's Table 2 with its effective sampling compute."""
    rows = []
    for row in published(root, "table2").to_dict("records"):
        family = row["method"].partition("-")[0]
        own = "Lu & Song" in row["citation"]
        passes, parameters = evaluations(row["nfe"]), billions(row["params"])
        rows.append(
            {
                "section": row["section"],
                "method": FAMILIES[family] if own else "other",
                "system": row["method"],
                "steps": passes if own and family != "EDM2" else 0,
                "nfe": passes,
                "params_billions": parameters,
                "compute": compute(parameters, passes),
                "fid": float(row["fid"]),
                "fid_se": 0.0,
            }
        )
    return pd.DataFrame(rows)


def ratio(a: Number, b: Number) -> Number:
    """a / b with its standard error to first order, as of independent numbers."""
    value = a.value / b.value
    error = value * ((a.error / a.value) ** 2 + (b.error / b.value) ** 2) ** 0.5
    return Number(value, error, None, min(a.seeds, b.seeds))


def papers(root: Path, params: Params) -> pd.DataFrame:
    """The paper's teachers and students of each size, at the FLOPs that its networks have in scale paper."""
    slot = params.scales["paper"].slots[LATENT]
    table = systems(root)
    table = table[table.method != "other"]
    rows = []
    for row in table.to_dict("records"):
        size = re.fullmatch(r"\w+-(\w+)", row["system"])
        assert size is not None
        (teacher,) = table[(table.method == "teacher") & table.system.str.endswith(f"-{size[1]}")].fid
        cost = slot.sizes[size[1]].network.flops(slot.items) / 1e9
        own = {"source": "paper", "size": size[1], "gflops": cost, "fid": row["fid"], "fid_se": 0.0}
        rows.append(
            {**own, "method": row["method"], "steps": row["steps"], "ratio": row["fid"] / teacher, "ratio_se": 0.0}
        )
    return pd.DataFrame(rows)


def ours(points: pd.DataFrame, slot: Slot, name: str) -> pd.DataFrame:
    """Ours, each at its best guidance: the ratio is to the teacher of the same size."""
    rows = []
    for method in ("teacher", "sct", "scd"):
        for steps in (0,) if method == "teacher" else (1, 2):
            for size in slot.sizes:
                best = measured.reported(measured.of_model(points, name, size, method), steps or None)
                known = measured.reported(measured.of_model(points, name, size, "teacher"))
                found, teacher = measured.number(best), measured.number(known)
                if found is None or teacher is None:
                    continue
                relative = ratio(found, teacher) if method != "teacher" else Number(1.0, 0.0, None, teacher.seeds)
                cost = slot.sizes[size].network.flops(slot.items) / 1e9
                own = {"source": "ours", "size": size, "gflops": cost, "fid": found.value, "fid_se": found.error}
                own |= {"method": method, "steps": steps, "ratio": relative.value, "ratio_se": relative.error}
                rows.append({**own, "seeds": found.seeds, "run": measured.runs(best)})
    return pd.DataFrame(rows, columns=COLUMNS)


def our_systems(points: pd.DataFrame, slot: Slot, name: str, methods: dict[str, list[str]]) -> pd.DataFrame:
    """Ours with their effective sampling compute: the teacher, then the students of each size (`methods`) at their numbers of steps."""
    rows = []
    for size in slot.sizes:
        for method in ("teacher", *methods[size]):
            of_model = measured.of_model(points, name, size, method)
            for steps in dict.fromkeys(of_model.steps):
                best = measured.reported(of_model, steps)
                found = measured.number(best)
                if found is None:
                    continue
                parameters, passes = float(best.params.iloc[0]) / 1e9, int(best.nfe.max())
                own = {"section": "ours", "method": method, "size": size, "steps": steps, "nfe": passes}
                own |= {"params_billions": parameters, "compute": compute(parameters, passes)}
                rows.append({**own, "fid": found.value, "fid_se": found.error, "run": measured.runs(best)})
    return pd.DataFrame(rows)
