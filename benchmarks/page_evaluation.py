# SPDX-License-Identifier: Apache-2.0
"""The page that `bench_evaluation.py` makes of its numbers: ratios, extrapolations, targets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

DIM, NEIGHBOURS, POINTS = 2048, 3, 20
FULL = 50_000
TARGETS = {"trace": 3.0, "pairs": 4.0, "sweep": 3.0}  # times faster
MEMORY_TARGET, GPU_TARGET = 1.5, 2.0  # GB, seconds
NAMES = {
    "ours": "ours",
    "prepared": "ours, reference and moments known",
    "FID": "ours, FID",
    "torch-fidelity": "torch-fidelity",
    "prdc": "prdc",
}
Points = Sequence[tuple[int, float]]  # (N, what was measured there)


def described(on: dict[str, Any]) -> str:
    """The provenance as words."""
    packages = ", ".join(f"{name} {number}" for name, number in on["packages"].items())
    return (
        f"{on['device']}, torch {on['torch']}, {packages}, one thread, load average {on['load']} on {on['cores']} cores"
    )


def by_square(points: Points, count: int = FULL) -> float:
    """Seconds at `count` samples: bN + cN² through the first and the last size."""
    (n, first), *_, (m, last) = points
    return count * by_line([(n, first / n), (m, last / m)], count)


def by_line(points: Points, count: int = FULL) -> float:
    """Seconds or MB at `count` samples, by the line through the first and the last size."""
    (n, first), *_, (m, last) = points
    return first + (last - first) * (count - n) / (m - n)


def by_parabola(points: Points) -> float:
    """MB at FULL samples, by the parabola through three sizes."""
    total = 0.0
    for n, value in points:
        total += value * math.prod((FULL - m) / (n - m) for m, _ in points if m != n)
    return total


def verdicts(ratios: Points, target: float) -> str:
    """The same at each N."""
    return ", ".join(f"{judged(ratio >= target)} at {count:,}" for count, ratio in ratios)


def judged(kept: bool) -> str:
    """What the page says of a target."""
    return "met" if kept else "missed"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    return "\n".join([
        "# What the metrics cost",
        "",
        f"Features of {DIM} dimensions in float32, k = {NEIGHBOURS}. Times in seconds. At {FULL:,} samples: extrapolated.",
        "",
        *fid_page(report["fid"]),
        *pairs_page(report["pairs"]),
        *sweep_page(report["fid"], report["pairs"]),
        *memory_page(report["memory"]),
        *gpu_page(report["gpu"]),
    ])  # fmt: skip


def fid_page(result: dict[str, Any]) -> list[str]:
    """FID's trace term."""
    seconds = result["trace_s"]
    ratio = seconds["torch-fidelity"] / seconds["ours"]
    lines = [
        "## FID",
        "",
        f"Measured on {described(result['on'])}.",
        "",
        f"The trace term: torch-fidelity {seconds['torch-fidelity']:.2f} (eigenvalues of the product), ours {seconds['ours']:.2f} (those "
        f"of a symmetric one, with the reference's root, {result['root_s']:.2f} once): **{ratio:.1f} times faster** (target "
        f"{TARGETS['trace']:.0f}: {judged(ratio >= TARGETS['trace'])}). The two FIDs differ by {result['difference']:.0e} of them.",
        "",
        "All of FID from features. Ours has standard error and bias, too; torch-fidelity was given the reference's statistics.",
        "",
        "| N | ours, once | ours, each set | torch-fidelity, each set |",
        "|---|---|---|---|",
    ]
    keys = ("once", "ours", "torch-fidelity")
    lines += [f"| {row['count']:,} | " + " | ".join(f"{row[key]:.1f}" for key in keys) + " |" for row in result["rows"]]
    far = (by_line(series(result["rows"], lambda row, key=key: row[key])) for key in keys)
    return [*lines, f"| {FULL:,} | " + " | ".join(f"{value:.0f}" for value in far) + " |", ""]


def series(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Points:
    """A value of each row, with the row's N."""
    return [(row["count"], value(row)) for row in rows]


def pairs_page(result: dict[str, Any]) -> list[str]:
    """Precision, recall, density, coverage and KID."""
    rows = result["rows"]
    ways = [way for way in NAMES if way in rows[0]["seconds"]]
    found = {way: series(rows, lambda row, way=way: row["seconds"][way]) for way in ways}
    lines = [
        "## Precision, recall, density, coverage, KID",
        "",
        f"Measured on {described(result['on'])}. torch-fidelity: PRC and KID (one subset of everything), no density and coverage; prdc: "
        "no KID; ours: all five"
        + (
            ", with products in bfloat16 and float32 where there are more samples than dimensions."
            if result["on"]["bfloat16"]
            else "."
        ),
        "",
        "| N × N | " + " | ".join(NAMES[way] for way in ways) + " |",
        "|---|" + "---|" * len(ways),
    ]
    lines += [
        f"| {row['count']:,} | " + " | ".join(f"{row['seconds'][way]:.2f}" for way in ways) + " |" for row in rows
    ]
    lines += [f"| {FULL:,} | " + " | ".join(f"{by_square(found[way]):.0f}" for way in ways) + " |", ""]
    for way in ways:
        if way in ("ours", "prepared"):
            continue
        ratios = series(rows, lambda row, way=way: row["seconds"][way] / row["seconds"]["ours"])
        ready = series(rows, lambda row, way=way: row["seconds"][way] / row["seconds"]["prepared"])
        far = by_square(found[way]) / by_square(found["ours"])
        worst = {key: max(row["differences"][way][key] for row in rows) for key in rows[0]["differences"][way]}
        lines += [
            f"- Times faster than {way}: "
            + ", ".join(f"**{ratio:.1f}** at {count:,}" for count, ratio in ratios)
            + f", {far:.1f} at {FULL:,} (target {TARGETS['pairs']:.0f}: {verdicts(ratios, TARGETS['pairs'])}); "
            "with what is known of the reference and of the set "
            + ", ".join(f"{ratio:.1f} at {count:,}" for count, ratio in ready)
            + ". Largest differences: "
            + ", ".join(f"{key} {difference:.0e}" for key, difference in worst.items())
            + ".",
        ]
    equal = all(difference == 0 for row in rows for difference in row["differences"]["float64"].values())
    sizes = ", ".join(f"{row['count']:,}" for row in rows)
    lines.append(
        f"- Precision, recall, density and coverage of ours are those of products in float64 at {sizes}"
        + (", to the last sample: what differs above is the others' rounding." if equal else ": **NOT**.")
    )
    if "prdc" not in ways:
        lines.append("- prdc was not installed: not measured.")
    return [*lines, ""]


def sweep_page(of_fid: dict[str, Any], of_pairs: dict[str, Any]) -> list[str]:
    """Many sets against one reference, from the parts above."""
    counts = (*(row["count"] for row in of_pairs["rows"] if row["count"] > DIM), FULL)
    fids = {key: series(of_fid["rows"], lambda row, key=key: row[key]) for key in ("once", "ours", "torch-fidelity")}
    times = {
        "prepared": series(of_pairs["rows"], lambda row: row["seconds"]["prepared"]),
        "ours": series(of_pairs["rows"], lambda row: row["seconds"]["ours"]),
        "torch-fidelity": series(of_pairs["rows"], lambda row: row["seconds"]["torch-fidelity"]),
    }
    lines = [
        f"## A sweep of {POINTS} sets",
        "",
        f"Added up from the two tables above: FID and pairs of {POINTS} sets, what the reference needs once.",
        "",
        "| N | ours, once | ours, each set | ours | torch-fidelity, each set | torch-fidelity | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for n in counts:
        part = {key: by_line(points, n) for key, points in fids.items()}
        pair = {key: by_square(points, n) for key, points in times.items()}
        once, each = part["once"] + pair["ours"] - pair["prepared"], part["ours"] + pair["prepared"]
        theirs = part["torch-fidelity"] + pair["torch-fidelity"]
        ratios.append(POINTS * theirs / (once + POINTS * each))
        cells = [once, each, once + POINTS * each, theirs, POINTS * theirs]
        lines.append(f"| {n:,} | " + " | ".join(f"{cell:.0f}" for cell in cells) + f" | **{ratios[-1]:.1f}** |")
    found = verdicts(list(zip(counts, ratios, strict=True)), TARGETS["sweep"])
    return [*lines, "", f"Target {TARGETS['sweep']:.0f} times faster: {found}.", ""]


def memory_page(result: dict[str, Any]) -> list[str]:
    """Peaks and what they come to."""
    peaks = result["peaks"]
    counts = [count for count, _ in peaks["ours"]]
    size = 2 * FULL * DIM * 4 / 2**30
    lines = [
        "## Memory",
        "",
        "Peak of a fresh process in MB, less what it has before it makes features. Counted: both sets of features "
        f"(2 × N × {DIM} × 4 bytes, {size:.2f} GB at {FULL:,}) and all that is computed. Ours for pairs and for FID come one after the "
        f"other. Measured on {described(result['on'])}.",
        "",
        "| way | " + " | ".join(f"N = {count:,}" for count in counts) + f" | {FULL:,}, GB |",
        "|---|" + "---|" * (len(counts) + 1),
    ]
    own = ("ours", "FID")
    far = {way: (by_line(points[1:]) if way in own else by_parabola(points)) / 1024 for way, points in peaks.items()}
    for way, points in peaks.items():
        cells = [f"{peak:.0f}" for _, peak in points]
        lines.append(f"| {NAMES[way]} | " + " | ".join([*cells, f"{far[way]:.2f}"]) + " |")
    verdict = judged(max(far[way] for way in own) < MEMORY_TARGET)
    return [*lines, "", f"Ours grows with N, the others with N². Target {MEMORY_TARGET} GB: {verdict}.", ""]


def gpu_page(result: dict[str, Any] | None) -> list[str]:
    """The GPU, or that there was none."""
    if result is None:
        return ["## GPU", "", f"Not measured: there was no GPU. Target {GPU_TARGET:.0f} s at {FULL:,}: open.", ""]
    kept = judged(result["seconds"] <= GPU_TARGET)
    return [
        "## GPU",
        "",
        f"{FULL:,} × {FULL:,} pairs on {result['on']['device']}, torch {result['on']['torch']}: {result['seconds']:.2f} s (target "
        f"{GPU_TARGET:.0f} s: {kept}) after {result['once_s']:.2f} s once for the reference; peak {result['peak_gb']:.1f} GB.",
        "",
    ]
