# SPDX-License-Identifier: Apache-2.0
"""Which models each table and figure shows, of those that a scale trains.

A student belongs to an item by its name in params.yaml, which is a convention, or by its method: Table 5's multistep students are those
that are trained in segments, Table E3's those called `sct_…` and `ect_…`, Figure 5's the student `scd_norm` (where there is none: `scd`)
with its variants `scd_raw`, `scd_clip`, `scd_unweighted` and all of discrete time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.overrides import base_of, with_repetitions
from pipeline.params import Params, Slot

UNCOND, COND, LATENT = "pixel_uncond", "pixel_cond", "latent_guided"
MAIN = ("scd", "sct")
DISTILLED = ("scd", "vsd", "scd_vsd")
ABLATED = ("scd_raw", "scd_clip", "scd_unweighted")
SCHEDULES = ("sct_", "ect_")  # what the names of Table E3's students start with


class Shown(NamedTuple):
    """A teacher or a student of a slot."""

    slot: str
    size: str
    method: str

    @property
    def evaluation(self) -> str:
        """The name of its evaluation among a report's inputs, and of the job that makes it."""
        return "-".join(("evaluate", *self))


Students = Callable[[Slot, str], list[str]]


def trained(slot: Slot, size: str) -> tuple[str, ...]:
    """Every student of a size, repetitions included."""
    return tuple(slot.sizes[size].students)


def main_students(slot: Slot, size: str) -> list[str]:
    """sCD and sCT: Tables 1, 2 and 7, Figures 2 and 6."""
    return with_repetitions(MAIN, trained(slot, size))


def multistep(slot: Slot, size: str) -> list[str]:
    """Those that are sampled in segments, without repetitions."""
    students = slot.sizes[size].students
    return [name for name in students if students[name].method == "multistep" and base_of(name) == name]


def table5_students(slot: Slot, size: str) -> list[str]:
    """sCT, sCD, multistep sCD, sCD+VSD."""
    return with_repetitions(("sct", "scd", *multistep(slot, size), "scd_vsd"), trained(slot, size))


def table6_students(slot: Slot, size: str) -> list[str]:
    """VSD, sCD and both, at the sizes that train VSD alone."""
    return with_repetitions(("vsd", "scd", "scd_vsd"), trained(slot, size)) if "vsd" in trained(slot, size) else []


def figure5_baseline(slot: Slot, size: str) -> str:
    """What the variants of a size are compared with."""
    return "scd_norm" if "scd_norm" in trained(slot, size) else "scd"


def discrete(slot: Slot, size: str) -> list[str]:
    """Those of discrete time by their number of intervals, without repetitions."""
    students = slot.sizes[size].students
    names = [name for name in students if students[name].method == "dscd" and base_of(name) == name]
    return sorted(names, key=lambda name: getattr(students[name], "intervals", 0))


def figure5_students(slot: Slot, size: str) -> list[str]:
    """The baseline and its variants, at the sizes that train some."""
    variants = [*(name for name in ABLATED if name in trained(slot, size)), *discrete(slot, size)]
    return with_repetitions((figure5_baseline(slot, size), *variants), trained(slot, size)) if variants else []


def figure7_students(slot: Slot, size: str) -> list[str]:
    """sCD, VSD and both, as far as they are guided; of repeated trainings the first."""
    students = slot.sizes[size].students
    return [name for name in DISTILLED if name in students and students[name].guidance]


def table_e3_students(slot: Slot, size: str) -> list[str]:
    """ECT's and sCT's, each length a student of its own."""
    return [name for name in trained(slot, size) if name.startswith(SCHEDULES)]


def _nothing(slot: Slot, size: str) -> list[str]:
    return []


def _of(params: Params, slots: tuple[str, ...], students: Students, teachers: bool = True) -> Iterator[Shown]:
    for name in slots:
        slot = params.active.slots.get(name)
        for size in slot.sizes if slot else ():
            assert slot is not None
            shown = students(slot, size)
            for method in ("teacher", *shown) if teachers else shown:
                yield Shown(name, size, method)


class Item(NamedTuple):
    """A table or a figure of models: the slots that it is about, and which students of each size."""

    slots: tuple[str, ...]
    students: Students
    teachers: bool = True

    def models(self, params: Params) -> list[Shown]:
        """What it shows of the active scale."""
        return list(_of(params, self.slots, self.students, self.teachers))

    def here(self, params: Params) -> list[str]:
        """Those of its slots that the active scale has."""
        return [name for name in self.slots if name in params.active.slots]


def _claimed(slot: Slot, size: str) -> list[str]:
    """Whatever a claim is about."""
    names = (*table5_students(slot, size), *figure5_students(slot, size), *figure7_students(slot, size))
    return list(dict.fromkeys((*names, *table_e3_students(slot, size))))


ITEMS = {
    "table1": Item((UNCOND, COND), main_students),
    "table2": Item((LATENT,), main_students),
    "table3": Item((COND,), _nothing, teachers=False),
    "table4": Item((LATENT,), _nothing, teachers=False),
    "table5": Item((LATENT,), table5_students),
    "table6": Item((LATENT,), table6_students, teachers=False),
    "table7": Item((COND,), main_students),
    "tableE3": Item((UNCOND,), table_e3_students, teachers=False),
    "figure1": Item((LATENT,), table5_students),
    "figure5": Item((LATENT,), figure5_students, teachers=False),
    "figure6": Item((LATENT,), main_students),
    "figure7": Item((LATENT,), figure7_students),
    "claims": Item((UNCOND, COND, LATENT), _claimed),
}


def first_trainings(models: list[Shown]) -> list[Shown]:
    """Without repeated trainings."""
    return [model for model in models if base_of(model.method) == model.method]


def gridded(params: Params) -> Shown | None:
    """The student of Figures 8 to 13: of the last size in params.yaml that trains it."""
    slot = params.active.slots.get(LATENT)
    if slot is None or slot.grids is None:
        return None
    sizes = [size for size in slot.sizes if slot.grids.student in trained(slot, size)]
    return Shown(LATENT, sizes[-1], slot.grids.student) if sizes else None
