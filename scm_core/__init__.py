# SPDX-License-Identifier: Apache-2.0
"""sCM, continuous-time consistency models (Lu & Song 2024), as a library: TrigFlow, the tangent, objectives, samplers.

Read in this order: `trigflow`, `tangent`, `objectives.consistency`, `train.step`.
"""

__version__ = "0.1.0"
