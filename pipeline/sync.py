# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline sync`: what one engine has made becomes known to the other, so that it finds nothing to do.

After Snakemake, DVC has no hashes in dvc.lock; after `dvc repro`, Snakemake has no dates and no settings on record; after
a job that was run by hand, neither knows. Both are taken at their word when told that outputs are right, so every file
is first compared with its manifest. What is not done yet is left for them to do.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import yaml

from pipeline import manifest, paths, registry
from pipeline.cli import Parser
from pipeline.done import DONE, states
from pipeline.errors import PipelineError
from pipeline.params import PARAMS_FILE, load

DVC_FILE = "dvc.yaml"


def main(argv: list[str]) -> int:
    """Commits to DVC, then records in Snakemake, what the scale of params.yaml has made."""
    Parser(prog="python -m pipeline sync", description=__doc__).parse_args(argv)
    root = paths.root()
    params = load(root / PARAMS_FILE)
    jobs = registry.jobs(params)
    state = states(jobs, params)
    done = [job for job in jobs if state[job.name] == DONE]
    left = [f"{name} ({what})" for name, what in state.items() if what != DONE]
    if not done:
        raise PipelineError(
            f"no job of scale {params.scale} is up to date, first {left[0]}; "
            "run `snakemake --profile cluster/local` or `dvc repro` first"
        )
    for job in done:
        made = manifest.read(manifest.path_of(job))
        if made is not None and (wrong := manifest.fault(job, made, hash_bytes=math.inf)):
            raise PipelineError(f"{wrong}; make it again with: {job.command}, then `make sync`")
    known = (yaml.safe_load((root / DVC_FILE).read_text(encoding="utf-8")) or {}).get("stages", {})
    if strange := [job.name for job in done if job.name not in known]:
        raise PipelineError(
            f"{DVC_FILE}: has no {strange[0]}, so it is not that of scale {params.scale}; make it with: python -m pipeline dvc > {DVC_FILE}"
        )
    if known.keys() == {job.name for job in done}:
        _run(root, "dvc", "commit", "--force", "--quiet")
    else:
        # Told names, DVC reads and writes all of dvc.yaml and dvc.lock once for each: seconds a name. So it is told news only.
        news = json.loads(_run(root, "dvc", "status", "--json").stdout)
        if names := [job.name for job in done if job.name in news]:
            _run(root, "dvc", "commit", "--force", "--quiet", *names)
    targets = [output.as_posix() for job in done for output in job.outputs]
    seen = _run(root, "snakemake", *targets, "--dry-run", "--cores", "1")
    said = seen.stdout + seen.stderr
    if "Nothing to be done" not in said or "missing provenance" in said:
        # Without --forceall, Snakemake leaves alone what looks new enough, and records no settings for it.
        _run(root, "snakemake", *targets, "--touch", "--forceall", "--cores", "1", "--quiet", "all")
    print(f"scale {params.scale}: {len(done)} jobs known to Snakemake and DVC")
    if left:
        print(f"{len(left)} are left to do, first {left[0]}")
    return 0


def _run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", *words], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, end="", file=sys.stderr)
        raise PipelineError(f"`{' '.join(words)}` failed with exit code {done.returncode}; its words are above")
    return done
