# SPDX-License-Identifier: Apache-2.0
"""Tables 3 and 4: the training settings that the scale uses, in the paper's rows, beside the paper's columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.params import InverseSqrtDecay, Slot, StudentTraining
from pipeline.shown import table5_students, table6_students
from pipeline.tables import format_iterations, published
from pipeline.writing import MISSING

Read = Callable[[Slot, str], list[Any]]
CONTINUOUS = ("scd", "sct", "multistep", "dscd", "scd_vsd")
DISTILLED = ("scd", "multistep", "dscd")
VSD = ("scd_vsd", "vsd")


def _teacher(key: str) -> Read:
    return lambda slot, size: [getattr(slot.teacher_for(size), key)]


def _network(key: str) -> Read:
    return lambda slot, size: [getattr(slot.sizes[size].network, key, MISSING)]


def _chosen(slot: Slot, size: str, *methods: str) -> list[StudentTraining]:
    """A size's students of those methods (of all, if none is named); not those of ablations."""
    students = slot.sizes[size].students
    named = dict.fromkeys((*table5_students(slot, size), *table6_students(slot, size)))
    return [students[name] for name in named if not methods or students[name].method in methods]


def _students(key: str, *methods: str) -> Read:
    """The values of a key over these students, each once."""

    def read(slot: Slot, size: str) -> list[Any]:
        chosen = _chosen(slot, size, *methods)
        return list(dict.fromkeys(getattr(student, key) for student in chosen if hasattr(student, key)))

    return read


def _all(key: str) -> Read:
    read = _students(key)
    return lambda slot, size: list(dict.fromkeys([getattr(slot.teacher_for(size), key), *read(slot, size)]))


def _fake_lr(slot: Slot, size: str) -> list[Any]:
    """F_φ's own, or the student's."""
    return list(dict.fromkeys(getattr(student, "fake_lr", None) or student.lr for student in _chosen(slot, size, *VSD)))


def _betas(index: int) -> Read:
    read = _all("betas")
    return lambda slot, size: list(dict.fromkeys(betas[index] for betas in read(slot, size)))


def _cfg(slot: Slot, size: str) -> list[Any]:
    scales = [range_[1] for range_ in _students("guidance", *DISTILLED, *VSD)(slot, size) if range_]
    return list(dict.fromkeys(scales))


def _decay(slot: Slot, size: str) -> list[Any]:
    decays = _all("decay")(slot, size)
    return [d.t_ref if isinstance(d, InverseSqrtDecay) else f"linear, {d.start:g} to {d.final:g}" for d in decays]


# The key of params.yaml behind each row; test_paper.py compares scale paper's with the tables.
SETTINGS: dict[tuple[str, str], Read] = {
    ("model", "batch_size"): _all("batch"),
    ("model", "channel_multiplier"): _network("width"),
    ("model", "time_embedding"): _network("embedding"),
    ("model", "c_noise(t)"): _network("c_noise"),
    ("model", "adaptive_double_normalization"): lambda slot, size: [
        "yes" if norm == "double" else norm for norm in _network("norm")(slot, size)
    ],
    ("model", "lr_decay_t_ref"): _decay,
    ("model", "adam_beta1"): _betas(0),
    ("model", "adam_beta2"): _betas(1),
    ("model", "adam_eps"): _all("eps"),
    ("model", "params_millions"): lambda slot, size: [slot.sizes[size].network.weights(slot.items) / 1e6],
    ("diffusion", "iterations"): _teacher("iterations"),
    ("diffusion", "lr_max_alpha_ref"): _teacher("lr"),
    ("diffusion", "dropout"): _teacher("dropout"),
    ("diffusion", "P_mean"): _teacher("P_mean"),
    ("diffusion", "P_std"): _teacher("P_std"),
    ("consistency", "lr_max_alpha_ref"): _students("lr"),
    ("consistency", "P_mean"): _students("P_mean", *CONTINUOUS),
    ("consistency", "P_std"): _students("P_std", *CONTINUOUS),
    ("consistency", "tangent_normalization_c"): _students("tangent_c", *CONTINUOUS),
    ("consistency", "tangent_warmup_iterations"): _students("tangent_warmup", *CONTINUOUS),
    ("consistency", "teacher_ema_sigma_rel"): _teacher("ema_sigma_rel"),
    ("sCT", "iterations"): _students("iterations", "sct"),
    ("sCT", "dropout_at_resolution_le_16"): _students("dropout", "sct"),
    ("sCD", "iterations"): _students("iterations", *DISTILLED),
    ("sCD", "dropout_at_resolution_le_16"): _students("dropout", *DISTILLED),
    ("sCD", "cfg_scale_max"): _cfg,
    ("sCD+VSD", "iterations"): _students("iterations", *VSD),
    ("sCD+VSD", "lr_max_alpha_ref_F_phi"): _fake_lr,
    ("sCD+VSD", "dropout_F_phi"): _students("dropout", *VSD),  # a companion has the student's
    ("sCD+VSD", "P_mean_L_Diff"): _students("fake_P_mean", *VSD),
    ("sCD+VSD", "P_std_L_Diff"): _students("fake_P_std", *VSD),
    ("sCD+VSD", "P_mean_L_VSD"): _students("vsd_P_mean", *VSD),
    ("sCD+VSD", "P_std_L_VSD"): _students("vsd_P_std", *VSD),
    ("sCD+VSD", "lambda_VSD"): _students("vsd_weight", "scd_vsd"),
}
FIXED = {
    ("sCD+VSD", "phi_updates_per_theta_update"): "1",  # a companion makes its step before each of the student's
    ("sCD+VSD", "one_step_t_max"): "arctan(80/sigma_data)",  # scm_core.trigflow.t_max
}


def cell(slot: Slot, size: str, setting: tuple[str, str]) -> str:
    """What a size is trained with, as the paper would print it; several values where its students differ."""
    if setting in FIXED:
        trained = {student.method for student in slot.sizes[size].students.values()}
        return FIXED[setting] if trained & set(VSD) else MISSING
    return " / ".join(_text(setting[1], value) for value in SETTINGS[setting](slot, size)) or MISSING


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if "dropout" in name:
        return f"{100 * value:g}%"
    if "iterations" in name:
        return format_iterations(value)
    if name.startswith("lr_max") or name == "adam_eps":
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa if name != 'adam_eps' else mantissa.removesuffix('.0')}e{int(exponent)}"
    if name == "params_millions":
        return f"{value:.1f}" if value >= 10 else f"{value:.3f}"
    return str(value)


def settings_table(root: Path, name: str, slot: Slot, scale: str) -> pd.DataFrame:
    """The published columns, then one for each of our sizes."""
    table = published(root, name)
    for size in slot.sizes:
        table[f"ours {size} ({scale})"] = [
            cell(slot, size, (row["group"], row["setting"])) for row in table.to_dict("records")
        ]
    return table


def settings_note(slot: Slot, scale: str) -> str:
    """What our columns are."""
    side = slot.dataset.resolution
    return (
        f"Columns *ours* are what scale {scale} trains with on {slot.dataset.source} ({side} × {side}), from params.yaml: teachers, sCT, "
        "sCD, multistep sCD, VSD; where students differ, all values. Parameters are counted with double normalisation, which the paper's "
        f"count leaves out. *{MISSING}*: nothing of the kind is trained at that size."
    )
