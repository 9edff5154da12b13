# SPDX-License-Identifier: Apache-2.0
"""What makes variational score distillation work or collapse at the demo's scale.

    python benchmarks/bench_vsd.py [CASE …] --size S --seeds 0

Each case trains a student, most of them from the demo's sCD student, and measures its samples of one step over guidance scales, with 5,000
samples a point. The case `signal` is about F_teacher − F_φ over t, for two F_φ that were trained alone on the samples of the sCD student:
what they agree on (signal), and what not (noise). At the far end, t → π/2, the means of samples and data say it without F_φ.
Wants the demo's teacher, sCD student and reference of the size:

    snakemake --profile cluster/local runs/demo/latent_guided/student/S/scd runs/demo/latent_guided/reference

Writes benchmarks/results/vsd.json and .md; cases, sizes and seeds that are not named keep their results.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from vsd_demo import FAKE, SCALES, TANGENT, Demo, settings  # before torch: it sets its threads

# isort: split
import torch
from report import RESULTS, write
from torch import nn
from vsd_signal import signal, table

from scm_core.nn.build import build_network, student_of
from scm_core.objectives.methods import METHODS
from scm_core.seeds import derive_seed
from scm_core.train.state import TrainState
from scm_core.train.step import train_step

GUIDANCE = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0)
LR = 1e-3  # of a student that goes on from sCD's
NEAR = {"vsd_P_mean": -0.8, "vsd_P_std": 1.0}
FIRST = 300_000  # index of the first sample


class Case(NamedTuple):
    """A student: its method, what it starts as, and what differs from the others."""

    title: str
    method: str = "scd_vsd"
    start: str = "scd"
    options: Mapping[str, Any] = {}
    iterations: int = 1000
    lr: float = LR


CASES = {
    "scd": Case("sCD, as long", "scd"),
    "literal": Case("sCD+VSD, F_φ at the student's rate from the first step", options={}),
    "blind": Case("sCD+VSD, F_φ fast and first, not told s", options={**FAKE, "fake_guidance": False}),
    "scd_vsd": Case("sCD+VSD, F_φ fast and first", options=FAKE),
    "scd_vsd_near": Case("sCD+VSD, F_φ fast and first, t as the teacher's", options={**FAKE, **NEAR}),
    "vsd_literal": Case("VSD, F_φ at the student's rate from the first step", "vsd"),
    "vsd": Case("VSD, F_φ fast and first", "vsd", options=FAKE),
    "vsd_near": Case("VSD, F_φ fast and first, t as the teacher's", "vsd", options={**FAKE, **NEAR}),
    "vsd_teacher": Case("VSD, F_φ fast, from the teacher", "vsd", "teacher", {"fake_lr": 6e-3}, 1500, 3e-3),
    "vsd_teacher_near": Case(
        "VSD, F_φ fast, from the teacher, t as the teacher's", "vsd", "teacher", {"fake_lr": 6e-3, **NEAR}, 1500, 3e-3
    ),
}


def trained(demo: Demo, case: Case, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """The averaged student of a case, and the means of what was logged over the last fifth of its training."""
    torch.manual_seed(derive_seed(seed, "init"))
    net, config = student_of(demo.teacher, guidance_input=True, dropout=0.0)
    options: dict[str, Any] = {"guidance": SCALES, **case.options}
    if case.start == "scd":
        net.load_state_dict(demo.student.net.state_dict())
    if case.method != "vsd":
        options |= {**TANGENT, "warmup": 0 if case.start == "scd" else 200}
    method = METHODS[case.method](net, demo.teacher.net, demo.sigma_data, demo.data.shape, **options)
    beside = {}
    for name, other in method.companions.items():
        own = settings(case.iterations, other.lr or case.lr, derive_seed(seed, name))
        beside[name] = TrainState(other.net, own, other.heads)
    state = TrainState(net, settings(case.iterations, case.lr, seed, 0.05), method.heads, beside)
    batches = demo.data.batches(state.settings)
    objectives = {name: other.objective for name, other in method.companions.items()}
    late: list[dict[str, float]] = []
    state.train()
    for i in range(case.iterations):
        terms = train_step(state, method.objective, batches(i), objectives)
        if 5 * i >= 4 * case.iterations:
            late.append({key: float(value) for key, value in terms.scalars.items()})
    result = build_network(config).eval()
    result.load_state_dict(state.averaged(), strict=False)
    return result, {key: round(statistics.fmean(one[key] for one in late), 5) for key in late[0]}


def run(demo: Demo, case: Case, seed: int) -> dict[str, Any]:
    """Train and measure."""
    start = time.perf_counter()
    net, log = trained(demo, case, seed)
    seconds = time.perf_counter() - start
    first = FIRST + seed * demo.slot.evaluation.samples
    points = {f"{scale:g}": demo.measure(net, scale, first) for scale in GUIDANCE}
    return {"seconds": round(seconds), "points": points, "log": log}


def markdown(report: Mapping[str, Any]) -> str:
    """The results as tables."""
    lines = ["# Variational score distillation at the demo's scale", "", "`python benchmarks/bench_vsd.py`.", ""]
    for size, cases in report.items():
        lines += [f"## Size {size}, one step, FID in the classifier's features, precision, recall", ""]
        shown = ("1", "1.2", "1.3", "1.4", "1.5", "2")
        lines += [
            "| student | seeds | " + " | ".join(f"s = {s}" for s in shown) + " |",
            "|---" * (2 + len(shown)) + "|",
        ]
        for name, case in CASES.items():
            if seeds := cases.get(name):
                cells = [cell([one["points"][s] for one in seeds.values()]) for s in shown]
                lines.append(f"| {case.title} (`{name}`) | {len(seeds)} | " + " | ".join(cells) + " |")
        lines.append("")
        if "signal" in cases:
            lines += table(cases["signal"])
    return "\n".join(lines)


def cell(points: list[dict[str, float]]) -> str:
    """FID ± error, precision, recall: means over seeds, with the error of their mean, or of the one."""
    fid, precision, recall = (statistics.fmean(p[key] for p in points) for key in ("fid", "precision", "recall"))
    errors = [p["fid_se"] for p in points]
    own = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    if len(points) > 1:
        own = max(own, statistics.stdev(p["fid"] for p in points) / math.sqrt(len(points)))
    return f"{fid:.3f} ± {own:.3f}, {precision:.3f}, {recall:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    names = ("signal", *CASES)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--size", default="S")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    chosen = parser.parse_args()
    for name in chosen.cases:
        if name not in names:
            parser.error(f"{name}: expected some of {', '.join(names)}")
    path = RESULTS / "vsd.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    demo, found = Demo(chosen.size), report.setdefault(chosen.size, {})
    for name in chosen.cases or names:
        if name == "signal":
            found[name] = signal(demo)
        for seed in chosen.seeds if name != "signal" else ():
            found.setdefault(name, {})[str(seed)] = run(demo, CASES[name], seed)
            write(report, path, markdown)
    write(report, path, markdown)
    print(markdown(report))


if __name__ == "__main__":
    main()
