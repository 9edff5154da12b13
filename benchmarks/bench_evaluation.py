# SPDX-License-Identifier: Apache-2.0
"""What the metrics cost beside torch-fidelity's and prdc's: `python benchmarks/bench_evaluation.py [SECTION …]`.

Features of 2048 dimensions, made up: rectified, correlated, with a decaying spectrum. Everything runs on one thread of one core, and what
is compared takes turns in one run. fid: the trace term, and the whole of it for one set. pairs: precision, recall, density, coverage and
KID of whole sets (what torch-fidelity calls PRC and KID, with one subset of everything; prdc has no KID). memory: the peak of a fresh
process. gpu: 50,000 × 50,000 pairs, where there is a GPU. The page adds up a sweep of 20 sets against one reference.

At 50,000 samples: times of pairs by bN + cN² through what was measured, those of FID by a line, memory by a line or a parabola. Without the
package prdc its column stays empty. Sections that are not named keep their results. Writes benchmarks/results/evaluation.json and .md.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from report import RESULTS, arguments_of, write  # noqa: E402
from torch import Tensor  # noqa: E402

from scm_core.compat import prepare_torchvision  # noqa: E402
from scm_core.evaluate import FeatureSet, Moments, frechet_with_error, manifold_metrics  # noqa: E402
from scm_core.evaluate.frechet import trace_term, triangular_root  # noqa: E402
from scm_core.evaluate.products import fast_bfloat16  # noqa: E402

prepare_torchvision()

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric  # noqa: E402

DIM, NEIGHBOURS, POINTS = 2048, 3, 20
SIZES = (2000, 5000, 10_000)
FID_SIZES = (3000, 10_000)  # more than the dimensions, and far apart: most of it does not depend on N
FULL = 50_000
ROUNDS = {2000: 3, 5000: 2, 10_000: 1}
TARGETS = {"trace": 3.0, "pairs": 4.0, "sweep": 3.0}  # times faster
MEMORY_TARGET, GPU_TARGET = 1.5, 2.0  # GB, seconds
MEMORY_SIZES = (2500, 3750, 5000)
NAMES = {
    "ours": "ours",
    "prepared": "ours, reference and moments known",
    "FID": "ours, FID",
    "torch-fidelity": "torch-fidelity",
    "prdc": "prdc",
}

Points = Sequence[tuple[int, float]]  # (N, what was measured there)


def features(count: int, seed: int) -> Tensor:
    """Float32 features (count, DIM) in the manner of pooled activations: not negative, correlated, of decaying spectrum."""
    decay = torch.arange(1, DIM // 4 + 1) ** -0.7
    mixing = torch.randn(DIM // 4, DIM, generator=torch.Generator().manual_seed(0)) * decay[:, None]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, DIM // 4, generator=generator) @ mixing
    return (x + 0.2 * torch.randn(count, DIM, generator=generator) + 0.1 + 0.02 * (seed % 2)).relu()


# ---- the ways ----------------------------------------------------------------------------------------------------------------


def ours(real: Tensor, fake: Tensor) -> dict[str, float]:
    """All in one, with what a reference needs once."""
    return manifold_metrics(real, fake, NEIGHBOURS)._asdict()


def fidelity(real: Tensor, fake: Tensor) -> dict[str, float]:
    """torch-fidelity's PRC and KID."""
    prc = prc_features_to_metric(fake, real, prc_neighborhood=NEIGHBOURS, verbose=False)
    kid = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=len(real), verbose=False)
    return {
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
        "kid": kid[KEY_METRIC_KID_MEAN],
    }


def prdc(real: Tensor, fake: Tensor) -> dict[str, float]:
    """The package of Naeem et al."""
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compute_prdc(real.numpy(), fake.numpy(), NEIGHBOURS)


def in_float64(real: Tensor, fake: Tensor) -> dict[str, float]:
    """What all decisions should be: from products in float64, whose errors are far below those of the others."""
    real, fake = real.double(), fake.double()

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(a.square().sum(dim=1)[:, None] + b.square().sum(dim=1), a, b.T, alpha=-2)

    radii = [squared(x, x).fill_diagonal_(0).kthvalue(NEIGHBOURS + 1).values for x in (real, fake)]
    between = squared(fake, real)
    in_real, in_fake = between <= radii[0], between <= radii[1][:, None]
    return {
        "precision": int(in_real.any(dim=1).sum()) / len(fake),
        "recall": int(in_fake.any(dim=0).sum()) / len(real),
        "density": int(in_real.sum()) / (NEIGHBOURS * len(fake)),
        "coverage": int(in_real.any(dim=0).sum()) / len(real),
    }


WAYS: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {
    "ours": ours,
    "torch-fidelity": fidelity,
    **({"prdc": prdc} if find_spec("prdc") else {}),
}


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, the ways taking turns, and their results."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            taken[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(seconds), 3) for name, seconds in taken.items()}, results


def fid() -> dict[str, Any]:
    """FID's trace term, and all of FID at two sizes."""
    rows = [fid_row(count) for count in FID_SIZES]
    real, fake = (fid_features_to_statistics(features(FID_SIZES[0], seed).double()) for seed in (0, 1))
    cov1, cov2 = (torch.from_numpy(of["sigma"]) for of in (fake, real))
    root, made = in_turns({"root": lambda: triangular_root(cov2)}, 1)
    seconds, results = in_turns(
        {
            "ours": lambda: trace_term(cov1, made["root"]),
            "torch-fidelity": lambda: fid_statistics_to_metric(fake, real, False)[KEY_METRIC_FID],
        },
        3,
    )
    mean = torch.from_numpy(fake["mu"] - real["mu"])
    distance = float(mean @ mean + cov1.trace() + cov2.trace()) - 2 * results["ours"]
    difference = abs(distance / results["torch-fidelity"] - 1)
    return {"on": provenance(), "rows": rows, "root_s": root["root"], "trace_s": seconds, "difference": difference}


def fid_row(count: int) -> dict[str, Any]:
    """What FID takes once for a reference, and for each set; torch-fidelity is given the reference's statistics, too."""
    real, fake = features(count, 0), features(count, 1)
    theirs = fid_features_to_statistics(real)
    moments = Moments.of(real)
    once, made = in_turns({"moments": lambda: Moments.of(real), "root": lambda: triangular_root(moments.cov)}, 1)
    seconds, _ = in_turns(
        {
            "ours": lambda: frechet_with_error(fake, moments, made["root"]),
            "torch-fidelity": lambda: fid_statistics_to_metric(fid_features_to_statistics(fake), theirs, False),
        },
        2,
    )
    return {"count": count, "once": round(sum(once.values()), 3), **seconds}


def pairs() -> dict[str, Any]:
    """All ways at each size."""
    return {"on": provenance(), "rows": [pairs_row(count) for count in SIZES]}


def pairs_row(count: int) -> dict[str, Any]:
    """All ways, and ours once more with a prepared reference."""
    real, fake = features(count, 0), features(count, 1)
    reference, moments = FeatureSet(real, moments=Moments.of(real)), Moments.of(fake)
    reference.prepare(NEIGHBOURS)
    ways: dict[str, Callable[[], Any]] = {name: partial(way, real, fake) for name, way in WAYS.items()}
    ways["prepared"] = partial(manifold_metrics, reference, fake, NEIGHBOURS, moments=moments)
    seconds, results = in_turns(ways, ROUNDS[count])
    results["float64"] = in_float64(real, fake)
    differences = {
        name: {key: abs(results["ours"][key] - value) for key, value in results[name].items()}
        for name in (*WAYS, "float64")
        if name != "ours"
    }
    return {"count": count, "seconds": seconds, "values": results["ours"], "differences": differences}


# ---- memory ------------------------------------------------------------------------------------------------------------------


def fid_of(real: Tensor, fake: Tensor) -> Any:
    """Our FID with its error and bias."""
    return frechet_with_error(fake, Moments.of(real))


def memory() -> dict[str, Any]:
    """Peak MB of each way at each size, in a process of its own."""
    ways = [way for way in NAMES if way in WAYS or way == "FID"]
    peaks = {way: [(count, peak_of_child(way, count)) for count in MEMORY_SIZES] for way in ways}
    return {"on": provenance(), "peaks": peaks}


def peak_of_child(way: str, count: int) -> float:
    """Peak memory in MB in a process of its own, in which what is freed goes back at once."""
    command = [sys.executable, __file__, "--peak", way, str(count)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def print_peak(name: str, count: int) -> None:
    """The measuring process: its peak with both sets of features, less what it had before there were any."""
    way = fid_of if name == "FID" else WAYS[name]
    way(features(100, 0), features(100, 1))  # the libraries' own buffers
    before = resident("VmRSS")
    real, fake = features(count, 0), features(count, 1)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making them
    way(real, fake)
    print(round(resident("VmHWM") - before, 1))


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (at its highest) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def gpu() -> dict[str, Any] | None:
    """Seconds of 50,000 × 50,000 pairs with a prepared reference; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    real, fake = (features(FULL, seed).cuda() for seed in (0, 1))
    reference = FeatureSet(real)
    torch.cuda.reset_peak_memory_stats()

    def measured(run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return round(time.perf_counter() - start, 3)

    once = measured(lambda: reference.prepare(NEIGHBOURS))
    seconds = [measured(lambda: manifold_metrics(reference, fake, NEIGHBOURS)) for _ in range(4)]
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    on = {**provenance(), "device": torch.cuda.get_device_name()}
    return {"on": on, "once_s": once, "seconds": statistics.median(seconds[1:]), "peak_gb": peak}


# ---- the page ----------------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """What a result was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = {name: version(name) for name in ("torch-fidelity", "prdc") if find_spec(name.replace("-", "_"))}
    return {
        "device": names[0] if names else platform.processor() or platform.machine(),
        "bfloat16": fast_bfloat16(torch.device("cpu")),
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__, "packages": packages,
    }  # fmt: skip


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


SECTIONS: dict[str, Callable[[], Any]] = {
    "fid": fid, "pairs": pairs, "memory": memory, "gpu": gpu,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the metrics beside torch-fidelity's and prdc's.")
    chosen = arguments_of(parser, "section", SECTIONS).sections
    path = RESULTS / "evaluation.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, section in SECTIONS.items():
        if name in chosen or not chosen or name not in report:
            report[name] = section()
    # JSON has words as keys: as they will be read again.
    report = json.loads(json.dumps({name: report[name] for name in SECTIONS}))
    write(report, path, markdown)
    print(markdown(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for every library
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], int(sys.argv[3]))
    else:
        main()
