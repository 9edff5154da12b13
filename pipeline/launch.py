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
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import manifest, paths, publish
from pipeline.children import deferred_signals, in_child
from pipeline.errors import NotYetError, PipelineError, StoppedError
from pipeline.files import Lock, host, is_alive, is_locked, read_json, write_json
from pipeline.logs import last_words
from pipeline.progress import describe

if TYPE_CHECKING:
    from pipeline.backends import Backend
    from pipeline.params import Params
    from pipeline.registry import Job

LAUNCHERS = ("inline", "local", "slurm")
REPEAT_S = 300.0  # until the same words about waiting are said again
POLL_MOST_S = 1.0  # between two looks at a job that has run for minutes
PAUSE_S, PAUSE_MOST_S = 2.0, 60.0  # between two tries to submit, the first and the longest


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
        self.engine = engine()
        self._shown = time.monotonic()
        self._said = ""
        self._bar = sys.stdout.isatty() and os.environ.get("SCM_PROGRESS") != "plain"

    def run(self) -> None:
        """Submits or attaches, waits, publishes; raises `PipelineError` when the job fails."""
        self.waiters.acquire(shared=True)
        try:
            submissions = 0
            while True:
                inputs = manifest.verify_inputs(self.job)
                mark = manifest.fingerprint(self.job, self.params, inputs)
                with self.ticket_lock.held():
                    found = self._begin(mark, inputs, submissions)
                if found is None:
                    return
                ticket, backend = found
                try:
                    self._wait(ticket, backend)
                except KeyboardInterrupt:
                    self._cancel(ticket, backend)
                    raise
                if self._finish(mark, ticket, backend):
                    return
                submissions = int(ticket.get("again", 0)) + 1
        finally:
            self.waiters.release()

    def _begin(
        self, mark: str, inputs: Mapping[str, manifest.Input], submissions: int
    ) -> "tuple[dict[str, Any], Backend] | None":
        """The job's execution, found or submitted, however long the scheduler is away; None: it had ended, and is published now."""
        pause = PAUSE_S
        while True:
            later = ""
            with deferred_signals() as late:
                if publish.staged(self.job, mark) and not self._running():
                    print(f"{self.job.name}: had ended meanwhile; publishing what it staged", flush=True)
                    publish.publish(self.job)
                    return None
                try:
                    found = self._attach(mark)
                    if found is None and publish.staged(self.job, mark):  # it ended between the two looks
                        raise NotYetError(f"{self.job.name}: has just ended")
                    ticket, backend = found or self._submit(mark, inputs, submissions)
                except NotYetError as error:
                    later = " ".join(str(error).removeprefix(f"{self.job.name}: ").split())
            if late:
                if not later:
                    self._cancel(ticket, backend)
                raise KeyboardInterrupt(late[0])
            if not later:
                return ticket, backend
            self._say(f"{self.job.name}: {later}; trying again until it works")
            self._check_engine("nothing was submitted")
            time.sleep(pause)
            pause = min(2 * pause, PAUSE_MOST_S)

    def _running(self) -> bool:
        return is_locked(paths.lock_file(self.job, "run"))

    def _attach(self, mark: str) -> "tuple[dict[str, Any], Backend] | None":
        """The job's present execution, if there is one: by its ticket, or by the lock that a running job holds.

        Raises `NotYetError` while that is not known: a submission was cut off, or a cancelled job has not ended yet.
        """
        ticket = read_json(self.folder / "ticket.json")
        if ticket is not None:
            backend = _backend(ticket["launcher"])
            if "job_id" in ticket and ticket["job_id"] is None:
                found = backend.find(self.job, ticket)
                ticket = None if found is None else {**ticket, **found}
                if ticket is not None:
                    write_json(self.folder / "ticket.json", ticket, durable=True)
        alive = ticket is not None and backend.alive(self.job, ticket)
        if ticket is not None and alive and ticket.get("cancelled"):
            raise NotYetError(f"{self.job.name}: was cancelled ({backend.where(ticket)}), and has not ended yet")
        if ticket is None or not alive:
            process = read_json(self.folder / "process.json") or {}
            if not self._running():
                return None
            if ticket is not None and process.get("attempt") == ticket["attempt"]:
                raise NotYetError(f"{self.job.name}: its last process is still ending ({backend.where(ticket)})")
            if not process or (process.get("host") == host() and not is_alive(process)):
                raise NotYetError(f"{self.job.name}: is just being started by another process")
            # Run by an inline launcher.
            state = read_json(self.folder / "state.json") or {}
            ticket = {**process, "fingerprint": state.get("fingerprint"), "launcher": "local"}
            backend = _backend("local")
        if ticket["fingerprint"] != mark:
            raise PipelineError(
                f"{self.job.name}: is running with other parameters or inputs ({backend.where(ticket)}); "
                "wait until it ends or stop it"
            )
        print(f"{self.job.name}: attached to the running job ({backend.where(ticket)})", flush=True)
        return ticket, backend

    def _submit(
        self, mark: str, inputs: Mapping[str, manifest.Input], submissions: int
    ) -> "tuple[dict[str, Any], Backend]":
        from pipeline.submission import begin, settle, submitting

        entry, ticket = begin(self.job, self.params, mark, inputs, self.launcher)
        ticket |= {"again": submissions}
        backend = _backend(self.launcher)

        def submit() -> dict[str, Any]:
            with submitting(self.job):
                found = backend.submit(self.job, entry)
                settle(self.job, ticket, found)
            return found

        try:
            ticket |= in_child(submit)
        except NotYetError:
            raise  # the ticket stays: what sbatch has said may not be what it has done
        except PipelineError:
            (self.folder / "ticket.json").unlink(missing_ok=True)
            raise
        log = paths.relative(paths.log_file(self.job))
        print(f"{self.job.name}: submitted ({backend.where(ticket)}), log in {log}", flush=True)
        return ticket, backend

    def _wait(self, ticket: dict[str, Any], backend: "Backend") -> None:
        began = time.monotonic()
        while backend.alive(self.job, ticket):
            self._show(ticket, backend)
            self._check_engine(f"{backend.where(ticket)} goes on, and the next run attaches to it")
            # Half a percent late is not late, and each look takes time from the job where both share a core.
            time.sleep(max(backend.poll_s, min(POLL_MOST_S, (time.monotonic() - began) / 200)))
        if self._bar:
            print("\r\033[K", end="", flush=True)

    def _check_engine(self, left: str) -> None:
        """Leaves when the engine that waits for this process was killed: it would take what is published now for half-written."""
        if self.engine and not is_alive(self.engine):
            raise PipelineError(f"{self.job.name}: whoever started this has died; {left}")

    def _show(self, ticket: dict[str, Any], backend: "Backend") -> None:
        now, words = time.monotonic(), backend.queued(ticket)
        if words:
            self._say(f"{self.job.name}: {words}")
            return
        if now - self._shown < (0.5 if self._bar else backend.line_s):
            return
        self._shown, self._said = now, ""
        state = read_json(self.folder / "progress.json")
        if state is not None:
            line = describe(self.job.name, state)
            if self._bar:
                print(f"\r\033[K{line}", end="", flush=True)
            else:
                print(line if ticket["launcher"] == "local" else f"{line} ({backend.where(ticket)})", flush=True)

    def _say(self, line: str) -> None:
        """A line about waiting, once, and again after some minutes."""
        now = time.monotonic()
        if line != self._said or now - self._shown >= REPEAT_S:
            self._said, self._shown = line, now
            print(line, flush=True)

    def _cancel(self, ticket: dict[str, Any], backend: "Backend") -> None:
        """Stops the job, unless somebody else waits for it too."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave the job running
        if not self.waiters.acquire(wait=False):
            print(f"{self.job.name}: left running: another process waits for it", file=sys.stderr)
            return
        print(f"{self.job.name}: cancelling the job ({backend.where(ticket)})", file=sys.stderr, flush=True)
        backend.cancel(self.job, ticket)
        if (self.folder / "ticket.json").exists():  # else it has ended meanwhile, and is published
            write_json(self.folder / "ticket.json", {**ticket, "cancelled": time.time()}, durable=True)
        print(f"{self.job.name}: cancelled", file=sys.stderr, flush=True)

    def _finish(self, mark: str, ticket: dict[str, Any], backend: "Backend") -> bool:
        """Publishes; False: the cluster stopped the job and will not start it again, so that it is to be submitted once more."""
        with self.ticket_lock.held():
            if publish.staged(self.job, mark):
                with (
                    deferred_signals()
                ):  # what is published is done: an engine that is told otherwise would throw it away
                    publish.publish(self.job)
                print(f"{self.job.name}: done", flush=True)
                return True
            if not self.folder.exists() and publish.published(self.job, mark):
                return True  # another waiter was quicker
            note = publish.exit_note(self.job, ticket)
        process = read_json(self.folder / "process.json") or {}
        if process.get("attempt") == ticket.get("attempt"):
            ticket = {**ticket, "node": process.get("node")}
        if note is not None and note["status"] in ("error", "cancelled"):
            words = f"; {backend.where(ticket)}{last_words(self.job, ticket)}" if ticket["launcher"] == "slurm" else ""
            raise PipelineError(f"{note['message']}{words}")
        if backend.again(self.job, ticket):
            print(
                f"{self.job.name}: {backend.where(ticket)} was stopped by the cluster; submitting it again", flush=True
            )
            return False
        if note is not None and note["status"] == "stopped" and ticket["launcher"] == "local":
            raise StoppedError(note["message"])
        mark_died()
        from pipeline.rendezvous import first_failure
        from pipeline.submission import output

        failed = first_failure(self.job, output(self.job, ticket))  # which of several processes
        cause = f"{failed} ({backend.cause(self.job, ticket)})" if failed else backend.cause(self.job, ticket)
        raise PipelineError(
            f"{self.job.name}: {cause}; run it again to resume from its last checkpoint{last_words(self.job, ticket)}"
        )


def engine() -> dict[str, Any] | None:
    """The engine that started this process, if it said who it is and runs on this machine: as `identify` describes it."""
    known = json.loads(os.environ.get("SCM_ENGINE", "null"))
    return known if known and known.get("host") == host() else None


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


def _backend(launcher: str) -> "Backend":
    from pipeline import backends

    if launcher == "slurm":
        from pipeline.slurm import Slurm

        return Slurm()
    return backends.Local()
