# SPDX-License-Identifier: Apache-2.0
"""Print the rows of a report table that this project measured: `python tools/show_table.py reports/table2.csv`."""

import csv
import sys
from pathlib import Path

COLUMNS = ["method", "size", "nfe", "fid", "fid_se", "guidance", "params", "dataset", "run"]


def main(path: Path) -> None:
    with path.open(newline="") as file:
        ours = [row for row in csv.DictReader(file) if row["run"]]
    lines = [COLUMNS, *([row[column] for column in COLUMNS] for row in ours)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
