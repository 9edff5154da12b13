# SPDX-License-Identifier: Apache-2.0
"""Reading the documents: their code blocks, the commands in them, and the tables of docs/method.md.

A block of ```bash or ```python is a promise that it works, and is run (tests/workflow/test_demo_smoke.py), unless a
comment that readers do not see stands before it, with the reason: <!-- not run: needs a cluster -->.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EVERY_DOCUMENT = sorted({*DOCUMENTS, *ROOT.glob("*.md")})
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
PROGRAMS = ("make", "snakemake", "dvc", "mlflow", "python")


class Block(NamedTuple):
    """A fenced block of a document: where it begins, what it is, and why it is not run (None: it is)."""

    document: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = document.read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(document, line, match["language"], match["text"], match["reason"]))
    return found


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return BLOCK.sub("", document.read_text())


def spans(document: Path) -> list[str]:
    """The code within the prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(document))


def runnable(document: Path) -> list[Block]:
    """The blocks of a document that are run, in their order."""
    return [block for block in blocks(document) if block.language in ("bash", "python") and block.reason is None]


def commands(text: str) -> list[list[str]]:
    """The command lines of a shell script that call one of our programs, in words; the texts of here-documents are none."""
    text = re.sub(r"<<'?(\w+)'?[^\n]*\n.*?^\1$", "", text, flags=re.M | re.S)
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        words.whitespace_split, words.commenters = True, "#"
        parts: list[list[str]] = [[]]
        for word in words:
            if re.fullmatch(r"[&|;<>]+", word):
                parts.append([])
            else:
                parts[-1].append(word)
        found += [part for part in parts if part and part[0] in PROGRAMS]
    return found


def named_commands(document: Path) -> list[list[str]]:
    """The commands of a document, run or not, in blocks and in its prose; those with … or <…> in them are patterns."""
    scripts = [block.text for block in blocks(document) if block.language == "bash"]
    inline = [span for span in spans(document) if span.split()[0] in PROGRAMS and len(span.split()) > 1]
    # in prose, `python -m pipeline import` is the command's name, and `dvc plots` that of several
    inline = [f"{span} --help" if re.fullmatch(r"python -m pipeline \w+", span) else span for span in inline]
    inline = [f"{span} show" if re.fullmatch(r"dvc (metrics|plots)", span) else span for span in inline]
    patterns = re.compile(r"…|<\w+>")
    return [words for script in [*scripts, *inline] if not patterns.search(script) for words in commands(script)]


class Row(NamedTuple):
    """A row of docs/method.md: the links of code and tests as (name, file), and the keys of params.yaml."""

    equation: str
    code: list[tuple[str, Path]]
    tests: list[tuple[str, Path]]
    keys: list[str]


def method_rows() -> list[Row]:
    """The rows of docs/method.md that map something (those of the notation do not)."""
    document = ROOT / "docs/method.md"
    found = []
    for line in document.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or len(cells) != 5 or cells[0] == "paper":
            continue
        links = [
            [(name, (document.parent / file).resolve()) for name, file in re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", cell)]
            for cell in cells[2:4]
        ]
        found.append(Row(cells[1], links[0], links[1], re.findall(r"`([^`]+)`", cells[4])))
    return found
