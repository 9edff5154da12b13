# SPDX-License-Identifier: Apache-2.0
"""The paper's headline claims as reports/claims.csv has them (`pipeline.claims.COLUMNS`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cells import read_rows
from pipeline.webpage.tables import Link, run_links

HOLDS, FAILS, OPEN = "holds", "fails", "open"
MARKS = {HOLDS: "✓", FAILS: "✗", OPEN: "?"}


@dataclass(frozen=True)
class Claim:
    """One of them, judged."""

    id: str
    statement: str
    paper: str
    ours: str
    error: str
    rule: str
    verdict: str
    """In the report's words."""
    why: str
    data: str
    """What it was measured on, and in which features; empty for a count."""
    runs: Sequence[Link]

    @property
    def kind(self) -> str:
        """How the verdict is coloured and marked."""
        word = self.verdict.lower()
        if word.startswith("hold"):
            return HOLDS
        return FAILS if word.startswith(("does not", "fail")) else OPEN

    @property
    def mark(self) -> str:
        """A sign beside the colour."""
        return MARKS[self.kind]


def read_claims(file: Path, known: Mapping[str, str]) -> list[Claim]:
    """The rows of claims.csv; a column that is not there is empty."""
    return [
        Claim(
            row.get("id", ""),
            row.get("statement", ""),
            row.get("paper", ""),
            row.get("ours", ""),
            row.get("standard_error", ""),
            row.get("rule", ""),
            row.get("verdict", ""),
            row.get("why", ""),
            ", in ".join(filter(None, (row.get("dataset", ""), row.get("features", "")))),
            run_links(row, known),
        )
        for row in read_rows(file)
    ]


def summary(claims: Sequence[Claim]) -> list[tuple[str, str, int]]:
    """Kind, verdict in words and number of claims, the good news first."""
    counts = {(claim.kind, claim.verdict): 0 for kind in MARKS for claim in claims if claim.kind == kind}
    for claim in claims:
        counts[claim.kind, claim.verdict] += 1
    return [(kind, verdict, count) for (kind, verdict), count in counts.items()]
