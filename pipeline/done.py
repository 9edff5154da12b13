# SPDX-License-Identifier: Apache-2.0
"""Which jobs are done: their outputs lie there as they were made, from the present parameters and inputs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline import manifest, paths
from pipeline.errors import PipelineError
from pipeline.job import Job
from pipeline.params import Params

DONE, MISSING, OUTDATED, CHANGED = "done", "to do", "outdated", "changed"
SIZES_ONLY = -1  # hash nothing


def states(jobs: Sequence[Job], params: Params) -> dict[str, str]:
    """Job name to "done", "to do" (nothing there), "changed" (the files are not those that were made) or "outdated".

    Outdated is what was made from other parameters or inputs. `jobs` are in topological order: a job below one that is
    not done is not done either. Of the files in run folders only the sizes are compared, so that this takes
    milliseconds; reports are hashed, as all scales write them to the same place. Changes of a stage's source are for
    the engines to notice.
    """
    found: dict[str, str] = {}
    by_output = {output: job.name for job in jobs for output in job.outputs}
    for job in jobs:
        made = manifest.read(manifest.path_of(job))
        if made is None or not all((paths.root() / output).exists() for output in job.outputs):
            found[job.name] = MISSING
            continue
        above = [found[by_output[path]] for path in job.inputs.values() if path in by_output]
        fresh = all(state == DONE for state in above) and made.get("fingerprint") == fingerprint_now(job, params)
        if not fresh:
            found[job.name] = OUTDATED
        elif manifest.fault(job, made, manifest.HASH_BYTES if job.is_report else SIZES_ONLY):
            found[job.name] = CHANGED
        else:
            found[job.name] = DONE
    return found


def fingerprint_now(job: Job, params: Params) -> str | None:
    """The fingerprint that the job would have if it ran now; None where an input is not there, or is another scale's report."""
    folders = [paths.root() / where for where in job.inputs.values()]
    # Asked before it is tried: the error that `read_inputs` raises takes time to word, and is not wanted here.
    if not all(folder.is_file() or manifest.read(folder / paths.MANIFEST) for folder in folders):
        return None
    try:
        return manifest.fingerprint(job, params, manifest.read_inputs(job))
    except PipelineError:
        return None
