# SPDX-License-Identifier: Apache-2.0
"""Makes a job's output exist: runs it inline, or submits it, waits cheaply, and publishes what it staged.

The waiter imports neither torch nor MLflow nor pandas. It can be killed at any time: the submitted job goes on, and
whoever asks for the same job next attaches to it by its ticket, or publishes what it has staged meanwhile.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import attempts, manifest, paths, publish, unfinished
from pipeline.errors import PipelineError, StoppedError
from pipeline.files import Lock, is_locked, read_json, write_json
from pipeline.progress import describe

if TYPE_CHECKING:
    from pipeline.backends import Backend
    from pipeline.params import Params
    from pipeline.registry import Job

LAUNCHERS = ("inline", "local", "slurm")
LINE_SECONDS = 15.0
TAIL_LINES = 15


def run(job: "Job", params: "Params", launcher: str = "inline") -> int:
    """Makes the job's output exist; returns the exit status, having said on stderr in one sentence what went wrong."""
    previous = {signum: signal.signal(signum, _interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        if launcher not in LAUNCHERS:
            raise PipelineError(f"unknown launcher '{launcher}'; it must be one of {', '.join(LAUNCHERS)}")
        if launcher == "inline":
            from pipeline.execute import execute

            execute(job, params)
        else:
            Waiter(job, params, launcher).run()
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {publish.explain(error, f'{job.name}:')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{job.name}: interrupted; the same command goes on from its last checkpoint", file=sys.stderr)
        return 130
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(signum).name)


class Waiter:
    """Waits for one job that runs elsewhere. Several may wait for the same job: one submits, one publishes."""

    def __init__(self, job: "Job", params: "Params", launcher: str) -> None:
        self.job, self.params, self.launcher = job, params, launcher
        self.folder = paths.job_folder(job)
        self.ticket_lock = Lock(paths.lock_file(job, "ticket"))
        self.waiters = Lock(paths.lock_file(job, "waiters"))
        self._shown = time.monotonic()
        self._bar = sys.stdout.isatty() and os.environ.get("SCM_PROGRESS") != "plain"

    def run(self) -> None:
        """Submits or attaches, waits, publishes; raises `PipelineError` when the job fails."""
        self.waiters.acquire(shared=True)
        try:
            inputs = manifest.verify_inputs(self.job)
            mark = manifest.fingerprint(self.job, self.params, inputs)
            with deferred_signals() as late, self.ticket_lock.held():
                if publish.staged(self.job, mark) and not self._running():
                    print(f"{self.job.name}: had ended meanwhile; publishing what it staged", flush=True)
                    publish.publish(self.job)
                    return
                ticket, backend = self._attach(mark) or self._submit(mark, inputs)
            try:
                if late:
                    raise KeyboardInterrupt(late[0])
                self._wait(ticket, backend)
            except KeyboardInterrupt:
                self._cancel(ticket, backend)
                raise
            self._finish(mark, ticket, backend)
        finally:
            self.waiters.release()

    def _running(self) -> bool:
        return is_locked(paths.lock_file(self.job, "run"))

    def _attach(self, mark: str) -> "tuple[dict[str, Any], Backend] | None":
        """The job's present execution, if there is one: by its ticket, or by the lock that a running job holds."""
        ticket = read_json(self.folder / "ticket.json")
        if ticket is not None:
            backend = _backend(ticket["launcher"])
            alive = backend.alive(self.job, ticket)
        if ticket is None or not alive:
            process = read_json(self.folder / "process.json")
            if not self._running():
                return None
            # Run by an inline launcher, or the waiter died between submitting and writing the ticket.
            state = read_json(self.folder / "state.json") or {}
            ticket = {**(process or {}), "fingerprint": state.get("fingerprint"), "launcher": "local"}
            backend = _backend("local")
        assert ticket is not None
        if ticket["fingerprint"] != mark:
            raise PipelineError(
                f"{self.job.name}: is running with other parameters or inputs ({backend.where(ticket)}); "
                "wait until it ends or stop it"
            )
        print(f"{self.job.name}: attached to the running job ({backend.where(ticket)})", flush=True)
        return ticket, backend

    def _submit(self, mark: str, inputs: Mapping[str, manifest.Input]) -> "tuple[dict[str, Any], Backend]":
        from pipeline.entry import JobEntry

        unfinished.check(self.job, self.params, mark, inputs)
        self.folder.mkdir(parents=True, exist_ok=True)
        attempts.close(self.job)
        for name in (publish.EXIT, "process.json", "progress.json"):
            (self.folder / name).unlink(missing_ok=True)
        if not (self.folder / "state.json").exists():
            write_json(
                self.folder / "state.json",
                {"fingerprint": mark, "made_with": unfinished.made_with(self.job, self.params, inputs), "attempts": []},
            )
            paths.log_file(self.job).unlink(missing_ok=True)
        attempt = uuid.uuid4().hex[:12]
        entry = JobEntry(
            root=str(paths.root()),
            scale=self.job.scale,
            stage=self.job.stage,
            axes=tuple(self.job.axes.items()),
            fingerprint=mark,
            attempt=attempt,
            launcher=self.launcher,
        )
        backend = _backend(self.launcher)
        known = {"launcher": self.launcher, "fingerprint": mark, "attempt": attempt, "submitted": time.time()}
        ticket = {**known, **in_child(lambda: backend.submit(self.job, entry))}
        write_json(self.folder / "ticket.json", ticket, durable=True)
        log = paths.relative(paths.log_file(self.job))
        print(f"{self.job.name}: submitted ({backend.where(ticket)}), log in {log}", flush=True)
        return ticket, backend

    def _wait(self, ticket: dict[str, Any], backend: "Backend") -> None:
        while backend.alive(self.job, ticket):
            self._show()
            time.sleep(backend.poll_s)
        if self._bar:
            print("\r\033[K", end="", flush=True)

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._shown < (0.5 if self._bar else LINE_SECONDS):
            return
        self._shown = now
        state = read_json(self.folder / "progress.json")
        if state is not None:
            line = describe(self.job.name, state)
            print(f"\r\033[K{line}" if self._bar else line, end="" if self._bar else "\n", flush=True)

    def _cancel(self, ticket: dict[str, Any], backend: "Backend") -> None:
        """Stops the job, unless somebody else waits for it too."""
        if not self.waiters.acquire(wait=False):
            print(f"{self.job.name}: left running: another process waits for it", file=sys.stderr)
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave the job running
        print(f"{self.job.name}: cancelling the job ({backend.where(ticket)})", file=sys.stderr, flush=True)
        backend.cancel(self.job, ticket)
        print(f"{self.job.name}: cancelled", file=sys.stderr, flush=True)

    def _finish(self, mark: str, ticket: dict[str, Any], backend: "Backend") -> None:
        with self.ticket_lock.held():
            if publish.staged(self.job, mark):
                publish.publish(self.job)
                print(f"{self.job.name}: done", flush=True)
                return
            if not self.folder.exists() and publish.published(self.job, mark):
                return  # another waiter was quicker
            note = publish.exit_note(self.job, ticket)
        if note is not None and note["status"] != "ok":
            raise StoppedError(note["message"]) if note["status"] == "stopped" else PipelineError(note["message"])
        mark_died()
        raise PipelineError(self._post_mortem(backend.cause(self.job, ticket), ticket))

    def _post_mortem(self, cause: str, ticket: dict[str, Any]) -> str:
        from pipeline.backends import submit_folder
        from pipeline.rendezvous import first_failure

        failed = first_failure(self.job)  # which of several processes
        cause = f"{failed} ({cause})" if failed else cause
        log = paths.log_file(self.job)
        process = read_json(self.folder / "process.json") or {}
        if process.get("attempt") != ticket.get("attempt"):
            # It died before it came to its own log: what it said is in submitit's.
            log = next(iter(sorted(submit_folder(self.job).glob("*_log.out"))), log)
        lines = tail(log)
        where = f"log: {paths.relative(log)}" if lines else "it wrote no log"
        text = f"{self.job.name}: {cause}; run it again to resume from its last checkpoint ({where})"
        return text + "".join(f"\n  | {line}" for line in lines)


@contextmanager
def deferred_signals() -> Iterator[list[str]]:
    """Notes Ctrl-C and SIGTERM instead of acting on them: a job must not be submitted and its ticket not written."""
    late: list[str] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {
        kind: signal.signal(kind, lambda signum, frame: late.append(signal.Signals(signum).name)) for kind in kinds
    }
    try:
        yield late
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def in_child(submit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Calls `submit` in a forked process, so that the one that waits never loads submitit (13 MB)."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_IGN)
        try:
            answer: dict[str, Any] = {"ticket": submit()}
        except PipelineError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": publish.explain(error, "cannot submit:")}
        except BaseException as error:
            answer = {"error": f"cannot submit: {type(error).__name__}: {' '.join(str(error).split())}"}
        with os.fdopen(writable, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise PipelineError("cannot submit: the submitting process was killed; run the same command again")
    answer = json.loads(text)
    if "error" in answer:
        raise PipelineError(answer["error"])
    ticket: dict[str, Any] = answer["ticket"]
    return ticket


def mark_died() -> None:
    """Has the MLflow runs of dead processes marked, by a process of its own: this one stays small."""
    if os.environ.get("SCM_TRACKING") == "off":
        return
    command = [sys.executable, "-c", "from pipeline.replay import replay; replay()"]
    try:
        subprocess.run(command, cwd=paths.root(), timeout=60, capture_output=True, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        words = f"could not be marked in the tracking store ({type(error).__name__})"
        print(f"warning: the run {words}; later: python -m pipeline status --replay", file=sys.stderr)


def tail(log: "os.PathLike[str]", lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, up to where a traceback starts (the sentence for the user has its gist)."""
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.path.getsize(log) - 16384))
            text = f.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.partition("Traceback (most recent call last):")[0].splitlines()[-lines:]


def _backend(launcher: str) -> "Backend":
    from pipeline import backends

    if launcher == "slurm":
        from pipeline.slurm import Slurm

        return Slurm()
    return backends.Local()
