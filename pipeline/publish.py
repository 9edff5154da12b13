# SPDX-License-Identifier: Apache-2.0
"""From a job's working folder to its declared outputs, in steps that a kill can interrupt but not spoil.

Light on purpose: the waiting process publishes too (a job that ended while nobody waited is published by the next who
asks for it), and it must not import torch or MLflow.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import manifest, paths
from pipeline.errors import PipelineError
from pipeline.files import fsync_tree, read_json, write_json

if TYPE_CHECKING:
    from pipeline.registry import Job

EXIT = "exit.json"  # how an attempt ended; missing after a hard death
RESULT = "result.json"  # written last: where it is, `out/` is complete and on the disk


def staged(job: "Job", mark: str) -> bool:
    """Whether a complete result with this fingerprint waits to be published."""
    folder = paths.job_folder(job)
    result = read_json(folder / RESULT)
    if result is None or result.get("fingerprint") != mark:
        return False
    # The second: a kill came after the move to its place, and only the record is left to write.
    return (folder / "out" / paths.MANIFEST).is_file() or published(job, mark)


def exit_note(job: "Job", ticket: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the attempt of a ticket ended, if it left word; a ticket without attempt (found again) takes any note."""
    note = read_json(paths.job_folder(job) / EXIT)
    return note if note is not None and ticket.get("attempt") in (None, note.get("attempt")) else None


def published(job: "Job", mark: str) -> bool:
    """Whether the declared outputs exist and were made by this very job, parameters and inputs."""
    if not all((paths.root() / output).exists() for output in job.outputs):
        return False
    made = manifest.read(manifest.path_of(job))
    return made is not None and made.get("fingerprint") == mark


def stage_result(job: "Job", mark: str, record: dict[str, Any]) -> None:
    """Declares `out/` complete: everything in it on the disk, then the pointer that says so."""
    folder = paths.job_folder(job)
    fsync_tree(folder / "out")
    write_json(folder / RESULT, {"fingerprint": mark, "record": record}, durable=True)


def publish(job: "Job") -> None:
    """Moves the staged result to the declared outputs, writes the record and removes the working folder.

    Can be repeated after a kill at any point: the staged result is there until it is at its place.
    """
    folder = paths.job_folder(job)
    result = read_json(folder / RESULT)
    if result is None:
        raise PipelineError(f"{job.name}: there is no staged result to publish in {paths.relative(folder)}")
    staging = folder / "out"
    record = paths.record_file(job)
    try:
        if job.is_report:
            for output in job.outputs:
                _copy_file(staging / output.name, paths.root() / output)
            # The manifest last: until it is there, the one before it speaks of other files, and the report is not current.
            _copy_file(staging / paths.MANIFEST, paths.report_manifest(job))
        else:
            _move_folder(staging, paths.root() / job.outputs[0], folder / "replaced")
        write_json(record, result["record"])
        # The pointer goes first: a half-removed folder must not look like a staged result.
        (folder / RESULT).unlink()
    except OSError as error:
        raise PipelineError(explain(error, f"{job.name}: cannot publish")) from error
    shutil.rmtree(folder, ignore_errors=True)


def _copy_file(source: Path, target: Path) -> None:
    # Copied, not moved: reports/ may be on another file system than runs/, and a second try needs the source.
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, draft)
        with draft.open("rb") as f:
            os.fsync(f.fileno())
        draft.replace(target)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _move_folder(source: Path, target: Path, old: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() and target.exists():
        return  # a kill came between the move and the record
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        # A folder cannot be replaced in one call: between these two there is no output, but never a mixture.
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    source.rename(target)
    fd = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def explain(error: OSError, start: str) -> str:
    """An operating system's error as one sentence with a remedy."""
    import errno

    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    where = f" {paths.relative(named)}" if named else ""
    start = start if named else start.removesuffix(":")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        disk = next((folder for folder in (named.parents if named else ()) if folder.exists()), Path.cwd())
        free = shutil.disk_usage(disk).free / 2**20
        return f"{start}{where}: no space left ({free:.0f} MB free); free some, then run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{start}{where}: {error.strerror}; make it writable for this user, then run the same command again"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{start}{where}: a file is where a folder belongs; move it away, then run the same command again"
    return f"{(start + where).removesuffix(':')}: {error.strerror or error}"
