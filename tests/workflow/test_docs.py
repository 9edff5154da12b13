# SPDX-License-Identifier: Apache-2.0
"""The documentation builds without a warning, and without a network; its links lead to the pages of modules."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    """tools/docs.py."""
    spec = importlib.util.spec_from_file_location("docs", ROOT / "tools/docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_in_the_copy(docs: ModuleType) -> None:
    page = Path("docs/method.md")
    assert docs.staged_link(page, "a", "https://arxiv.org") == "[a](https://arxiv.org)"
    assert docs.staged_link(page, "a", "../README.md#results") == "[a](/index.md#results)"
    assert docs.staged_link(page, "a", "data.md") == "[a](/docs/data.md)"
    assert docs.staged_link(page, "a", "../scm_core/tangent.py") == "[a](/api/scm_core.tangent.rst)"
    assert docs.staged_link(page, "a", "../scm_core/objectives/__init__.py") == "[a](/api/scm_core.objectives.rst)"
    assert docs.staged_link(page, "a", "../reports/paper/") == "a"
    with pytest.raises(ValueError, match=r"docs/method\.md: the link to \.\./nowhere\.py leads nowhere"):
        docs.staged_link(page, "a", "../nowhere.py")


def test_every_page_is_in_the_contents(docs: ModuleType) -> None:
    listed = re.findall(r"^(\w\S*)$", docs.contents(), re.MULTILINE)
    assert sorted(listed) == sorted(set(listed)), "twice"
    pages = {page.with_suffix("").as_posix() for page in docs.pages()} - {"README"}
    assert set(listed) == pages | {"api/scm_core", "api/pipeline"}


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser")),
    reason="Sphinx or MyST is not installed: make setup",
)
def test_it_builds_without_a_warning(repo_copy: Path, user_env: Callable[[Path], dict[str, str]]) -> None:
    env = user_env(repo_copy) | dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "tools/docs.py"]
    done = subprocess.run(command, cwd=repo_copy, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    out = repo_copy / "build/docs"
    front = (out / "index.html").read_text()
    assert 'href="docs/method.html"' in front
    method, tangent = (out / "docs/method.html").read_text(), (out / "api/scm_core.tangent.html").read_text()
    assert 'href="../api/scm_core.tangent.html"' in method
    assert 'id="scm_core.tangent.scm_tangent"' in tangent
    assert "‖g‖" in tangent
