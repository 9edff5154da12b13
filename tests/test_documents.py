# SPDX-License-Identifier: Apache-2.0
"""The documents say what is so: every command parses, every target, path, link, function, test and key exists.

That the commands also work is shown in tests/workflow/test_demo_smoke.py, which runs them.
"""

import ast
import re
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import registry
from pipeline.__main__ import main
from pipeline.cli import Parser, axis_values
from pipeline.params import Params, load
from tests.documents import (
    DOCUMENTS,
    EVERY_DOCUMENT,
    ROOT,
    blocks,
    commands,
    method_rows,
    named_commands,
    prose,
    runnable,
    spans,
)

WORKING = ("README.md", "docs/tutorial.md", "docs/evaluation.md", "docs/runs.md", "docs/interop.md")


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("document", EVERY_DOCUMENT, ids=name_of)


@cache
def params() -> Params:
    return load(ROOT / "params.yaml", None)


@cache
def jobs() -> list[Any]:
    """The jobs of all scales."""
    return [job for scale in params().scales for job in registry.jobs(params(), scale)]


@cache
def outputs() -> set[str]:
    return {path.as_posix() for job in jobs() for path in job.outputs}


# -- the reader of documents itself


def test_commands_are_found_in_a_script() -> None:
    script = (
        "export A=1   # make nothing\npython -m pipeline plan --json | head && make test ARGS=\"-m 'not slow'\"\nls\n"
    )
    assert commands(script) == [["python", "-m", "pipeline", "plan", "--json"], ["make", "test", "ARGS=-m 'not slow'"]]
    assert commands("cat > x <<'END'\nmake nothing\nEND\nmake test\n") == [["make", "test"]]


def test_blocks_that_are_not_run_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# A\n```bash\nmake demo\n```\n\n<!-- not run: needs a cluster -->\n```bash\nsbatch\n```\n"
    )
    assert [(block.line, block.reason) for block in blocks(tmp_path / "a.md")] == [(2, None), (7, "needs a cluster")]
    (tmp_path / "b.md").write_text(
        "<!-- not run: one -->\n```bash\na\n```\nwords\n<!-- not run: two -->\n```bash\nb\n```\n"
    )
    assert [(block.line, block.reason) for block in blocks(tmp_path / "b.md")] == [(2, "one"), (7, "two")]


def test_marks_stand_before_a_block() -> None:
    """A mark anywhere else would be without effect."""
    for document in EVERY_DOCUMENT:
        marks = len(re.findall(r"^\s*<!-- *not run", document.read_text(), re.MULTILINE))
        assert marks == sum(block.reason is not None for block in blocks(document)), name_of(document)


def test_something_is_run() -> None:
    assert {name_of(document) for document in DOCUMENTS if runnable(document)} >= set(WORKING)


# -- commands


class Parsed(Exception):
    """What a command's parser has understood, instead of the command's work."""


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any] | None:
    """The options of a `python -m pipeline` command line; None if it takes none. Fails if it is refused."""

    def stop(name: str) -> Any:
        original = getattr(Parser, name)

        def parse(self: Parser, *arguments: Any) -> Any:
            options = original(self, *arguments)
            if self.prog == "python -m pipeline":  # the first parser, which looks for the command alone
                return options
            raise Parsed(vars(options))

        return parse

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(Parser, name, stop(name))
        try:
            code = main(words[3:])
        except Parsed as parsed:
            return dict(parsed.args[0])
        except SystemExit:  # --help
            return None
    pytest.fail(f"{' '.join(words)}: ended with {code}")


def check_pipeline(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Command, options, scale, stage and axes, the model or the target that a command of ours names."""
    if words[3] == "watch" and "--" in words:
        check(words[words.index("--") + 1 :], monkeypatch)
        words = words[: words.index("--")]
    options = understood(words, monkeypatch) or {}
    scale = options.get("scale")
    assert scale in {None, "NAME", "mine", *params().scales}, f"{words}: unknown scale"
    if words[3] == "run":
        axes = axis_values(options["axes"])
        known = params().with_scale(axes.pop("scale")) if "scale" in axes else params()
        registry.find(known, options["stage"], axes)
    models = {job.name for job in jobs() if job.stage in ("teacher", "student")}
    for run in [options.get("run"), options.get("a"), options.get("b"), *(options.get("runs") or [])]:
        if run is not None and re.match(r"(teacher|student)-", run) and scale != "mine":
            assert run in models, f"{words}: no scale has {run}"
    if options.get("target"):
        assert options["target"] in outputs() | {job.name for job in jobs()} | set(registry.STAGES), words


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """AssertionError, or the program's own error, for a command line that would be refused."""
    if words[:3] == ["python", "-m", "pipeline"]:
        check_pipeline(words, monkeypatch)
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            variable, equals, _ = word.partition("=")
            known = f"$({variable})" in makefile or f"${{{variable}" in (ROOT / "tools/setup.sh").read_text()
            assert known if equals else re.search(rf"^{word}:", makefile, re.MULTILINE), f"make has no {word}"
    elif words[0] == "snakemake":
        from snakemake.cli import parse_args

        if "cluster/slurm-native" in words and find_spec("snakemake_executor_plugin_slurm") is None:
            return  # an extra that is not in the lock; Snakemake knows no such executor without it
        _, options = parse_args(words[1:])
        known = outputs() | {path for output in outputs() for path in (f"{output}/",)}
        assert [target for target in options.targets if target not in known] == [], words
        config = dict(pair.split("=") for pair in options.config or [])
        assert config.keys() <= {"scale", "launcher"}, words
        assert config.get("scale") in {None, "mine", *params().scales}, words
    elif words[0] == "dvc":
        from dvc.cli import parse_args as parse_dvc

        parse_dvc(words[1:])


@every_document
def test_every_command_is_understood(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in named_commands(document):
        check(words, monkeypatch)


def test_a_wrong_command_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    wrong = [
        "python -m pipeline evaluat student-latent_guided-M-scd",
        "python -m pipeline evaluate student-latent_guided-M-scd --guidence 1.0",
        "python -m pipeline sample student-latent_guided-Q-scd -o a.png",
        "python -m pipeline watch -- snakemake --profile cluster/local reports/table9.csv",
        "make demonstration",
        "make demo SIZE=smoke",
        "snakemake --profile cluster/local --config scale=smok",
    ]
    for line in wrong:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check(line.split(), monkeypatch)
    with pytest.raises(Exception, match="unknown stage"):
        check(["python", "-m", "pipeline", "run", "teachers", "slot=latent_guided"], monkeypatch)


def test_the_readme_names_the_main_commands() -> None:
    named = named_commands(ROOT / "README.md")
    assert ["make", "demo"] in named
    assert ["make", "reproduce"] in named
    assert ["make", "test"] in named


# -- paths and links


def exists(path: str) -> bool:
    """Whether a path is in the repository, what a job makes, or what every run leaves."""
    path = re.sub(r"<\w+>", "*", path.rstrip("/").replace("<scale>", params().scale))
    if list(ROOT.glob(path)) or any(fnmatch(output, path) or output.startswith(f"{path}/") for output in outputs()):
        return True
    if (ROOT / f"{path}.example").is_file():  # what a user makes of it
        return True
    hidden = re.match(r"runs/(\w+/\.(work|logs|records|cache|lineage)(/|$)|\.squeue\.json$)", path)
    inside = any(path.startswith(f"{output}/") for output in outputs())
    return bool(hidden) or inside or path.startswith(("data/mine", "build/docs"))


@every_document
def test_every_path_exists_or_is_made(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        return  # it tells of what was
    tops = {path.name for path in ROOT.iterdir()} | {"runs", "reports"}
    paths = [
        span
        for span in spans(document)
        if re.fullmatch(r"[\w.<>-]+(/[\w.*<>-]+)+/?", span) and span.partition("/")[0] in tops and span[0] != "<"
    ]
    assert [path for path in paths if not exists(path)] == []


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and our Sphinx make them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{target}: is not there"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


def test_every_document_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [
        path.name for path in EVERY_DOCUMENT if path.name != "README.md" and f"{name_of(path)})" not in readme
    ] == []


# -- docs/method.md


@cache
def definitions(path: Path) -> set[str]:
    """The functions and classes of a file, and the methods of the latter as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return found


def known_key(key: str) -> bool:
    """Whether a slot of some scale has the key; a star stands for any name. A size's own numbers count as the slot's."""
    text = yaml.safe_load((ROOT / "params.yaml").read_text())

    def found(section: Any, parts: list[str]) -> bool:
        if not parts:
            return True
        if not isinstance(section, dict):
            return False
        heads = list(section) if parts[0] == "*" else [parts[0]]
        return any(head in section and found(section[head], parts[1:]) for head in heads)

    return any(found(slot, key.split(".")) for scale in text["scales"].values() for slot in scale["slots"].values())


def test_the_method_is_mapped() -> None:
    rows = method_rows()
    assert len(rows) > 50
    for row in rows:
        assert row.code, row.equation
        assert row.tests, row.equation
    assert not known_key("teacher.P_meen")


@pytest.mark.parametrize("row", method_rows(), ids=lambda row: row.equation)
def test_functions_tests_and_keys_of_the_method_exist(row: Any) -> None:
    for name, path in [*row.code, *row.tests]:
        assert name in definitions(path), f"{path.relative_to(ROOT)} has no {name}"
    for name, path in row.tests:
        assert name.startswith("test_"), name
        assert path.is_relative_to(ROOT / "tests"), path
    assert [key for key in row.keys if not known_key(key)] == []
