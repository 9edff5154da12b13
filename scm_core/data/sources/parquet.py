# SPDX-License-Identifier: Apache-2.0
"""Image files in Parquet shards, as Hugging Face stores image data sets: the columns image {bytes, path} and label."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scm_core.data.sources.pixels import ImageError
from scm_core.disk import BadFileError

NAME = re.compile(r"train-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet")
GET = "get it again"


def parquet_files(folder: Path) -> list[Path]:
    """The shards train-00000-of-00294.parquet, … in `folder`, in order; BadFileError if some of them are missing."""
    found = {}
    for path in sorted(folder.glob("train-*.parquet")):
        match = NAME.fullmatch(path.name)
        if match is None:
            raise BadFileError(f"{path}: its name is not train-00000-of-00294.parquet, or of that form; rename it")
        found[int(match[1])] = path, int(match[2])
    if not found:
        return []
    total = next(iter(found.values()))[1]
    missing = [k for k in range(total) if k not in found]
    if missing:
        raise BadFileError(
            f"{folder}: train-{missing[0]:05d}-of-{total:05d}.parquet is missing ({len(missing)} of {total} shards are); get them"
        )
    return [found[k][0] for k in range(total)]


def parquet_images(files: Sequence[Path], labels: int) -> tuple[Rows, list[str], list[int]]:
    """Return what reads the rows of the shards, their names (the paths in them, or file and row) and their labels.

    Raises BadFileError for a shard that is damaged or has other columns, and for a label that is not in 0…labels − 1.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    starts, names, values = [0], [], []
    for path in files:
        try:
            table = pq.ParquetFile(path).read(columns=["image.path", "label"])
            paths = table.column("image").combine_chunks().field("path").to_pylist()
            found = table.column("label").to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise BadFileError(f"{path}: is no readable Parquet file ({_line(error)}): {GET}") from error
        except KeyError as error:
            raise BadFileError(f"{path}: has no columns image {{bytes, path}} and label ({error}): {GET}") from error
        for row, label in enumerate(found):
            if not isinstance(label, int) or not 0 <= label < labels:
                raise BadFileError(f"{path}: row {row} has the label {label!r}, expected 0…{labels - 1}")
        names += [known or f"{path.name}:{row}" for row, known in enumerate(paths)]
        values += found
        starts.append(len(names))
    if len(set(values)) != labels:
        raise BadFileError(f"{files[0].parent}: its rows have {len(set(values))} labels, labels: {labels} expected")
    return Rows(files, starts), names, values


class Rows:
    """The bytes of image files by row, `starts[k]` being the first of file k; the row group that was read last stays in memory."""

    def __init__(self, files: Sequence[Path], starts: Sequence[int]) -> None:
        self.files, self.starts = files, starts
        self._file: tuple[int, Any, list[int]] | None = None  # number, opened file, first rows of its groups
        self._group: tuple[int, int, Any] | None = None  # file, group, its bytes

    def read(self, index: int) -> bytes:
        """The bytes in a row; ImageError if its page is damaged or it holds none."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        k = bisect.bisect_right(self.starts, index) - 1
        row = index - self.starts[k]
        try:
            if self._file is None or self._file[0] != k:
                opened = pq.ParquetFile(self.files[k])
                firsts = [0]
                for group in range(opened.num_row_groups):
                    firsts.append(firsts[-1] + opened.metadata.row_group(group).num_rows)
                self._file = k, opened, firsts
            _, opened, firsts = self._file
            group = bisect.bisect_right(firsts, row) - 1
            if self._group is None or self._group[:2] != (k, group):
                table = opened.read_row_group(group, columns=["image.bytes"])
                self._group = k, group, table.column("image").combine_chunks().field("bytes")
            data = self._group[2][row - firsts[group]].as_py()
        except (pa.ArrowException, OSError) as error:
            raise ImageError(f"cannot be read ({_line(error)})") from error
        if data is None:
            raise ImageError("is empty")
        return data


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
