# SPDX-License-Identifier: Apache-2.0
"""Measured rows as text and as one tidy file, in which a point that was measured before is replaced, and another one added."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import PipelineError
from pipeline.files import Lock, replace_file, sha256_text
from scm_core.evaluate.selection import minimum, spread

SHOWN = ("subject", "space", "steps", "guidance", "ema", "nimg", "nfe", "samples", "first_index")
KEY = ["subject", "key", "space", "samples", "reference_sha256"]  # what makes two rows the same measurement

# Names are text, whatever they look like: a folder 007, a key of decimal digits.
TEXT = (
    "subject",
    "slot",
    "size",
    "method",
    "space",
    "key",
    "dataset",
    "extractor",
    "weights_sha256",
    "reference_sha256",
    "commit",
)


def shown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as a table, without columns that say the same in all, which stand above it; of several sets also mean, SD and minimum."""
    table = pd.DataFrame(rows)
    constant = [name for name in SHOWN if table[name].nunique(dropna=False) == 1]
    head = ", ".join(f"{name} {table[name].iloc[0]}" for name in constant if not pd.isna(table[name].iloc[0]))
    varying = [name for name in SHOWN if name not in constant]
    text = table[[*varying, *columns]].to_string(index=False, float_format="{:.4f}".format, na_rep="")
    return "\n".join([head, text, *spreads(table)])


def spreads(table: pd.DataFrame) -> list[str]:
    """A line for each point that was measured on several sets."""
    axes = ["subject", "space", "steps", "guidance", "ema", "nimg", "samples"]
    lines = []
    for names, group in table.groupby(axes, dropna=False, sort=False):
        if len(group) > 1:
            values = group.fid.tolist()
            what = ", ".join(f"{axis} {name}" for axis, name in zip(axes, names, strict=True) if not pd.isna(name))
            lines.append(f"{what}: {spread(values)}, {minimum(values)}")
    return lines


def without_repetition(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows without those of a measurement that is there already: the same run named twice is no second set of samples."""
    return list({tuple(str(row[name]) for name in KEY): row for row in rows}.values())


def merge(rows: Sequence[Mapping[str, Any]], file: Path, locks: Path) -> None:
    """Put rows into a .csv or .parquet file, whole or not at all; those of the same measurement are replaced, all others kept.

    `locks` is a folder for the lock that keeps two processes apart.
    """
    table = pd.DataFrame(rows)
    locks.mkdir(parents=True, exist_ok=True)
    with Lock(locks / f"{sha256_text(str(file.resolve()))[:16]}.lock").held():
        if file.exists():
            before = read(file)
            known = pd.MultiIndex.from_frame(table[KEY].astype(str))
            kept = before[~pd.MultiIndex.from_frame(before[KEY].astype(str)).isin(known)]
            table = pd.concat([kept, table]) if len(kept) else table
        content = io.BytesIO()
        if file.suffix == ".csv":
            table.to_csv(content, index=False)
        else:
            table.to_parquet(content, index=False)
        replace_file(file, content.getvalue(), durable=False)


def read(file: Path) -> pd.DataFrame:
    """The rows in a file of `merge`; PipelineError if it is something else."""
    try:
        table = _read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's errors are ValueErrors
        raise PipelineError(f"{file}: cannot be read as measured rows ({error}); give another --output") from None
    for name in KEY:
        if name not in table:
            raise PipelineError(f"{file}: has no column {name}, so it holds something else; give another --output")
    return table


def _read_csv(file: Path) -> pd.DataFrame:
    numbers = [name for name in pd.read_csv(file, nrows=0).columns if name not in TEXT]
    empty = {name: [""] for name in numbers}
    return pd.read_csv(file, dtype=dict.fromkeys(TEXT, str), keep_default_na=False, na_values=empty)
