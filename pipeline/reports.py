# SPDX-License-Identifier: Apache-2.0
"""The stages that write reports/: tables, figures, claims. Which models they show is in `pipeline.shown`.

A report is made where the scale has one of its slots; a run that it shows elsewhere and that this scale has not is missing in it, and
shown so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pipeline import costs, shown
from pipeline.expansion import evaluated
from pipeline.job import REPORTS, Axes, Point, Stage, noted
from pipeline.params import Params, Scale
from pipeline.shown import ITEMS, Shown

TEXTS = ("csv", "md", "tex")
PICTURES = ("png", "pdf")
GRIDS = tuple(f"figure{number}" for number in range(8, 14))


def _folder(params: Params, stage: str, slot: str, *rest: str) -> Path:
    return Path("runs", params.scale, slot, stage, *rest)


def _evaluations(params: Params, models: Iterable[Shown]) -> dict[str, Path]:
    return {model.evaluation: _folder(params, "evaluate", *model) for model in models}


def evaluations_of(name: str) -> Callable[[Point], dict[str, Path]]:
    """The evaluations of the models that an item shows, as evaluate-<slot>-<size>-<method>."""
    return lambda point: _evaluations(point.params, ITEMS[name].models(point.params))


def where_it_belongs(name: str) -> Callable[[Params], Axes]:
    """Once, if the scale has a slot that the item is about."""
    return lambda params: iter([{}] if ITEMS[name].here(params) else [])


def measured_with(name: str) -> Callable[[Point], tuple[str, ...]]:
    """What an item says about its data and measurements: the slots' data sets and evaluations."""

    def keys(point: Point) -> tuple[str, ...]:
        slots = {slot: point.params.active.slots[slot] for slot in ITEMS[name].here(point.params)}
        return tuple(
            f"slots.{slot}{key}" for slot, own in slots.items() for key in (*own.dataset.keys(), ".evaluation")
        )

    return keys


def trained_with(name: str) -> Callable[[Point], tuple[str, ...]]:
    """All that the networks of an item's slots are trained with."""

    def keys(point: Point) -> tuple[str, ...]:
        found = []
        for slot in ITEMS[name].here(point.params):
            own = point.params.active.slots[slot]
            found += [f"slots.{slot}{key}" for key in (*own.dataset.keys(), ".teacher", ".students")]
            parts = ("network", "teacher", "students")
            found += [f"slots.{slot}.sizes.{size}.{part}" for size in own.sizes for part in parts]
        return tuple(found)

    return keys


def _files(name: str, endings: Iterable[str]) -> tuple[Path, ...]:
    return tuple(REPORTS / f"{name}.{ending}" for ending in endings)


def _table(
    name: str,
    title: str,
    params: Callable[[Point], tuple[str, ...]] | None = None,
    inputs: Callable[[Point], dict[str, Path]] | None = None,
) -> Stage:
    return Stage(
        name,
        title,
        axes=(),
        expand=where_it_belongs(name),
        inputs=inputs or evaluations_of(name),
        params=params or measured_with(name),
        cost=costs.report,
        reports=_files(name, TEXTS),
        reads=(REPORTS / "paper" / f"{name}.csv",),
    )


def _figure(name: str, title: str, reads: tuple[Path, ...] = ()) -> Stage:
    return Stage(
        name,
        title,
        axes=(),
        expand=where_it_belongs(name),
        inputs=evaluations_of(name),
        params=measured_with(name),
        cost=costs.figure,
        reports=_files(name, (*PICTURES, "csv")),
        reads=reads,
    )


def _toy(name: str, title: str, cost: Callable[[Scale, Mapping[str, str]], costs.Resources]) -> Stage:
    """A figure that trains what it shows, where the scale says how."""
    return Stage(
        name,
        title,
        axes=(),
        expand=lambda params: iter([{}] if getattr(params.active, name) else []),
        inputs=lambda p: {},
        params=lambda p: ("seed", name),
        cost=cost,
        reports=_files(name, (*PICTURES, "csv")),
    )


def _decoder(point: Point) -> dict[str, Path]:
    names = ("latents", "vae") if point.slot.vae else ()
    return {name: _folder(point.params, name, shown.LATENT) for name in names}


def table2_inputs(point: Point) -> dict[str, Path]:
    """Its models, and what the autoencoder costs."""
    floor = _folder(point.params, "reconstruction", shown.LATENT)
    return {**evaluations_of("table2")(point), "reconstruction": floor}


def figure2_inputs(point: Point) -> dict[str, Path]:
    """Table 2's networks, of repeated ones the first, as teacher-<size> or student-<size>-<method>; the decoder; their evaluations."""
    models = shown.first_trainings(ITEMS["table2"].models(point.params))
    networks = {}
    for slot, size, method in models:
        known = method == "teacher"
        name = f"teacher-{size}" if known else f"student-{size}-{method}"
        networks[name] = _folder(point.params, "teacher" if known else "student", slot, size, *[method][known:])
    return {**networks, **_decoder(point), **_evaluations(point.params, models)}


def grids_inputs(point: Point) -> dict[str, Path]:
    """The student and the decoder."""
    model = shown.gridded(point.params)
    return {"student": _folder(point.params, "student", *model), **_decoder(point)} if model else {}


_SHOWN = (
    _table("table1", "Table 1: unconditional and class-conditional pixels, the paper's rows and ours"),
    _table("table2", "Table 2: the paper's rows and ours", inputs=table2_inputs),
    _table("table3", "Table 3: training settings for pixels, the paper's and those used", trained_with("table3")),
    _table("table4", "Table 4: training settings for latents, the paper's and those used", trained_with("table4")),
    _table("table5", "Table 5: FID and FD-DINOv2 of latent models at their best guidance"),
    _table("table6", "Table 6: VSD, sCD and both"),
    _table("table7", "Table 7: class-conditional pixels"),
    _table("tableE3", "Table E3: ECT and sCT trained for different times"),
    _figure("figure1", "Figure 1: FID against effective sampling compute", (REPORTS / "paper" / "table2.csv",)),
    Stage(
        "figure2",
        "Figure 2: samples of teacher and students from the same noise",
        axes=(),
        expand=lambda params: iter([{}] if (slot := params.active.slots.get(shown.LATENT)) and slot.figure2 else []),
        inputs=figure2_inputs,
        params=lambda p: (".sigma_data", ".evaluation", ".figure2"),
        cost=costs.figure2,
        reports=_files("figure2", PICTURES),
    ),
    _toy("figure3", "Figure 3: discrete and continuous time on a toy whose PF-ODE is known", costs.figure3),
    _toy("figure4", "Figure 4: the two parts of dF/dt with three time embeddings, on the toy", costs.figure4),
    _figure("figure5", "Figure 5: FID against iterations for tangents, weighting and discrete time"),
    _figure("figure6", "Figure 6: FID against the cost of one forward pass", (REPORTS / "paper" / "table2.csv",)),
    _figure("figure7", "Figure 7: precision, recall and FID against guidance"),
    Stage(
        "grids",
        "Figures 8 to 13: samples with 1 and 2 steps at several guidance scales",
        axes=(),
        expand=lambda params: iter([{}] if shown.gridded(params) else []),
        inputs=grids_inputs,
        params=lambda p: (".sigma_data", ".evaluation.t_mid", ".grids"),
        cost=costs.grids,
        reports=tuple(path for name in GRIDS for path in _files(name, PICTURES)),
    ),
    Stage(
        "claims",
        "the paper's headline claims, measured and judged",
        axes=(),
        expand=lambda params: iter([{}]),
        inputs=evaluations_of("claims"),
        params=lambda p: (*measured_with("claims")(p), *trained_with("claims")(p)),
        cost=costs.report,
        reports=_files("claims", TEXTS),
        reads=tuple(REPORTS / "paper" / f"{name}.csv" for name in ("table2", "tableE3")),
    ),
)
_POINTS = Stage(
    "evaluations",
    "every measured point of the scale in one file",
    axes=(),
    expand=lambda params: iter([{}]),
    inputs=lambda p: _evaluations(p.params, (Shown(a["slot"], a["size"], a["method"]) for a in evaluated(p.params))),
    params=lambda p: (),
    cost=costs.report,
    reports=_files("evaluations", ("csv",)),
)
# In topological order: all of them read what `pipeline.declared` makes, and nothing reads them.
REPORTED = (*map(noted, _SHOWN), _POINTS)
