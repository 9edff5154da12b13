# SPDX-License-Identifier: Apache-2.0
"""What half precision does to the tangent, and what the JVP rearrangement buys: `python benchmarks/bench_tangent_precision.py`.

The same EDM2 network (small, random weights, attention) computes J = σ_d cos(t) sin(t) dF/dt in float32, bfloat16 and float16, in two ways:

- rearranged (paper §5.1): one JVP along (cos t sin t · dx/dt, cos t sin t · σ_d);
- plain: the JVP along (dx/dt / σ_d, 1), whose result is multiplied by σ_d cos t sin t afterwards, in float32.

Both are compared with float64, where they agree. The error is relative to the whole tangent, ‖ΔJ‖/‖g‖, g as in Algorithm 1 before its
normalisation; `inf` counts samples whose J was not finite. The three time inputs are those of the paper's Figure 4: EDM's c_noise with
Fourier features of scale 16, EDM's c_noise with the positional embedding, and c_noise = t with the positional embedding.

Writes benchmarks/results/tangent_precision.json and .md.
"""

import copy
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from report import RESULTS, write  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from scm_core.engines import value_and_jvp  # noqa: E402
from scm_core.nn.build import build_network  # noqa: E402
from scm_core.trigflow import broadcast_time, diffuse, velocity  # noqa: E402

SIGMA_DATA = 0.5
SAMPLES = 4
TIMES = (1e-3, 1e-2, 0.1, 0.5, 1.0, 1.4, 1.5, 1.55, math.atan(160.0))
INPUTS = {
    "EDM, Fourier 16": {"c_noise": "edm", "embedding": "fourier", "fourier_scale": 16.0},
    "EDM, positional": {"c_noise": "edm", "embedding": "positional"},
    "TrigFlow, positional": {"c_noise": "t", "embedding": "positional"},
}
PRECISIONS = ("fp32", "bf16", "fp16")
ALIKE = 1.5  # errors within this factor are called alike: medians of four samples are no better known


def network(options: dict[str, Any], precision: str) -> nn.Module:
    """The network in one precision; the weights are the same for all."""
    torch.manual_seed(0)
    net = build_network(
        {
            "architecture": "edm2", "channels": 4, "resolution": 16, "labels": 0, "width": 32, "multipliers": [1, 2], "blocks": 1,
            "attention_resolutions": [8], "head_channels": 32, "sigma_data": SIGMA_DATA, "precision": precision, **options,
        }
    )  # fmt: skip
    nn.init.ones_(net.get_parameter("out_gain"))  # it starts at 0, where every derivative is 0
    return net.eval().requires_grad_(False)


def tangents(net: nn.Module, x_t: Tensor, t: Tensor, dxdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """J rearranged, J plain, and F."""
    tb = broadcast_time(t, x_t)
    factor = torch.cos(tb) * torch.sin(tb)
    F, rearranged = value_and_jvp(net, x_t / SIGMA_DATA, t, factor * dxdt, SIGMA_DATA * factor.flatten(), "dual")
    _, plain = value_and_jvp(net, x_t / SIGMA_DATA, t, dxdt / SIGMA_DATA, torch.ones_like(t), "dual")
    return rearranged, SIGMA_DATA * factor * plain, F


def errors(options: dict[str, Any], time: float) -> dict[str, dict[str, Any]]:
    """The error of J by precision and way, at one time."""
    generator = torch.Generator().manual_seed(1)
    x0, z = (SIGMA_DATA * torch.randn(SAMPLES, 4, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.full((SAMPLES,), time, dtype=torch.float32).double()  # the same time in every precision
    x_t, dxdt = diffuse(x0, z, t), velocity(x0, z, t)
    truth, again, F = tangents(copy.deepcopy(network(options, "fp32")).double(), x_t, t, dxdt)
    assert torch.allclose(truth, again, rtol=1e-9, atol=1e-12), "float64 does not confirm that the two ways agree"
    tb = broadcast_time(t, x_t)
    cos, sin = torch.cos(tb), torch.sin(tb)
    scale = (-(cos**2) * (SIGMA_DATA * F - dxdt) - (cos * sin * x_t + truth)).flatten(1).norm(dim=1)
    result = {}
    for precision in PRECISIONS:
        low = network(options, precision)
        ways = tangents(low, x_t.float(), t.float(), dxdt.float())[:2]
        for way, J in zip(("rearranged", "plain"), ways, strict=True):
            finite = J.flatten(1).isfinite().all(dim=1)
            error = ((J.double() - truth).flatten(1).norm(dim=1) / scale)[finite]
            result[f"{precision} {way}"] = {
                "error": error.median().item() if len(error) else None,
                "not_finite": int((~finite).sum()),
            }
    return result


def cell(value: dict[str, Any]) -> str:
    """An error, and how many samples had none."""
    error = "" if value["error"] is None else f"{value['error']:.1e}"
    return f"{error} ({value['not_finite']} inf)" if value["not_finite"] else error


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    columns = [f"{precision} {way}" for precision in PRECISIONS for way in ("rearranged", "plain")]
    lines = [
        "# The tangent in half precision",
        "",
        "Median error of J = σ_d cos(t) sin(t) dF/dt relative to the whole tangent, ‖ΔJ‖/‖g‖, against float64, for an EDM2 network "
        f"with random weights ({report['parameters']:,} parameters, attention, {SAMPLES} samples, torch {report['torch']}, CPU). "
        "*rearranged*: one JVP along (cos t sin t · dx/dt, cos t sin t · σ_d), §5.1. *plain*: along (dx/dt / σ_d, 1), multiplied "
        "afterwards. *n inf*: samples whose J was not finite.",
        "",
    ]
    for name, rows in report["inputs"].items():
        lines += [f"## Time input: {name}", "", f"| t | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
        lines += [f"| {row['t']:.4f} | {' | '.join(cell(row[column]) for column in columns)} |" for row in rows]
        lines.append("")
    lost = {
        way: sum(row[f"fp16 {way}"]["not_finite"] for rows in report["inputs"].values() for row in rows)
        for way in ("rearranged", "plain")
    }
    points = SAMPLES * len(TIMES) * len(INPUTS)
    lines.append(
        f"In float16 {lost['plain']} of {points} tangents are not finite when computed plainly, {lost['rearranged']} when rearranged. "
        + verdict(report, lost)
    )
    return "\n".join(lines) + "\n"


def verdict(report: dict[str, Any], lost: dict[str, int]) -> str:
    """What the numbers say about the rearrangement: how the two ways' errors compare where both have all samples."""
    ratios = []
    for row in (row for rows in report["inputs"].values() for row in rows):
        for precision in PRECISIONS:
            ways = row[f"{precision} rearranged"], row[f"{precision} plain"]
            if not any(way["not_finite"] for way in ways):
                ratios.append(ways[1]["error"] / ways[0]["error"])
    text = f"Where both ways are finite, the plain one's error is {min(ratios):.2f} to {max(ratios):.2f} times the rearranged one's"
    if min(ratios) > 1 / ALIKE and max(ratios) < ALIKE and lost["rearranged"] < lost["plain"]:
        return f"{text}: the rearrangement is about range, not about digits."
    return f"{text}."


def main() -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in network(INPUTS["TrigFlow, positional"], "fp32").parameters()),
        "inputs": {name: [{"t": t, **errors(options, t)} for t in TIMES] for name, options in INPUTS.items()},
    }
    write(report, RESULTS / "tangent_precision.json", markdown)
    print(markdown(report))


if __name__ == "__main__":
    main()
