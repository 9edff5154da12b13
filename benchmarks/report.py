# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: their command line, and the two files of their results."""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.provenance import processor

__all__ = ["RESULTS", "arguments_of", "measure", "processor", "write"]

RESULTS = Path(__file__).resolve().parent / "results"


def arguments_of(parser: argparse.ArgumentParser, kind: str, names: Collection[str]) -> argparse.Namespace:
    """The parsed command line, where `<kind>s` are those of `names` that were asked for: some of them, or none for all."""
    parser.add_argument(f"{kind}s", nargs="*", metavar=kind.upper(), help=f"of {', '.join(names)}; all by default")
    arguments = parser.parse_args()
    for name in getattr(arguments, f"{kind}s"):
        if name not in names:
            parser.error(f"{name}: expected some of {', '.join(names)}")
    return arguments


def measure(
    cases: Mapping[str, Any],
    chosen: Collection[str],
    run: Callable[[str], Any],
    path: Path,
    markdown: Callable[[Any], str],
) -> None:
    """Run the chosen cases, or all, and write the results after each, in the cases' order; those that are not named keep theirs."""
    report = json.loads(path.read_text()) if path.exists() and chosen else {}
    for name in chosen or cases:
        report[name] = run(name)
        report = {known: report[known] for known in cases if known in report}
        write(report, path, markdown)
    print(markdown(report))


def write(report: Mapping[str, Any], path: Path, markdown: Callable[[Any], str]) -> None:
    """The results as JSON at `path`, and as a page beside it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
