# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline compare A B`: two trained models, or folders of PNG files, against the same reference and with each other."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import paths
from pipeline.asked import Asked, Target, add_options
from pipeline.cli import Parser
from pipeline.errors import PipelineError
from pipeline.params import PARAMS_FILE, load
from pipeline.spaces import SPACES
from pipeline.sweep import REPORT, Point

ERRORS = {"fid": "fid_se", "precision": "precision_se", "recall": "recall_se"}


def main(argv: Sequence[str]) -> int:
    """Print both, their differences in standard errors, and the distance between them."""
    parser = Parser(
        prog="python -m pipeline compare", description="Compare two trained models, or folders of PNG files."
    )
    for name in ("a", "b"):
        parser.add_argument(
            name, metavar=name.upper(), help="a trained job, its run id or its folder; or a folder of PNG files"
        )
    add_options(parser)
    parser.add_argument("--guidance", type=float, help="of both, where they have one (default: 1.0)")
    parser.add_argument(
        "--steps", type=int, help="of both, where they sample (default: the fewest that each is made for)"
    )
    options = parser.parse_args(list(argv))
    asked = Asked(load(paths.root() / PARAMS_FILE, options.scale), options)
    targets = [asked.target(run) for run in (options.a, options.b)]
    require_one_reference(targets, (options.a, options.b))
    require_a_use(targets, options)
    count = min(options.samples or target.default_samples for target in targets)
    points = [
        point_of(target, run, options, count) for target, run in zip(targets, (options.a, options.b), strict=True)
    ]
    print("\n".join(report(targets, points, asked.columns)))
    return 0


def require_one_reference(targets: Sequence[Target], runs: Sequence[str]) -> None:
    """PipelineError for numbers that would not compare: those of other data or of other networks."""
    a, b = ({space: known.key for space, known in target.evaluator.references.items()} for target in targets)
    if a != b:
        slots = " and ".join(f"{run} in slot {target.names['slot']}" for run, target in zip(runs, targets, strict=True))
        raise PipelineError(
            f"{slots} are measured against different references; name the same slot for a folder with --slot"
        )


def require_a_use(targets: Sequence[Target], options: argparse.Namespace) -> None:
    """PipelineError for an option that neither of the two heeds."""
    sampled = any(not target.subject.is_folder for target in targets)
    guided = any(target.subject.guidable for target in targets)
    for name, used in {"guidance": guided, "steps": sampled, "first": sampled}.items():
        if getattr(options, name) is not None and not used:
            raise PipelineError(f"--{name}: means nothing to {options.a} and {options.b}; leave it out")


def point_of(target: Target, run: str, options: argparse.Namespace, count: int) -> Point:
    """What to measure of one of the two."""
    subject = target.subject
    target.check_samples(run, count)
    if subject.is_folder:
        return Point(REPORT, 0, None, count, 0)
    steps = min(subject.steps) if options.steps is None else options.steps
    target.check_steps(run, steps)
    scale = (1.0 if options.guidance is None else options.guidance) if subject.guidable else None
    target.check_guidance(run, () if scale is None else (scale,))
    first = target.slot.evaluation.report_seed if options.first is None else options.first
    return Point(REPORT, steps, scale, count, first)


def report(targets: Sequence[Target], points: Sequence[Point], columns: Sequence[str]) -> list[str]:
    """The lines to print: for each space a table of the numbers, and the distance between the two sets."""
    from scm_core.evaluate import Moments, frechet_distance

    both = list(zip(targets, points, strict=True))
    features = [target.features(point) for target, point in both]  # before they are measured, and then forgotten
    a, b = (target.measure(point) for target, point in both)
    lines = [f"{name}: {described(target, point)}" for name, target, point in zip("AB", targets, points, strict=True)]
    for space in a:
        reference = targets[0].evaluator.references[space]
        lines += [
            "",
            f"{reference.extractor}, against {reference.count} images of {reference.dataset}",
            f"{'':12}{'A':>20}{'B':>20}{'A − B':>20}",
        ]
        shown = [key for key in columns if not key.endswith(("_se", "_bias"))]
        lines += [line(key, a[space], b[space]) for key in shown]
        first, second = (Moments.of(found[space]) for found in features)
        distance = frechet_distance(first.mean, first.cov, second.mean, second.cov)
        lines.append(f"{SPACES[space].distance} of A and B to each other: {distance:.4f}")
    return lines


def described(target: Target, point: Point) -> str:
    """What was measured."""
    parts = [target.subject.name, f"{point.samples} images"]
    if not target.subject.is_folder:
        parts.append(f"{point.steps} step{'s' * (point.steps > 1)}")
    if point.guidance is not None:
        parts.append(f"guidance {point.guidance:g}")
    return ", ".join(parts)


def line(key: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """One number of both, and the difference with its error; the sets count as independent."""
    error = ERRORS.get(key)
    cells = []
    for found in (a, b):
        se = found[error] if error else None
        cells.append(f"{found[key]:.4f}" + ("" if se is None else f" ± {se:.4f}"))
    difference = f"{a[key] - b[key]:+.4f}"
    if error and a[error] is not None and b[error] is not None:
        both = math.hypot(a[error], b[error])
        difference += f" ± {both:.4f}"
    return f"{key:12}" + "".join(f"{cell:>20}" for cell in (*cells, difference))
