# SPDX-License-Identifier: Apache-2.0
"""The students' methods by name. A method is one file in this folder and one entry here."""

from collections.abc import Callable

from scm_core.objectives import Method
from scm_core.objectives.consistency import scd, sct
from scm_core.objectives.discrete import dscd, dsct
from scm_core.objectives.ect import ect
from scm_core.objectives.multistep import multistep
from scm_core.objectives.vsd import scd_vsd, vsd

# (student, teacher, sigma_data, shape of a sample, **options) -> Method
METHODS: dict[str, Callable[..., Method]] = {
    "sct": sct,
    "scd": scd,
    "dsct": dsct,
    "dscd": dscd,
    "multistep": multistep,
    "vsd": vsd,
    "scd_vsd": scd_vsd,
    "ect": ect,
}
