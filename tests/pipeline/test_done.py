# SPDX-License-Identifier: Apache-2.0
"""What counts as done: files as they were made, from the present parameters and inputs; and what the engines are told."""

import json
from typing import Any

import pytest

STATES = "import json; from pipeline import done, params, registry; p = params.load(scale={scale!r});" + (
    "print(json.dumps(done.states(registry.jobs(p), p)))"
)


def states(repo: Any, scale: str = "tiny") -> dict[str, str]:
    """Job name to its state."""
    return json.loads(repo.python(STATES.format(scale=scale)).out)


def use_scale(repo: Any, before: str, after: str) -> None:
    """Sets the scale on top of params.yaml."""
    file = repo.root / "params.yaml"
    file.write_text(file.read_text().replace(f"scale: {before}", f"scale: {after}"))


def sync(repo: Any, news: str = "{}") -> Any:
    """`python -m pipeline sync` with engines that only say what they are told; of DVC's status they say `news`."""
    code = f"""
        import subprocess
        import sys
        from pipeline import __main__, sync
        def run(root, *words):
            print(*words)
            return subprocess.CompletedProcess(words, 0, {news!r} if "status" in words else "", "")
        sync._run = run
        sys.exit(__main__.main(["sync"]))
    """
    return repo.python(code)


def test_a_report_of_another_scale_is_not_current(repo: Any) -> None:
    """reports/ is shared: what the scale that ran last has written there is not what the one before it made."""
    stages = ("first", "second", "report")
    assert [repo.run(stage).code for stage in stages] == [0, 0, 0]
    assert [states(repo)[stage] for stage in stages] == ["done"] * 3
    use_scale(repo, "tiny", "other")
    assert [repo.run(stage).code for stage in stages] == [0, 0, 0]
    assert [states(repo, "other")[stage] for stage in stages] == ["done"] * 3
    assert [states(repo, "tiny")[stage] for stage in stages] == ["done", "done", "changed"]


@pytest.mark.parametrize(
    ("harm", "state"),
    [
        (lambda folder: (folder / "data.bin").write_bytes(b"cut off"), "changed"),
        (lambda folder: (folder / "sub/note.txt").unlink(), "changed"),
        (lambda folder: (folder / "manifest.json").unlink(), "to do"),
    ],
)
def test_files_that_are_not_those_that_were_made(repo: Any, harm: Any, state: str) -> None:
    assert [repo.run(stage).code for stage in ("first", "second")] == [0, 0]
    harm(repo.root / "runs/tiny/first")
    after = states(repo)
    assert (after["first"], after["second"]) == (state, "outdated")


def test_sync_reads_every_file_before_it_tells_the_engines(repo: Any) -> None:
    """A file of the right size and other content is what only the digests show."""
    for stage in ("first", "second", "report"):
        repo.run(stage)
    (repo.root / "dvc.yaml").write_text("stages: {first: {}, report: {}}\n")
    told = sync(repo)
    assert (told.code, told.out) == (2, "")
    assert (
        "dvc.yaml: has no second, so it is not that of scale tiny; make it with: python -m pipeline dvc > dvc.yaml"
        in told.err
    )
    (repo.root / "dvc.yaml").write_text("stages: {first: {}, second: {}, report: {}}\n")
    told = sync(repo)
    assert (told.code, told.err) == (0, "")
    assert "dvc commit --force --quiet\n" in told.out, "all that dvc.yaml has is done"
    (repo.root / "dvc.yaml").write_text("stages: {first: {}, second: {}, report: {}, steps: {}}\n")
    told = sync(repo)
    assert "dvc commit" not in told.out, "DVC knows them already"
    told = sync(repo, """{"first": ["changed command"], "report": [{"changed outs": {}}], "steps": []}""")
    assert "dvc commit --force --quiet first report\n" in told.out
    assert "snakemake runs/tiny/first runs/tiny/second reports/table.csv reports/table.md --touch" in told.out
    assert "scale tiny: 3 jobs known to Snakemake and DVC" in told.out
    assert "6 are left to do, first steps (to do)" in told.out
    (repo.root / "runs/tiny/first/data.bin").write_bytes(bytes(256))
    assert states(repo)["first"] == "done"
    told = sync(repo)
    assert told.code == 2
    assert "runs/tiny/first/data.bin has changed since it was made" in told.err
    assert "python -m pipeline run first scale=tiny, then `make sync`" in told.err
    assert told.out == ""


def test_sync_without_anything_done(repo: Any) -> None:
    told = sync(repo)
    assert told.code == 2
    assert "no job of scale tiny is up to date, first first (to do)" in told.err
