# SPDX-License-Identifier: Apache-2.0
"""Which jobs are done: their outputs lie there and were made from the present parameters and inputs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import manifest, paths
from pipeline.errors import PipelineError
from pipeline.job import Job
from pipeline.params import Params

DONE, MISSING, OUTDATED = "done", "to do", "outdated"


def states(jobs: Sequence[Job], params: Params) -> dict[str, str]:
    """Job name to "done", "to do" (nothing there) or "outdated" (made from other parameters or inputs).

    `jobs` are in topological order. A job below one that is not done is not done either. Only manifests are read, not
    the data, so this takes milliseconds; changes of a stage's source are for the engines to notice.
    """
    found: dict[str, str] = {}
    by_output = {output: job.name for job in jobs for output in job.outputs}
    for job in jobs:
        made = manifest.read(manifest.path_of(job))
        if made is None or not all((paths.root() / output).exists() for output in job.outputs):
            found[job.name] = MISSING
            continue
        above = [found[by_output[path]] for path in job.inputs.values() if path in by_output]
        fresh = all(state == DONE for state in above) and made.get("fingerprint") == _fingerprint(job, params)
        found[job.name] = DONE if fresh else OUTDATED
    return found


def _fingerprint(job: Job, params: Params) -> str | None:
    try:
        return manifest.fingerprint(job, params, manifest.read_inputs(job))
    except PipelineError:  # an input is not there: whatever this was made from, it is not that
        return None
