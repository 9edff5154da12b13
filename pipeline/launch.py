"""Runs one job where the launcher says: inline in this process, in a local job process, or on a SLURM cluster."""

import sys
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job

LAUNCHERS = ("inline", "local", "slurm")


def run(job: "Job", params: "Params", launcher: str = "inline") -> int:
    """Makes the job's output exist; returns the exit status and has said on stderr what went wrong."""
    if launcher not in LAUNCHERS:
        print(f"error: unknown launcher '{launcher}'; it must be one of {', '.join(LAUNCHERS)}", file=sys.stderr)
        return 2
    from pipeline.execute import execute

    try:
        execute(job, params)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{job.name}: cancelled; the same command resumes it", file=sys.stderr)
        return 130
    return 0
