# SPDX-License-Identifier: Apache-2.0
"""Mutated params files either load or are refused in one sentence that names a key; nothing else ever happens."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import __main__, launch, registry
from pipeline.params import Params, ParamsError, load, read_yaml, validate

ROOT = Path(__file__).resolve().parents[2]
ORIGINAL = read_yaml(ROOT / "params.yaml")
TEXT = (ROOT / "params.yaml").read_text()
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's, ten times as fast

WORDS = st.sampled_from(
    ["lr", "lrr", "demo", "small", "linear", "sct", "latent_guided", "", "0.1", "1e-3", "a.b", "[key]"]
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([-(10**400), 10**400, 2**53, 2**64, -1, 0, 64]),
    st.floats(width=64),
    WORDS,
    st.text(max_size=5),
    st.lists(st.one_of(st.none(), st.integers(-2, 3), st.floats(0, 3), st.text(max_size=2)), max_size=4),
    st.dictionaries(WORDS, st.one_of(st.none(), st.integers(), st.text(max_size=2)), max_size=3),
)  # fmt: skip


def keys_of(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key in nested sections and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from keys_of(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The parameters with one to three keys deleted, renamed, added, or given another value."""
    data = copy.deepcopy(ORIGINAL)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(keys_of(data))
        if not paths:
            break
        *above, last = draw(st.sampled_from(paths))
        parent: Any = data
        for key in above:
            parent = parent[key]
        what = draw(st.sampled_from(["delete", "replace", "replace", "rename", "add"]))
        if what == "delete":
            del parent[last]
        elif what == "replace" or isinstance(parent, list):
            parent[last] = draw(VALUES)
        elif what == "rename":
            parent[draw(st.one_of(st.text(max_size=6), st.just(f"{last}x")))] = parent.pop(last)
        else:
            parent[draw(st.one_of(WORDS, st.text(max_size=6)))] = draw(VALUES)
    return data


def check_sentence(text: str) -> None:
    """One line, beginning with the file and a key (or saying that the file as a whole is wrong), then words."""
    assert text.isprintable(), text
    assert len(text) < 600, text
    file_as_a_whole = r"not valid YAML|must hold keys|not UTF-8"
    assert re.match(rf"params\.yaml: (?:\S.*?: \S.*|(?:{file_as_a_whole}).*)$", text), text


def check(params: Params) -> None:
    """What loads is complete: every job can be expanded, priced and described."""
    for job in registry.jobs(params):
        assert registry.settings(job, params).keys() or job.stage in ("reference", "evaluations", "report")
        assert job.resources.seconds > 0


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutated())
@example({})
@example({"scale": "demo", "scales": {}})
@example({"scale": [], "scales": {"demo": None}})
def test_mutated_parameters_load_or_are_refused_in_one_sentence(data: dict[str, Any]) -> None:
    try:
        params = validate(data)
    except ParamsError as error:
        check_sentence(str(error))
    else:
        check(params)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated())
def test_the_command_line_says_one_sentence(
    data: dict[str, Any], repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "params.yaml").write_text(yaml.dump(data, Dumper=DUMPER, allow_unicode=True), encoding="utf-8")
    monkeypatch.setenv("SCM_ROOT", str(repository))
    started: list[str] = []
    monkeypatch.setattr(launch, "run", lambda job, params, launcher: started.append(job.name) or 0)
    code = __main__.main(["run", "teacher", "scale=demo", "slot=latent_guided", "size=S"])
    output = capsys.readouterr()
    if code == 0:
        assert started == ["teacher-latent_guided-S"]
    else:
        assert code == 2
        assert started == []
        assert output.out == ""
        assert re.fullmatch(r"error: \S[^\n]*\n", output.err), output.err


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mangled_text_loads_or_is_refused_in_one_sentence(repository: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(TEXT)))
    cut = data.draw(st.integers(0, 40))
    new = data.draw(
        st.one_of(st.text(max_size=8), st.sampled_from(["\t", "&a ", "*a", "{", "]", "- ", ": ", "!!int ", "|\n"]))
    )
    path = repository / "params.yaml"
    path.write_bytes((TEXT[:start] + new + TEXT[start + cut :]).encode("utf-8", "surrogatepass"))
    try:
        check(load(path))
    except ParamsError as error:
        check_sentence(str(error))
