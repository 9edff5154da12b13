# SPDX-License-Identifier: Apache-2.0
"""The students' methods by name. A method is one file in this folder and one entry here."""

from collections.abc import Callable

from scm_core.objectives import Method
from scm_core.objectives.consistency import scd, sct

# (student, teacher, sigma_data, shape of a sample, **options) -> Method
METHODS: dict[str, Callable[..., Method]] = {"sct": sct, "scd": scd}
