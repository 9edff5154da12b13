# SPDX-License-Identifier: Apache-2.0
"""What the derivative of attention costs in time and memory, and how exact it is: `python benchmarks/bench_attention.py`.

Time: one forward of plain attention, the same with a tangent (`chunked`, and `triton` on a GPU), and torch.func.jvp through torch's math
path, which holds the whole score matrix, take turns in one run. Memory: the peak of a fresh process over the length. Accuracy: the
Triton kernel (in its interpreter where there is no GPU), `chunked` and the package jvp_flash_attention, if that is installed, against
float64. Without the package its rows of the last run are kept. Writes benchmarks/results/attention.json and .md.
"""

import ctypes
import json
import math
import os
import platform
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
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from scm_core.nn.attention import attention  # noqa: E402
from scm_core.nn.dual import Dual  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = (1024, 2048, 4096, 8192)
SHAPES = ((16, 4, 64, 64), (8, 4, 256, 64), (8, 1, 256, 256), (1, 4, 1024, 64), (1, 1, 4096, 64))  # B, heads, L, d
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOOR = 3.5  # products of L×L×d: two for the value; five for the tangent, one of which is the scores again (six over blocks of keys)
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


def times(shape: tuple[int, int, int, int], seconds: float) -> dict[str, Any]:
    """Median milliseconds of plain attention, and median ratios to it over rounds in which the ways take turns."""
    values, tangents = inputs(*shape)
    ways = {name: way for name, way in WAYS.items() if name != "triton" or DEVICE == "cuda"}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    begin, rounds = time.perf_counter(), 0
    while rounds < 7 or time.perf_counter() - begin < seconds:
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.no_grad():
                way(values, tangents)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if rounds >= 2:
                taken[name].append(time.perf_counter() - start)
        rounds += 1
    ratios = {name: statistics.median(t / p for t, p in zip(taken[name], taken["plain"], strict=True)) for name in ways}
    return {
        "shape": shape,
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
    """The rows of a run in a process of its own, and the package's rows of the last run where it is not installed."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if DEVICE == "cuda" else "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--errors"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    rows = json.loads(done.stdout.splitlines()[-1])
    if not any(PACKAGE in row["kernel"] for row in rows):
        rows += [row for row in previous if PACKAGE in row["kernel"]]
    return rows


# ---- the page --------------------------------------------------------------------------------------------------------------


def processor() -> str:
    """The GPU's or the processor's name."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def number(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float) else value


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    ratios = [name for name in WAYS if f"{name}_ratio" in report["times"][0]]
    lines = [
        "# The derivative of attention",
        "",
        f"{report['device']}, torch {report['torch']}, {report['threads']} thread; "
        f"load average {report['load']} on {report['cores']} cores.",
        "",
        "## Time",
        "",
        "A forward in float32 with a tangent, in forwards of plain attention without one (the median over rounds of the ratio within "
        f"the round). By products of L×L×d the floor is {FLOOR}, or 4 for L > 256, "
        "where the value is accumulated a second time. `matrix` is torch.func.jvp through torch's math path (the engine `func`).",
        "",
        "| B | heads | L | d | plain, ms | " + " | ".join(ratios) + " |",
        "|---|---|---|---|---|" + "---|" * len(ratios),
    ]
    for row in report["times"]:
        cells = [*map(str, row["shape"]), f"{row['plain_ms']:.2f}", *(f"{row[f'{name}_ratio']:.2f}" for name in ratios)]
        lines.append("| " + " | ".join(cells) + " |")
    memory = report["memory"]
    lines += [
        "",
        "## Memory",
        "",
        "Peak of one head with d = 64 in float32, MB, inputs and results included.",
        "",
        "| way | " + " | ".join(f"L = {length}" for length in LENGTHS) + " |",
        "|---|" + "---|" * len(LENGTHS),
    ]
    lines += [f"| {way} | " + " | ".join(f"{p:.1f}" for p in peaks.values()) + " |" for way, peaks in memory.items()]
    lines += [
        "",
        "## Accuracy",
        "",
        "Largest error against float64 in units of the largest entry (value / tangent); 2 heads, L = 128, d = 64. "
        + ("On the GPU." if DEVICE == "cuda" else "Kernels in Triton's interpreter on the CPU."),
        "",
    ]
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


def main() -> None:
    torch.set_num_threads(1)
    written = RESULTS / "attention.json"
    previous = json.loads(written.read_text())["accuracy"] if written.exists() else []
    report: dict[str, Any] = {
        "device": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "times": [times(shape, 4.0) for shape in SHAPES],
        "memory": {way: peak_memory(way, LENGTHS, d=64) for way in WAYS if way != "triton" or DEVICE == "cuda"},
        "accuracy": accuracy(previous),
    }
    RESULTS.mkdir(exist_ok=True)
    written.write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(json.loads(written.read_text()))
    (RESULTS / "attention.md").write_text(page)
    print(page)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peaks(sys.argv[2], int(sys.argv[3]), [int(length) for length in sys.argv[4:]])
    elif sys.argv[1:2] == ["--errors"]:
        print_errors()
    else:
        main()
