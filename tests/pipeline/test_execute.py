# SPDX-License-Identifier: Apache-2.0
"""Executing one job: what is published, what never is, and what the user reads when it goes wrong."""

import json
import os
import re
import signal
import subprocess
from typing import Any

import pytest


def manifest(repo: Any, stage: str) -> dict[str, Any]:
    """The manifest of a published folder."""
    return json.loads((repo.root / f"runs/tiny/{stage}/manifest.json").read_text())


def test_a_published_output(repo: Any) -> None:
    assert repo.run("first").code == 0
    made = manifest(repo, "first")
    assert made["run"] == f"first-{made['fingerprint'][:8]}"
    assert made["params"] == {"seed": 0, "value": 1}
    assert made["files"]["data.bin"]["bytes"] == 256
    assert set(made["files"]) == {"data.bin", "sub/note.txt"}
    record = json.loads((repo.root / "runs/tiny/.records/first.json").read_text())
    assert record["run"] == made["run"]
    assert record["peak_memory_mb"] > 0
    assert not (repo.work / "first").exists()


def test_manifest_and_run_id_are_deterministic(repo: Any) -> None:
    """The same computation again, and by another launcher, gives the same bytes."""
    assert repo.run("first").code == repo.run("second").code == 0
    before = {stage: (repo.root / f"runs/tiny/{stage}/manifest.json").read_bytes() for stage in ("first", "second")}
    assert repo.run("first", "local").code == repo.run("second", "local").code == 0
    after = {stage: (repo.root / f"runs/tiny/{stage}/manifest.json").read_bytes() for stage in ("first", "second")}
    assert before == after


def test_parameters_and_inputs_decide_the_run_id(repo: Any) -> None:
    repo.run("first")
    repo.run("second")
    before = manifest(repo, "second")
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("value: 1", "value: 3"))
    repo.run("first")
    repo.run("second")
    after = manifest(repo, "second")
    assert before["run"] != after["run"]
    assert before["inputs"]["first"]["run"] != after["inputs"]["first"]["run"]
    assert (repo.root / "runs/tiny/second/size.txt").read_text() == "768"


def test_a_report(repo: Any) -> None:
    for stage in ("first", "second", "report"):
        assert repo.run(stage).code == 0
    text = (repo.root / "reports/table.csv").read_text()
    assert text == f"size,run\n256,{manifest(repo, 'second')['run']}\n"
    assert sorted(path.name for path in (repo.root / "reports").iterdir()) == ["table.csv", "table.md"]


def test_a_kill_leaves_no_output_and_the_next_run_resumes(repo: Any) -> None:
    repo.run("first")
    process = repo.start("steps")
    repo.wait_for(lambda: (repo.work / "steps/work/step").exists())
    repo.wait_for(lambda: int((repo.work / "steps/work/step").read_text()) >= 4)
    os.killpg(process.pid, signal.SIGKILL)
    assert not (repo.root / "runs/tiny/steps").exists()
    done = repo.run("steps")
    assert (done.code, done.err) == (0, "")
    starts = (repo.root / "runs/tiny/starts.txt").read_text().split()
    assert starts[0] == "0"
    assert int(starts[1]) >= 4
    assert [path.name for path in sorted((repo.root / "runs/tiny/steps").iterdir())] == ["manifest.json", "result"]


@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_a_resume_with_other_code_goes_on_and_says_so(repo: Any, launcher: str) -> None:
    """The fingerprint has no code in it: what goes on with other code than it began with is warned of and recorded."""
    repo.run("first")
    for command in (["init", "-q"], ["add", "driver.py"], ["commit", "-qm", "one"]):
        git(repo, *command)
    before = git(repo, "rev-parse", "HEAD")
    process = repo.start("steps")
    repo.wait_for(lambda: (repo.work / "steps/work/step").exists())
    repo.wait_for(lambda: int((repo.work / "steps/work/step").read_text()) >= 10)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with (repo.root / "pipeline/stages/steps.py").open("a") as file:
        file.write("# another way to do it\n")
    git(repo, "commit", "-q", "--allow-empty", "-m", "two")
    after = git(repo, "rev-parse", "HEAD")
    done = repo.run("steps", launcher)
    assert done.code == 0, done.err
    assert done.err.count("\n") == 1
    assert done.err.startswith("warning: steps: what it has so far was made by other code (code ")
    assert f"of commit {before[:7]} → " in done.err
    assert f"of commit {after[:7]}); remove runs/tiny/.work/steps to start over" in done.err
    starts = (repo.root / "runs/tiny/starts.txt").read_text().split()
    assert int(starts[1]) >= 10
    record = json.loads((repo.root / "runs/tiny/.records/steps.json").read_text())
    first, second = record["attempts"]
    assert (first["commit"], second["commit"]) == (before, after)
    assert first["code"] != second["code"]
    # Thirty steps of a tenth of a second, shared by two attempts: the record counts both.
    assert first["seconds"] >= 0.8
    assert second["seconds"] >= 0.5
    assert record["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.01)
    assert record["seconds"] >= 3
    trace = repo.python(
        "from pipeline import trace; import json; "
        "print(trace.commits(json.loads(open('runs/tiny/.records/steps.json').read())))"
    )
    assert trace.out == f"{before}, then {after}\n"


def git(repo: Any, *words: str) -> str:
    """What a git command prints in the repository."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    return subprocess.run(
        ["git", *who, *words], cwd=repo.root, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_checkpoints_of_other_parameters_are_set_aside(repo: Any) -> None:
    repo.run("first")
    process = repo.start("steps")
    repo.wait_for(lambda: (repo.work / "steps/work/step").exists())
    os.killpg(process.pid, signal.SIGKILL)
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("seed: 0, value: 1", "seed: 9, value: 1"))
    repo.run("first")
    done = repo.run("steps")
    assert done.code == 0
    assert "made with other parameters" in done.err
    assert (repo.root / "runs/tiny/starts.txt").read_text() == "0\n"
    assert len(list(repo.work.glob("steps.stale-*"))) == 1


@pytest.mark.parametrize("launcher", ["inline", "local"])
@pytest.mark.parametrize("changed", ["parameter", "code"])
def test_a_training_goes_on_with_other_settings_only_if_told_to(repo: Any, changed: str, launcher: str) -> None:
    """Refused in one sentence that names what changed, with nothing lost; with `resume.allow_changes` it goes on, and says so."""
    repo.run("first")
    process = repo.start("steps")
    repo.wait_for(lambda: (repo.work / "steps/work/step").exists())
    os.killpg(process.pid, signal.SIGKILL)
    (repo.work / "steps/work/checkpoints/step-00000001").mkdir(parents=True)  # what makes it a training
    file = repo.root / "params.yaml"
    if changed == "parameter":
        file.write_text(file.read_text().replace("seed: 0, value: 1", "seed: 0, value: 7"))
        repo.run("first")
        named = r"value 1 → 7"
    else:
        code = repo.root / "pipeline" / "costs.py"
        code.write_text(code.read_text() + "# other\n")
        named = r"code \w{8} of no commit → \w{8} of no commit"
    refused = repo.run("steps", launcher)
    assert refused.code == 1
    assert re.search(
        rf"^error: steps: its unfinished training was made with other settings: .*{named}", refused.err, re.M
    )
    assert "allow_changes" in refused.err
    assert "Traceback" not in refused.err
    assert (repo.work / "steps/work/step").exists()
    file.write_text(file.read_text() + "resume: {allow_changes: true}\n")
    done = repo.run("steps", launcher)
    assert done.code == 0, done.err
    assert "going on from it" in done.err
    starts = (repo.root / "runs/tiny/starts.txt").read_text().split()
    assert int(starts[-1]) > 0


@pytest.mark.parametrize("copied", [0, 1, 2])
def test_a_kill_while_a_report_is_published_leaves_it_not_current(repo: Any, copied: int) -> None:
    """After any number of its files: a mixture of old and new is never taken for the report."""
    for stage in ("first", "second", "report"):
        repo.run(stage)
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace("value: 1", "value: 3"))
    for stage in ("first", "second"):
        repo.run(stage)
    code = f"""
        import os, signal, sys
        from pipeline import done, execute, params, publish, registry
        loaded = params.load()
        jobs = registry.jobs(loaded)
        true_copy, copied = publish._copy_file, []
        def copy(source, target):
            if len(copied) == {copied}:
                print(done.states(jobs, loaded)["report"], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            copied.append(target.name)
            true_copy(source, target)
        publish._copy_file = copy
        execute.execute(registry.find(loaded, "report", {{}}), loaded)
    """
    killed = repo.python(code)
    assert (killed.code, killed.out) == (-signal.SIGKILL, "outdated\n")
    assert repo.run("report").code == 0
    assert (repo.root / "reports/table.csv").read_text().startswith("size,run\n768,")


@pytest.mark.parametrize("point", ["before the move", "after the move", "before the pointer goes"])
def test_a_kill_while_publishing(repo: Any, point: str) -> None:
    """Whenever the kill comes, the output is absent or whole, and the next run finishes without computing again."""
    spots = {
        "before the move": ("Path", "rename"),
        "after the move": ("publish", "write_json"),
        "before the pointer goes": ("Path", "unlink"),
    }
    owner, name = spots[point]
    code = f"""
        import os, signal
        from pathlib import Path
        from pipeline import execute, params, publish, registry
        loaded = params.load()
        job = registry.find(loaded, "first", {{}})
        true_publish = publish.publish
        def deadly(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        def at_the_end(job):
            {owner}.{name} = deadly
            true_publish(job)
        publish.publish = at_the_end
        execute.execute(job, loaded)
    """
    assert repo.python(code).code == -signal.SIGKILL
    folder = repo.root / "runs/tiny/first"
    if folder.exists():
        assert (folder / "manifest.json").exists()
        assert (folder / "data.bin").exists()
    stage = repo.root / "pipeline/stages/first.py"
    stage.write_text("def run(ctx):\n    raise RuntimeError('computed twice')\n")
    done = repo.run("first")
    assert done.code == 0, done.err
    assert (folder / "data.bin").exists()
    assert (repo.root / "runs/tiny/.records/first.json").exists()


def test_an_output_is_replaced_whole(repo: Any) -> None:
    folder = repo.root / "runs/tiny/first"
    folder.mkdir(parents=True)
    (folder / "left-over").write_text("old")
    assert repo.run("first").code == 0
    assert not (folder / "left-over").exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "data.bin").unlink(), "data.bin is missing"),
        (lambda f: (f / "data.bin").write_bytes(b"short"), "data.bin has 5 bytes where its manifest says 256"),
        (lambda f: (f / "data.bin").write_bytes(bytes(256)), "data.bin has changed since it was made"),
        (lambda f: (f / "manifest.json").unlink(), "input runs/tiny/first has no valid manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "input runs/tiny/first has no valid manifest.json"),
    ],
)
@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_bad_inputs_are_named(repo: Any, harm: Any, words: str, launcher: str) -> None:
    repo.run("first")
    harm(repo.root / "runs/tiny/first")
    done = repo.run("second", launcher)
    assert done.code == 1
    assert words in done.err
    assert "make it again with: python -m pipeline run first scale=tiny, then `make sync`\n" in done.err
    assert done.err.count("\n") == 1
    assert not (repo.root / "runs/tiny/second").exists()


def test_a_missing_input_is_named(repo: Any) -> None:
    done = repo.run("second")
    expected = (
        "error: second: input runs/tiny/first is missing; make it with: python -m pipeline run first scale=tiny\n"
    )
    assert (done.code, done.err) == (1, expected)


def test_a_stage_that_writes_nothing(repo: Any) -> None:
    done = repo.run("silent")
    assert done.code == 1
    assert done.err == "error: silent: the stage ended without writing anything; nothing is published\n"


@pytest.mark.parametrize("name", ["CheckpointError", "PlainValueError"])
def test_the_librarys_own_errors_are_quoted(repo: Any, name: str) -> None:
    """A ValueError class of scm_core was written for the user; any other exception is a fault of ours."""
    (repo.root / "scm_core/__init__.py").write_text("class CheckpointError(ValueError): pass\n")
    raised = (
        "scm_core.CheckpointError('step 5: damaged; delete it')" if name == "CheckpointError" else "ValueError('odd')"
    )
    (repo.root / "pipeline/stages/first.py").write_text(f"import scm_core\ndef run(ctx):\n    raise {raised}\n")
    done = repo.run("first")
    assert done.code == 1
    if name == "CheckpointError":
        assert done.err == "error: first: step 5: damaged; delete it\n"
    else:
        assert "ValueError: odd (traceback in runs/tiny/.logs/first.log)" in done.err


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_no_space_left(repo: Any, wrapped: bool, launcher: str) -> None:
    raised = (
        "RuntimeError('I/O error: No space left on device (os error 28)')"
        if wrapped
        else "OSError(28, 'No space left')"
    )
    (repo.root / "pipeline/stages/first.py").write_text(
        f"def run(ctx):\n    (ctx.out / 'part').write_text('x')\n    raise {raised}\n"
    )
    done = repo.run("first", launcher)
    assert done.code == 1
    assert "no space left" in done.err
    assert "free some, then run the same command again" in done.err
    assert done.err.count("\n") == 1
    assert not (repo.root / "runs/tiny/first").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.parametrize("launcher", ["inline", "local"])
def test_a_disk_that_is_really_full(repo: Any, launcher: str) -> None:
    runs = repo.root / "runs"
    runs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(runs)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        (repo.root / "pipeline/stages/first.py").write_text(
            "def run(ctx):\n    (ctx.out / 'big').write_bytes(bytes(2**21))\n"
        )
        done = repo.run("first", launcher)
        assert done.code == 1
        assert "no space left" in done.err
        assert "Traceback" not in done.err
        assert not (runs / "tiny/first").exists()
        # With the disk full from the start, not even the working folder can be made.
        (runs / "filler").write_bytes(bytes(2**20 - 2**15))
        with pytest.raises(OSError, match="No space"):
            (runs / "filler2").write_bytes(bytes(2**20))
        done = repo.run("steps" if False else "first", launcher)
        assert done.code == 1
        assert "no space left" in done.err
        assert "Traceback" not in done.err
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)


def test_a_second_inline_run_is_refused(repo: Any) -> None:
    process = repo.start("sleeper")
    pid = repo.pid("sleeper")
    second = repo.run("sleeper")
    process.terminate()
    process.wait(timeout=20)
    assert second.code == 1
    assert f"is already running (process {pid} on" in second.err


def test_ctrl_c_inline(repo: Any) -> None:
    process = repo.start("sleeper")
    repo.pid("sleeper")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (repo.root / "runs/tiny/sleeper").exists()


@pytest.mark.parametrize("fault", ["params.yaml: scale: unknown", "first: unknown stage"])
def test_a_queued_job_whose_parameters_became_invalid_leaves_word(repo: Any, fault: str) -> None:
    """params.yaml is read again where the job runs: what is wrong with it by then is told to whoever waits."""
    module, name, error = (
        ("params", "load", "ParamsError") if fault.startswith("params") else ("registry", "find", "RegistryError")
    )
    with (repo.root / f"pipeline/{module}.py").open("a") as file:
        file.write(
            f"\nfrom pipeline.errors import {error}\ndef {name}(*args, **kwargs):\n    raise {error}({fault!r})\n"
        )
    done = repo.python(
        f"""
        from pipeline.entry import JobEntry
        JobEntry({str(repo.root)!r}, "tiny", "first", (), "0" * 64, "an-attempt", "inline")()
        """
    )
    assert done.code == 1
    note = json.loads((repo.work / "first/exit.json").read_text())
    assert (note["attempt"], note["status"]) == ("an-attempt", "error")
    assert note["message"] == f"first: {fault}"
    assert f"error: {fault}" in (repo.root / "runs/tiny/.logs/first.log").read_text()


def test_the_repository_root(repo: Any) -> None:
    code = "from pipeline import paths; print(paths.root())"
    (repo.root / "deep/er").mkdir(parents=True)
    assert repo.python(f"import os; os.chdir('deep/er'); {code}").out.strip() == str(repo.root)
    assert repo.python(f"import os; os.chdir('/'); {code}", SCM_ROOT=str(repo.root)).out.strip() == str(repo.root)
    lost = repo.python(f"import os; os.chdir('/'); {code}")
    assert "no params.yaml here or above" in lost.err
