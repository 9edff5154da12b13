# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline evaluate RUN … --guidance 1.0:2.0:0.1 --steps 1,2`: measure trained models, or folders of PNG files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.asked import Asked, Target, add_options, numbers, whole_numbers
from pipeline.cli import Parser
from pipeline.errors import PipelineError
from pipeline.params import PARAMS_FILE, load
from pipeline.provenance import git_state
from pipeline.sweep import REPORT, Point

LISTS = {"guidance": numbers, "steps": whole_numbers, "ema": numbers, "nimg": whole_numbers}


def main(argv: Sequence[str]) -> int:
    """Measure every point of the grid that was not measured before, print the table, and put its rows into a file."""
    parser = Parser(prog="python -m pipeline evaluate", description="Measure trained models, or folders of PNG files.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a trained job, its run id or its folder; or a folder of PNG files"
    )
    add_options(parser)
    parser.add_argument("--guidance", metavar="LIST", help="1.0,1.5 or 1.0:2.0:0.1 (default: evaluation.guidance)")
    parser.add_argument("--steps", metavar="LIST", help="of consistency sampling (default: all the model is made for)")
    parser.add_argument(
        "--ema", metavar="LIST", help="relative widths of averages, from snapshots (default: the published one)"
    )
    parser.add_argument("--nimg", metavar="LIST", help="images seen, for earlier checkpoints; needs --ema")
    parser.add_argument(
        "--sets", type=int, default=1, help="of samples, for a spread over seeds (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="a .csv or .parquet file for the rows")
    parser.add_argument(
        "--images", metavar="FOLDER", type=Path, help="keep the images of the one point that is measured, as PNG files"
    )
    options = parser.parse_args(list(argv))
    if options.output and options.output.suffix not in (".csv", ".parquet"):
        raise PipelineError(f"{options.output}: expected a file that ends in .csv or .parquet")
    if options.output and not options.output.parent.is_dir():
        raise PipelineError(f"{options.output}: there is no folder {options.output.parent}; make it first")
    if options.sets < 1:
        raise PipelineError(f"--sets: must be at least 1, got {options.sets}")
    for name, parse in LISTS.items():
        text = getattr(options, name)
        setattr(options, name, None if text is None else parse(text, f"--{name}"))
    asked = Asked(load(paths.root() / PARAMS_FILE, options.scale), options)
    from pipeline.results import merge, read, shown, without_repetition

    if options.output and options.output.exists():
        read(options.output)  # what is no such file is better known before an hour of sampling
    rows = without_repetition([row for run in options.runs for row in measure(asked, run, options)])
    print(shown(rows, asked.columns))
    if options.output:
        merge(rows, options.output, paths.evaluation_cache(asked.params.scale) / "locks")
    return 0


def measure(asked: Asked, run: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one RUN, a row for each point and space, with what they depend on."""
    target = asked.target(run)
    commit = git_state()["commit"]
    wanted = points(target, run, options)
    if options.images and (len(wanted) > 1 or len(options.runs) > 1):
        raise PipelineError(
            f"--images: there is one folder, and {len(wanted)} points of {len(options.runs)} runs; ask for one"
        )
    for point in wanted:
        if options.images:
            target.keep_images(point, options.images)
        for space, found in target.measure(point).items():
            reference = target.evaluator.references[space]
            yield {
                **target.names,
                **{key: value for key, value in asdict(point).items() if key != "phase"},
                "space": space,
                **found,
                "dataset": reference.dataset,
                "extractor": reference.extractor,
                "weights_sha256": reference.weights_sha256,
                "reference_sha256": reference.key,
                "commit": commit,
            }


def points(target: Target, run: str, options: argparse.Namespace) -> list[Point]:
    """The grid for one target; PipelineError for an axis that it does not have."""
    how, subject = target.slot.evaluation, target.subject
    if subject.is_folder:
        for name in (*LISTS, "first"):
            if getattr(options, name) is not None:
                raise PipelineError(f"--{name}: {run} is a folder of images, which are as they are; leave it out")
        if options.sets > 1:
            raise PipelineError(f"--sets: {run} is a folder of images, one set; leave it out")
        count = len(subject) if options.samples is None else options.samples
        target.check_samples(run, count)
        return [Point(REPORT, 0, None, count, 0)]
    steps = options.steps or subject.steps
    for n in steps:
        target.check_steps(run, n)
    if options.guidance is not None and not subject.guidable:
        raise PipelineError(f"--guidance: {run} has no guidance; leave it out")
    scales = options.guidance or how.guidance if subject.guidable else [None]
    target.check_guidance(run, options.guidance or ())
    samples = options.samples or how.samples
    target.check_samples(run, samples)
    first = how.report_seed if options.first is None else options.first
    firsts = [first + i * samples for i in range(options.sets)]
    averages = product(options.ema or [None], options.nimg or [None])
    return [
        Point(REPORT, n, s, samples, index, ema, nimg)
        for (ema, nimg), n, s, index in product(averages, steps, scales, firsts)
    ]
