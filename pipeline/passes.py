# SPDX-License-Identifier: Apache-2.0
"""How many passes through networks a training step of each method costs: what model FLOPs are counted with."""

from typing import NamedTuple


class Passes(NamedTuple):
    """Forward passes of the network that one item of a training step costs; a backward pass counts as two."""

    trained: int
    """Through networks that are trained, with a tangent counted as another; gradient checkpointing does them twice."""
    backward: int
    frozen: int
    """Without gradients."""
    guided: int = 0
    """More where the teacher is guided."""

    def total(self, guided: bool, checkpointing: bool) -> int:
        """All of them."""
        return self.trained * (1 + checkpointing) + self.backward + self.frozen + guided * self.guided


TEACHER = Passes(1, 2, 0)
_VSD = Passes(2, 4, 3, 1)  # the generator and F_φ; the teacher, F_φ, the samples that F_φ learns from
STUDENTS = {
    "sct": Passes(2, 2, 0),
    "scd": (scd := Passes(2, 2, 1, 1)),
    "dsct": Passes(1, 2, 1),
    "dscd": Passes(1, 2, 2, 1),
    "multistep": scd,
    "vsd": _VSD,
    "scd_vsd": Passes(*(a + b for a, b in zip(scd, _VSD, strict=True))),
    "ect": Passes(1, 2, 1),
}
