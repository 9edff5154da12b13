# SPDX-License-Identifier: Apache-2.0
"""Networks of other projects as teachers here, and networks of this project for others."""

from scm_core.interop.edm import read_edm
from scm_core.interop.edm2 import read_edm2
from scm_core.interop.pickles import read_pickle
from scm_core.interop.rebuild import RefusedError
from scm_core.interop.stored import Teacher

__all__ = ["RefusedError", "Teacher", "read_edm", "read_edm2", "read_pickle"]
