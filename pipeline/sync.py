# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline sync`: what one engine has made becomes known to the other, so that it finds nothing to do.

After Snakemake, DVC has no hashes in dvc.lock; after `dvc repro`, Snakemake has no dates and no settings on record.
Both are taken at their word when told that outputs are right, so this checks first that they are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline import paths, registry
from pipeline.cli import Parser
from pipeline.done import DONE, states
from pipeline.errors import PipelineError
from pipeline.params import PARAMS_FILE, load


def main(argv: list[str]) -> int:
    """Commits to DVC, then records in Snakemake, what the scale of params.yaml has made."""
    Parser(prog="python -m pipeline sync", description=__doc__).parse_args(argv)
    root = paths.root()
    params = load(root / PARAMS_FILE)
    state = states(registry.jobs(params), params)
    left = [f"{name} ({what})" for name, what in state.items() if what != DONE]
    if left:
        raise PipelineError(
            f"{len(left)} of {len(state)} jobs of scale {params.scale} are not up to date, first {left[0]}; "
            "run `snakemake --profile cluster/local` or `dvc repro` first"
        )
    _run(root, "dvc", "commit", "--force", "--quiet")
    seen = _run(root, "snakemake", "--dry-run", "--cores", "1")
    if "Nothing to be done" not in seen or "missing provenance" in seen:
        # Without --forceall, Snakemake leaves alone what looks new enough, and records no settings for it.
        _run(root, "snakemake", "--touch", "--forceall", "--cores", "1", "--quiet", "all")
    print(f"scale {params.scale}: {len(state)} jobs known to Snakemake and DVC")
    return 0


def _run(root: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, end="", file=sys.stderr)
        raise PipelineError(f"`{' '.join(words)}` failed with exit code {done.returncode}; its words are above")
    return done.stdout + done.stderr
