# SPDX-License-Identifier: Apache-2.0
"""What the derivative of attention costs in time and memory, and how exact it is: `python benchmarks/bench_attention.py [SECTION …]`.

Time: plain attention, the same with a tangent (`chunked`, and `triton` on a GPU), and torch.func.jvp through torch's math path, which holds
the whole score matrix, take turns in one run; the forward alone, and forward and backward together. Memory: the peak of a fresh process
over the length. Accuracy: the Triton kernel (in its interpreter where there is no GPU), `chunked` and the package jvp_flash_attention, if
that is installed, against float64; without the package its rows of an earlier run stay.

Sections: times, memory, accuracy. Those that are not named keep their results, and every result says what it was measured on. Writes
benchmarks/results/attention.json and .md.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from report import RESULTS, arguments_of, processor, write  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from scm_core.nn.attention import MAX_HEAD_DIM, attention  # noqa: E402
from scm_core.nn.dual import Dual  # noqa: E402

LENGTHS = (1024, 2048, 4096, 8192)
SHAPES = ((16, 4, 64, 64), (8, 4, 256, 64), (8, 1, 256, 256), (1, 4, 1024, 64), (1, 1, 4096, 64))  # B, heads, L, d
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Half precision on a CPU is emulated: one format shows what `chunked` costs that computes in float32. Triton's interpreter is not timed.
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)
# Products of L×L×d: two for the value; five for the tangent, one of which is the scores again (six over blocks of keys); five for the
# backward, which makes the scores again, too.
FLOORS = {"forward": 7 / 2, "forward and backward": 12 / 7}
PACKAGE = "jvp_flash_attention"
WHY = """\
## Why a kernel of our own

jvp_flash_attention 0.14.0 (MIT licence) gives output and tangent in one pass too, and the gradient of the value. It is as exact as
ours where nothing is large. It was not taken, because

- in float16 its product p ⊙ ẋ overflows with large tangents, and in half precision it loses digits when all keys share a component
  (both in the table): it rounds p ⊙ ẋ to the dtype of v before the product with v, uncentred and unscaled;
- it takes lengths that are even and at least 32, head dimensions 16, 32, 64, 128 and 256, and as many keys as queries. Attention at 4×4
  positions (length 16) or over a context of another length is outside of that;
- a padding mask has to be given as a matrix of L×L, which is quadratic memory again, and is checked by looking at its values at each call;
- tangents travel as torch.autograd.forward_ad duals, one level for all; ours are the pairs that the networks carry.

Its bfloat16 was not measured without a GPU: Triton's interpreter multiplies the bits of bfloat16 numbers, which our kernel works around."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(b: int, heads: int, length: int, d: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and their tangents."""
    x = [normal(b, heads, length, d, seed=i).to(DEVICE) for i in range(6)]
    return x[:3], x[3:]


def pairs(values: list[Tensor], tangents: list[Tensor]) -> list[Dual]:
    return [Dual(v, t) for v, t in zip(values, tangents, strict=True)]


def through_matrix(values: list[Tensor], tangents: list[Tensor]) -> Any:
    """What the engine `func` does."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda q, k, v: attention(q, k, v), tuple(values), tuple(tangents))


WAYS: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
    "plain": lambda values, tangents: attention(*values),
    "chunked": lambda values, tangents: attention(*pairs(values, tangents), backend="chunked"),
    "triton": lambda values, tangents: attention(*pairs(values, tangents), backend="triton"),
    "matrix": through_matrix,
}


# ---- memory ----------------------------------------------------------------------------------------------------------------


def peak_memory(way: str, lengths: Sequence[int], d: int) -> dict[int, float]:
    """MB that `way` needs at its peak for one head of each length, inputs and results included: in a fresh process."""
    arguments = [sys.executable, __file__, "--peak", way, str(d), *map(str, lengths)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    return {int(length): peak for length, peak in json.loads(done.stdout).items()}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (at its highest) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def print_peaks(way: str, d: int, lengths: Sequence[int]) -> None:
    """The measuring process: a line of JSON, MB by length."""
    torch.set_num_threads(1)
    WAYS[way](*inputs(1, 1, 64, d))  # the libraries' own buffers
    peaks = {}
    for length in lengths:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before shall not serve now
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = resident("VmRSS")
        with torch.no_grad():
            WAYS[way](*inputs(1, 1, length, d))
        after = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else resident("VmHWM")
        peaks[length] = round(after - before, 1)
    print(json.dumps(peaks))


# ---- time ------------------------------------------------------------------------------------------------------------------


def times(shape: tuple[int, int, int, int], dtype: torch.dtype, span: str, seconds: float) -> dict[str, Any]:
    """Median milliseconds of plain attention, and median ratios to it over rounds in which the ways take turns."""
    values, tangents = ([x.to(dtype) for x in group] for group in inputs(*shape))
    values = [x.requires_grad_(span != "forward") for x in values]
    on_gpu = DEVICE == "cuda" and shape[3] <= MAX_HEAD_DIM[dtype]
    ways = {name: way for name, way in WAYS.items() if name != "triton" or on_gpu}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    begin, rounds = time.perf_counter(), 0
    while rounds < 7 or time.perf_counter() - begin < seconds:
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(span != "forward"):
                result = way(values, tangents)
            if span != "forward":
                value = result if isinstance(result, Tensor) else result[0]
                torch.autograd.grad(value, values, torch.ones_like(value))
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if rounds >= 2:
                taken[name].append(time.perf_counter() - start)
        rounds += 1
    ratios = {name: statistics.median(t / p for t, p in zip(taken[name], taken["plain"], strict=True)) for name in ways}
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "span": span,
        "rounds": rounds - 2,
        "plain_ms": round(1000 * statistics.median(taken["plain"]), 3),
        **{f"{name}_ratio": round(ratio, 2) for name, ratio in ratios.items() if name != "plain"},
    }


# ---- accuracy --------------------------------------------------------------------------------------------------------------


def cases() -> dict[str, Callable[[list[Tensor], list[Tensor]], None]]:
    """What is done to Gaussian inputs and tangents, in place."""

    def common(values: list[Tensor], tangents: list[Tensor]) -> None:
        tangents[1] += 256 * torch.sign(normal(tangents[1].shape[-1], seed=70))

    def large(values: list[Tensor], tangents: list[Tensor]) -> None:
        for v, t in zip(values, tangents, strict=True):
            v /= 4
            t *= 6e4 / t.abs().max()

    return {
        "Gaussian inputs and tangents": lambda values, tangents: None,
        "k̇ with a common component of 256": common,
        "tangents up to 6e4": large,
    }


def package_attention(values: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The package's kernel, by the call its documentation gives for forward-mode differentiation."""
    import torch.autograd.forward_ad as fwd
    from jvp_flash_attention.jvp_attention import JVPAttn

    with fwd.dual_level():
        y = JVPAttn.fwd_dual(*(fwd.make_dual(v, t) for v, t in zip(values, tangents, strict=True)))
        result = fwd.unpack_dual(y)
    return result.primal, result.tangent


def print_errors() -> None:
    """The measuring process: largest errors in units of the largest entry, by (case, dtype, kernel), as a line of JSON."""
    kernels: dict[str, Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]] = {
        "chunked": WAYS["chunked"],
        "triton": WAYS["triton"],
    }
    if find_spec(PACKAGE):
        kernels[f"{PACKAGE} {version(PACKAGE)}"] = package_attention
    rows = []
    for case, change in cases().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values, tangents = inputs(1, 2, 128, 64)
            change(values, tangents)
            values, tangents = ([x.to(dtype) for x in group] for group in (values, tangents))
            exact = [[x.double() for x in group] for group in (values, tangents)]
            wanted = through_matrix(*exact)
            for name, kernel in kernels.items():
                if PACKAGE in name and dtype == torch.bfloat16 and DEVICE == "cpu":
                    continue  # Triton's interpreter multiplies the bits of bfloat16 numbers; our kernel works around that
                found = kernel(values, tangents)
                errors = [
                    ((f.double() - w).abs().max() / w.abs().max()).item() for f, w in zip(found, wanted, strict=True)
                ]
                error = {
                    key: e if math.isfinite(e) else "not finite"
                    for key, e in zip(("value", "tangent"), errors, strict=True)
                }
                rows.append({"case": case, "dtype": str(dtype).removeprefix("torch."), "kernel": name, **error})
    print(json.dumps(rows))


def accuracy(previous: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run in a process of its own, and the package's rows of an earlier run where it is not installed."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if DEVICE == "cuda" else "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--errors"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    rows = [{**row, "on": provenance()} for row in json.loads(done.stdout.splitlines()[-1])]
    if not any(PACKAGE in row["kernel"] for row in rows):
        rows += [row for row in previous if PACKAGE in row["kernel"]]
    return rows


# ---- the page --------------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """What a result was measured on."""
    return {
        "device": device(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
    }


def described(on: dict[str, Any]) -> str:
    """The provenance as words."""
    return (
        f"{on['device']}, torch {on['torch']}, triton {on['triton']}, {on['threads']} thread, "
        f"load average {on['load']} on {on['cores']} cores"
    )


def device() -> str:
    """The GPU's or the processor's name."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else processor()


def number(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else value


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    rows, memory = report["times"]["rows"], report["memory"]["peaks"]
    ratios = [name for name in WAYS if any(f"{name}_ratio" in row for row in rows)]
    lines = [
        "# The derivative of attention",
        "",
        "## Time",
        "",
        f"Measured on {described(report['times']['on'])}.",
        "",
        "With a tangent, in times of plain attention without one (the median over rounds of the ratio within the round). By products of "
        f"L×L×d the floor of a forward is {FLOORS['forward']:.2f}, or 4 for L > 256, where `chunked` accumulates the value a second time; "
        f"of forward and backward {FLOORS['forward and backward']:.2f}, as a tangent has no backward. `matrix` is torch.func.jvp through "
        "torch's math path (the engine `func`).",
        "",
        "| B | heads | L | d | dtype | span | plain, ms | " + " | ".join(ratios) + " |",
        "|---|---|---|---|---|---|---|" + "---|" * len(ratios),
    ]
    for row in rows:
        found = (row.get(f"{name}_ratio") for name in ratios)
        cells = [*map(str, row["shape"]), row["dtype"], row["span"], f"{row['plain_ms']:.2f}"]
        lines.append("| " + " | ".join([*cells, *("–" if ratio is None else f"{ratio:.2f}" for ratio in found)]) + " |")
    lines += [
        "",
        "## Memory",
        "",
        f"Peak of one head with d = 64 in float32, MB, inputs and results included. Measured on {described(report['memory']['on'])}.",
        "",
        "| way | " + " | ".join(f"L = {length}" for length in LENGTHS) + " |",
        "|---|" + "---|" * len(LENGTHS),
    ]
    lines += [f"| {way} | " + " | ".join(f"{p:.1f}" for p in peaks.values()) + " |" for way, peaks in memory.items()]
    lines += [
        "",
        "## Accuracy",
        "",
        "Largest error against float64 in units of the largest entry (value / tangent); 2 heads, L = 128, d = 64. On a CPU the kernels run "
        "in Triton's interpreter.",
        "",
    ]
    places: dict[str, list[str]] = {}
    for row in report["accuracy"]:
        if row["kernel"] not in places.setdefault(described(row["on"]), []):
            places[described(row["on"])].append(row["kernel"])
    lines += [*(f"- {', '.join(kernels)}: measured on {place}" for place, kernels in places.items()), ""]
    kernels = list(dict.fromkeys(row["kernel"] for row in report["accuracy"]))
    lines += ["| inputs | dtype | " + " | ".join(kernels) + " |", "|---|---|" + "---|" * len(kernels)]
    found = {(r["case"], r["dtype"], r["kernel"]): r for r in report["accuracy"]}
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in report["accuracy"]):
        cells = [
            f"{number(r['value'])} / {number(r['tangent'])}" if r else "–"
            for r in (found.get((case, dtype, kernel)) for kernel in kernels)
        ]
        lines.append(f"| {case} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", WHY]) + "\n"


SECTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "times": lambda report: {
        "on": provenance(),
        "rows": [times(shape, dtype, span, 4.0) for shape in SHAPES for dtype in DTYPES for span in FLOORS],
    },
    "memory": lambda report: {
        "on": provenance(),
        "peaks": {way: peak_memory(way, LENGTHS, d=64) for way in WAYS if way != "triton" or DEVICE == "cuda"},
    },
    "accuracy": lambda report: accuracy(report.get("accuracy", [])),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost and accuracy of attention's derivative.")
    chosen = arguments_of(parser, "section", SECTIONS).sections
    torch.set_num_threads(1)
    path = RESULTS / "attention.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in SECTIONS:
        if name in chosen or not chosen or name not in report:
            report[name] = SECTIONS[name](report)
            if set(report) == set(SECTIONS):
                write(report, path, markdown)
    print(markdown(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peaks(sys.argv[2], int(sys.argv[3]), [int(length) for length in sys.argv[4:]])
    elif sys.argv[1:2] == ["--errors"]:
        print_errors()
    else:
        main()
