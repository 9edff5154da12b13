# SPDX-License-Identifier: Apache-2.0
"""What becomes of a job's unfinished work when parameters, inputs or code are no longer those that it was begun with.

A training is not continued with others unless params.yaml says `resume: {allow_changes: true}`. What is no training is set aside if
parameters or inputs changed, and goes on with other code, with a warning. (Evaluations leave nothing here: what they measured is found in
their cache, under keys that hold the meaning of the code.)
"""

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline import attempts, manifest, paths
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.provenance import code_state, flat, sources_digest
from scm_core.disk import warn

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job

SHOWN = 6  # changes named in a message


def check(job: "Job", params: "Params", mark: str, inputs: Mapping[str, manifest.Input]) -> None:
    """Clear the way for an attempt at `job`; PipelineError if it would go on from what something else has made and must not."""
    folder = paths.job_folder(job)
    if not folder.exists():
        return
    known = read_json(folder / attempts.STATE) or {}
    trained = any((folder / "work" / "checkpoints").glob("step-*"))
    found = (
        [] if known.get("fingerprint") == mark else differences(known.get("made_with"), made_with(job, params, inputs))
    )
    if found and not trained:
        set_aside(job, mark, str(known.get("fingerprint") or "unknown"))
        return
    tries = attempts.read(job)
    if tries and any((folder / "work").glob("*")) and tries[-1].get("code") != sources_digest():
        code = f"code {describe(tries[-1])} → {describe(code_state())}"
        if not trained:
            warn(
                f"{job.name}: what it has so far was made by other code ({code}); remove {paths.relative(folder)} to start over"
            )
        else:
            found.append(code)
    if not (found and trained):
        return
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    what = f"{job.name}: its unfinished training was made with other settings: {', '.join(found[:SHOWN])}{more}"
    if not params.resume.allow_changes:
        raise PipelineError(
            f"{what}; go back to them, or set `resume: {{allow_changes: true}}` in params.yaml to go on from it with the new ones, or "
            f"remove {paths.relative(folder)} to start over"
        )
    warn(f"{what}; going on from it, as resume.allow_changes says")


def made_with(job: "Job", params: "Params", inputs: Mapping[str, manifest.Input]) -> dict[str, str]:
    """The parameters and inputs of an attempt, by dotted names, for its state.json."""
    return {
        **flat(manifest.resolved_params(job, params)),
        **{f"input {name}": (item.run or item.digest[:8]) for name, item in inputs.items()},
    }


def differences(before: Mapping[str, Any] | None, now: Mapping[str, str]) -> list[str]:
    """In words: `slots.latent_guided.teacher.lr 0.01 → 0.02`."""
    if before is None:
        return ["parameters or inputs that were not written down"]
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return [f"{name} {before.get(name, 'absent')} → {now.get(name, 'absent')}" for name in names] or [
        "inputs' contents"
    ]


def describe(code: Mapping[str, Any]) -> str:
    """Code in words: `1a2b3c4d of commit 5e6f7a8 + uncommitted changes`."""
    commit = f"commit {code['commit'][:7]}" if code.get("commit") else "no commit"
    return f"{(code.get('code') or 'unknown')[:8]} of {commit}{' + uncommitted changes' if code.get('dirty') else ''}"


def set_aside(job: "Job", mark: str, old: str) -> None:
    """Moves a working folder that belongs to other parameters or inputs out of the way, and says so."""
    folder = paths.job_folder(job)
    aside = folder.with_name(f"{folder.name}.stale-{old[:8]}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    what = f"what {job.name} had was made with other parameters or inputs ({old[:8]}, now {mark[:8]})"
    warn(f"{what}: not used, set aside in {paths.relative(aside)}")
