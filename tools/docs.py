# SPDX-License-Identifier: Apache-2.0
"""Build the documentation into build/docs: the pages of docs/ and of the repository, and a page of every module: `make docs`.

The pages are read from a copy, build/docs-source, in which README.md is the front page, links to modules lead to their
pages, and links to other files to copies of them. Every warning of Sphinx is an error.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE, OUT = ROOT / "build/docs-source", ROOT / "build/docs"
PACKAGES = ("scm_core", "pipeline")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)

# Caption and pages of the parts of the contents; a star stands for what is not named before it.
CONTENTS = (
    ("Using it", ("docs/tutorial", "docs/data", "docs/runs", "docs/evaluation", "docs/scales", "docs/*")),
    ("The paper", ("docs/method", "docs/reproduction")),
    ("Working on it", ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG", "THIRD_PARTY")),
    ("Measured", ("results/*", "benchmarks/results/*")),
    ("API reference", tuple(f"api/{package}" for package in PACKAGES)),
)


def pages() -> list[Path]:
    """The Markdown pages, relative to the repository."""
    found = [path for folder in (".", "docs", "benchmarks/results") for path in (ROOT / folder).glob("*.md")]
    return sorted(path.relative_to(ROOT) for path in [*found, *ROOT.glob("results/*/*.md")])


def module_of(path: Path) -> str | None:
    """The page of the API reference that a file or folder of the packages has."""
    if (
        path.parts[:1]
        and path.parts[0] in PACKAGES
        and (path.suffix == ".py" or (ROOT / path / "__init__.py").exists())
    ):
        parts = path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


def staged_link(page: Path, text: str, target: str) -> str:
    """A link of a page as it has to be in the copy; ValueError if it leads nowhere."""
    if re.match(r"[a-z]+:|#", target):
        return f"[{text}]({target})"
    file, hash_, anchor = target.partition("#")
    path = Path(os.path.normpath(page.parent / file))
    if not (ROOT / path).exists():
        raise ValueError(f"{page}: the link to {target} leads nowhere")
    if path in pages():
        name = "index.md" if path == Path("README.md") else path.as_posix()
        return f"[{text}](/{name}{hash_}{anchor})"
    if module := module_of(path):
        return f"[{text}](/api/{module}.rst)"
    if (ROOT / path).is_dir():
        return text
    (STAGE / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, STAGE / path)
    return f"[{text}](/{path.as_posix()})"


def staged(page: Path) -> str:
    """The text of a page with its links as they have to be in the copy; code stays as it is."""
    parts = FENCE.split((ROOT / page).read_text())
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda link: staged_link(page, link[1], link[2]), part)
        for part in parts
    )


def contents() -> str:
    """The table of contents, for the front page."""
    given = {page.with_suffix("").as_posix() for page in pages()} | {f"api/{package}" for package in PACKAGES}
    named = [name for _, names in CONTENTS for name in names]
    text = ""
    for caption, names in CONTENTS:
        listed = []
        for name in names:
            folder = name.removesuffix("*")
            rest = sorted(page for page in given - set(named) if page.startswith(folder)) if folder != name else [name]
            listed += rest
        text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 2\n\n" + "\n".join(listed) + "\n```\n"
    return text


def main() -> int:
    """Build; the exit status is Sphinx's."""
    shutil.rmtree(STAGE, ignore_errors=True)
    shutil.rmtree(OUT, ignore_errors=True)
    for page in pages():
        name = Path("index.md") if page == Path("README.md") else page
        (STAGE / name).parent.mkdir(parents=True, exist_ok=True)
        (STAGE / name).write_text(staged(page) + (contents() if name.stem == "index" else ""))
    for picture in [*ROOT.glob("docs/images/*.png"), *ROOT.glob("results/*/*.png")]:
        place = STAGE / picture.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, place)
    env = os.environ | {"SPHINX_APIDOC_OPTIONS": "members,show-inheritance", "PYTHONPATH": str(ROOT)}
    for package in PACKAGES:
        apidoc = ["-m", "sphinx.ext.apidoc", "-q", "--separate", "--module-first", "--no-toc", "-o", str(STAGE / "api")]
        subprocess.run([sys.executable, *apidoc, str(ROOT / package)], cwd=ROOT, env=env, check=True)
    build = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(ROOT / "build/docs-trees")]
    done = subprocess.run([sys.executable, *build, str(STAGE), str(OUT)], cwd=ROOT, env=env, check=False)
    if done.returncode == 0:
        print(f"docs: {(OUT / 'index.html').relative_to(ROOT)}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
