# SPDX-License-Identifier: Apache-2.0
"""One job, in its own process: verify inputs, run the stage into a staging folder, stage or publish the result."""

import importlib
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import attempts, manifest, paths, publish, unfinished
from pipeline.context import Context, Tracker
from pipeline.errors import PipelineError, StoppedError
from pipeline.files import Lock, identify, read_json, write_json

if TYPE_CHECKING:
    from pipeline.params import Params
    from pipeline.registry import Job


class Failed(PipelineError):
    """The stage failed; the message is the sentence for the user, the log has the traceback."""


def execute(job: "Job", params: "Params", launcher: str = "inline", show: bool = True) -> None:
    """Runs the job in this process and publishes its output; raises `PipelineError` with a one-sentence message.

    After a kill the same call resumes from the job's checkpoints; a complete result that was not yet published is
    published without running anything.
    """
    with Lock(paths.lock_file(job, "ticket")).held():
        mark = manifest.fingerprint(job, params, manifest.verify_inputs(job))
        lock = Lock(paths.lock_file(job, "run"))
        if not lock.acquire(wait=False):
            raise PipelineError(f"{job.name}: is already running ({holder(job)}); wait for it or stop it")
    try:
        if not publish.staged(job, mark):
            run_stage(job, params, launcher, show=show)
        publish.publish(job)
    finally:
        lock.release()


def holder(job: paths.JobName) -> str:
    """Who runs the job, for messages."""
    process = read_json(paths.job_folder(job) / "process.json") or {}
    return f"process {process.get('pid', '?')} on {process.get('host', '?')}"


def set_threads(threads: int) -> None:
    """Sets the thread counts that numeric libraries read when they are loaded; call it before importing them."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[name] = str(threads)


def run_stage(
    job: "Job",
    params: "Params",
    launcher: str,
    attempt: str = "",
    job_id: str = "",
    show: bool = True,
    expected: str | None = None,
) -> None:
    """Runs the stage and leaves a complete staged result; the caller holds the job's run lock.

    `expected` is the fingerprint that was submitted: a job that waited in a queue while params.yaml or an input
    changed is not the job that was asked for, and refuses.

    Raises `PipelineError`; whatever happens short of a kill, the working folder's exit.json says how it ended.
    """
    folder = paths.job_folder(job)
    started = time.time()
    try:
        try:
            inputs = manifest.verify_inputs(job)
            mark = manifest.fingerprint(job, params, inputs)
            if expected not in (None, mark):
                raise Failed(f"{job.name}: params.yaml or an input changed since it was submitted; run it again")
            unfinished.check(job, params, mark, inputs)
            now = _prepare(job, mark, unfinished.made_with(job, params, inputs), launcher, attempt, job_id)
            _compute(job, params, inputs, mark, now, launcher, job_id, show)
        except OSError as error:
            # What a failed attempt staged is of no use, and a full disk needs the room for the words below.
            shutil.rmtree(folder / "out", ignore_errors=True)
            _log_traceback(job)
            raise Failed(publish.explain(error, f"{job.name}:")) from error
        except PipelineError:
            raise
        except Exception as error:
            _log_traceback(job)
            raise Failed(_sentence(job, error)) from error
    except KeyboardInterrupt:
        note(job, attempt, "cancelled", f"{job.name}: was cancelled")
        raise
    except PipelineError as error:
        shutil.rmtree(folder / "out", ignore_errors=True)
        note(job, attempt, "stopped" if isinstance(error, StoppedError) else "error", str(error))
        raise
    note(job, attempt, "ok", f"{job.name}: done in {time.time() - started:.0f} s")


def _prepare(
    job: "Job", mark: str, made_with: Mapping[str, str], launcher: str, attempt: str, job_id: str
) -> attempts.Attempt:
    """The working folder at the start of an attempt: identity, who runs it, with which code, an empty staging folder."""
    folder = paths.job_folder(job)
    now = attempts.begin(job, mark, made_with)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir()
    for name in (publish.EXIT, publish.RESULT):
        (folder / name).unlink(missing_ok=True)
    node = os.environ.get("SLURMD_NODENAME")  # SLURM's name for the host
    process = {**identify(os.getpid()), "launcher": launcher, "job_id": job_id, "attempt": attempt, "node": node}
    write_json(folder / "process.json", process)
    return now


def context_of(
    job: "Job",
    params: "Params",
    inputs: Mapping[str, manifest.Input],
    mark: str,
    folder: Path,
    tracker: Tracker,
    show: bool,
    code: str = "",
) -> Context:
    """What the stage gets: its checkpoints lie in the job's working folder, all else that it writes in `folder`."""
    return Context(
        job=job,
        params=params,
        inputs={name: item.path for name, item in inputs.items()},
        out=folder / "out",
        work=paths.job_folder(job) / "work",
        tracker=tracker,
        run_id=manifest.run_id(job, mark),
        input_runs={name: item.run for name, item in inputs.items() if item.run is not None},
        progress_file=folder / "progress.json",
        log_progress=show,
        code=code,
    )


def _compute(
    job: "Job",
    params: "Params",
    inputs: Mapping[str, manifest.Input],
    mark: str,
    code: Mapping[str, Any],
    launcher: str,
    job_id: str,
    show: bool,
) -> None:
    from pipeline.lineage import open_run
    from pipeline.provenance import environment

    folder = paths.job_folder(job)
    cpu = time.process_time()
    set_threads(job.resources.threads_each)
    stage = importlib.import_module(f"pipeline.stages.{job.stage}")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(job.resources.threads_each)
    run = open_run(job, params, inputs, mark, code, launcher, job_id, resumed=len(attempts.read(job)) > 1)
    try:
        stage.run(context_of(job, params, inputs, mark, folder, run, show, code["code"]))
        _check(job, folder / "out")
        made = manifest.build(job, params, inputs, mark, folder / "out")
        write_json(folder / "out" / paths.MANIFEST, made)
        ended = time.time()
        tries = attempts.finished(job, ended)
        seconds = round(sum(attempt["seconds"] for attempt in tries), 3)
        memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_PER_MB)
        run.finish(folder / "out" / paths.MANIFEST, {"seconds": seconds, "peak_memory_mb": memory})
    except BaseException as error:
        # SystemExit is how submitit's requeue leaves: the same run goes on later.
        ends = {StoppedError: "SCHEDULED", Exception: "FAILED", SystemExit: "SCHEDULED"}
        status = next((status for kind, status in ends.items() if isinstance(error, kind)), "KILLED")
        run.fail(status, f"{type(error).__name__}: {error}")
        raise
    process = read_json(folder / "process.json") or {}
    record = {
        "run": made["run"],
        "name": job.name,
        "stage": job.stage,
        "fingerprint": mark,
        "mlflow_run": run.run_id,
        "git": {key: code[key] for key in ("commit", "dirty")},
        "environment": environment(),
        "launcher": launcher,
        "job_id": job_id,
        "host": process.get("host"),
        "started": tries[0]["started"],
        "ended": ended,
        "seconds": seconds,
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "attempts": tries,
        "peak_memory_mb": memory,
        "threads": job.resources.threads,
    }
    publish.stage_result(job, mark, record)
    run.close()


# The kernel counts in kilobytes on Linux and in bytes on macOS.
_RSS_PER_MB = 2**20 if sys.platform == "darwin" else 2**10


def _check(job: "Job", out: Path) -> None:
    """A stage must have written what it declares."""
    written = [path for path in out.rglob("*") if path.is_file()]
    if not written:
        raise Failed(f"{job.name}: the stage ended without writing anything; nothing is published")
    if (out / paths.MANIFEST).exists():
        raise Failed(f"{job.name}: the stage wrote {paths.MANIFEST}, a name that belongs to the executor")
    if job.is_report:
        for output in job.outputs:
            if not (out / output.name).is_file():
                raise Failed(f"{job.name}: the stage did not write {output.name}; nothing is published")


def _sentence(job: "Job", error: Exception) -> str:
    """One sentence for an exception: its own words where it is ours and wrote them for the user."""
    log = paths.relative(paths.log_file(job))
    text = " ".join(str(error).split())
    if "No space left on device" in text or "Disk quota exceeded" in text:  # wrapped by a library (safetensors, torch)
        return publish.explain(OSError(28, "no space left"), f"{job.name}:")
    if isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ("scm_core", "pipeline"):
        return f"{job.name}: {text}"
    if isinstance(error, MemoryError):
        return f"{job.name}: out of memory; give it more (resources in pipeline/registry.py) or a smaller batch"
    return f"{job.name}: failed: {type(error).__name__}: {text or 'no message'} (traceback in {log})"


def _log_traceback(job: "Job") -> None:
    try:
        paths.log_file(job).parent.mkdir(parents=True, exist_ok=True)
        with paths.log_file(job).open("a", encoding="utf-8") as f:
            f.write(traceback.format_exc())
    except OSError as error:
        print(f"warning: cannot write {paths.relative(paths.log_file(job))}: {error.strerror}", file=sys.stderr)


def note(job: paths.JobName, attempt: str, status: str, message: str) -> None:
    """Leaves word of how an attempt ended, for whoever waits."""
    file = paths.job_folder(job) / publish.EXIT
    value: dict[str, Any] = {"attempt": attempt, "status": status, "message": message, "time": time.time()}
    try:
        write_json(file, value)
    except OSError as error:
        # The disk is full or gone: the exit status and the words on stderr have to do.
        print(f"warning: cannot write {paths.relative(file)}: {error.strerror}", file=sys.stderr)
