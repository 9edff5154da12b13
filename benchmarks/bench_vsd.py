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
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from report import RESULTS, write  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from pipeline import params, registry  # noqa: E402
from pipeline.evaluation import load_references, numbers  # noqa: E402
from pipeline.generation import noise_of, samples  # noqa: E402
from pipeline.modelling import MODEL, Data, Decoder  # noqa: E402
from pipeline.spaces import load_extractor  # noqa: E402
from scm_core.data import load_latents  # noqa: E402
from scm_core.guidance import guided  # noqa: E402
from scm_core.nn.build import build_network, load_model, student_of  # noqa: E402
from scm_core.objectives import Companion  # noqa: E402
from scm_core.objectives.methods import METHODS  # noqa: E402
from scm_core.objectives.vsd import generate  # noqa: E402
from scm_core.seeds import derive_seed, generator_for  # noqa: E402
from scm_core.train.schedule import Schedule  # noqa: E402
from scm_core.train.state import TrainSettings, TrainState  # noqa: E402
from scm_core.train.step import train_step  # noqa: E402
from scm_core.trigflow import diffuse, t_max, velocity  # noqa: E402

SLOT, SPACE = "latent_guided", "classifier"
GUIDANCE = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0)
SCALES = (1.0, 2.0)  # that students are trained on
TANGENT = {"P_mean": -1.0, "P_std": 1.4}  # params.yaml, scale demo
LR = 1e-3  # of a student that goes on from sCD's
RAMP_UP, FINAL, DECAY = 50, 0.03, 0.3
FAKE = {"fake_lr": 6e-3, "vsd_delay": 400}
NEAR = {"vsd_P_mean": -0.8, "vsd_P_std": 1.0}
TIMES = (0.05, 0.2, 0.5, 0.8, 1.1, 1.3, 1.45, 1.52, 1.555)
FIRST, CHUNK = 300_000, 500  # index of the first sample; samples at once


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


class Demo:
    """The demo's networks of one size, its data and its measure."""

    def __init__(self, size: str) -> None:
        found = params.load(ROOT / "params.yaml", "demo")
        self.slot = found.active.slots[SLOT]
        job = registry.find(found, "evaluate", {"slot": SLOT, "size": size, "method": "scd"})
        inputs = {name: ROOT / path for name, path in job.inputs.items()}
        teacher = registry.find(found, "teacher", {"slot": SLOT, "size": size}).outputs[0]
        self.teacher, self.student = load_model(ROOT / teacher / MODEL), load_model(inputs["student"] / MODEL)
        self.store = load_latents(inputs["latents"])
        self.data = Data(self.store.sample, self.store.labels, len(self.store), self.store.shape)
        self.decode, self.extract = Decoder(self.slot, inputs), load_extractor(SPACE, inputs)
        self.reference = load_references([SPACE], inputs["reference"])[SPACE]
        self.scd, self.sigma_data = self.slot.student_for(size, "scd"), self.slot.sigma_data

    @torch.no_grad()
    def measure(self, net: nn.Module, scale: float, first: int, steps: int = 1) -> dict[str, float]:
        """FID, precision and recall, with their errors, of samples `first` and following."""
        features = []
        for start in range(first, first + self.slot.evaluation.samples, CHUNK):
            indices = range(start, start + CHUNK)
            labels = torch.tensor([i % self.slot.dataset.labels for i in indices])
            noise = noise_of(self.scd, indices, self.data.shape, steps)
            x0 = samples(self.slot, self.scd, net, noise, labels, scale)
            features.append(self.extract(self.decode(x0)))
        found = numbers(torch.cat(features), self.reference, self.slot.evaluation)
        keys = ("fid", "precision", "recall")
        return {key: round(float(found[key] or 0.0), 5) for key in (*keys, *(f"{name}_se" for name in keys))}


def settings(iterations: int, lr: float, seed: int, ema: float | None = None) -> TrainSettings:
    """Those of all cases."""
    schedule = Schedule("linear", start=DECAY, final=FINAL, ramp_up=RAMP_UP)
    return TrainSettings(iterations, 64, lr, seed, schedule=schedule, head_lr=1e-2, ema_sigma_rel=ema)


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


def fake_of(demo: Demo, seed: int, iterations: int = 1000) -> nn.Module:
    """F_φ, told s, trained alone on the samples of the sCD student."""
    net, _ = student_of(demo.teacher, guidance_input=True, dropout=0.0)
    net.load_state_dict(demo.student.net.state_dict())
    method = METHODS["vsd"](net, demo.teacher.net, demo.sigma_data, demo.data.shape, guidance=SCALES)
    other: Companion = method.companions["fake"]
    state = TrainState(other.net, settings(iterations, FAKE["fake_lr"], derive_seed(seed, "alone")), other.heads)
    batches = demo.data.batches(state.settings)
    state.train()
    for i in range(iterations):
        train_step(state, other.objective, batches(i))
    return other.net.eval()


@torch.no_grad()
def signal(demo: Demo, count: int = 500) -> dict[str, Any]:
    """E‖F_teacher − F_φ‖²/D by scale and t: what two F_φ agree on, and what not; t = π/2: from the means of the samples.

    With them the mean of the teacher's denoiser against that of the data (σ_d = 1), over the classes: how well it knows the mean at t.
    """
    pair, sigma_data = [fake_of(demo, seed) for seed in (0, 1)], demo.sigma_data
    generator = generator_for("signal")
    labels = torch.arange(count) % demo.slot.dataset.labels
    rows: list[dict[str, float]] = []
    for scale in (1.0, 1.5, 2.0):
        s = torch.full((count,), scale)
        x0 = generate(demo.student.net, noise(demo, count, generator), sigma_data, labels, s)
        for at in TIMES:
            t = torch.full((count,), at)
            x = diffuse(x0, noise(demo, count, generator), t) / sigma_data
            teacher = guided(demo.teacher.net, x, t, labels, s)
            a, b = (teacher - fake(x, t, labels, s) for fake in pair)
            rows.append({"guidance": scale, "t": at, "signal": mean(a * b), "noise": mean((a - b) ** 2) / 2})
        rows.append({"guidance": scale, "t": math.pi / 2, "signal": far_signal(demo, scale, generator)})
    bias = {f"{at:g}": teacher_bias(demo, at, generator) for at in TIMES}
    return {"rows": [{key: round(value, 5) for key, value in row.items()} for row in rows], "teacher_bias": bias}


def noise(demo: Demo, count: int, generator: torch.Generator) -> Tensor:
    """z of the data's shape."""
    return demo.sigma_data * torch.randn(count, *demo.data.shape, generator=generator)


def mean(x: Tensor) -> float:
    return float(x.mean())


def far_signal(demo: Demo, scale: float, generator: torch.Generator, count: int = 600) -> float:
    """At t_max, where F is −E[x0]/σ_d: the guided teacher's mean against that of the student's samples, without the means' own variance."""
    found = []
    for label in range(demo.slot.dataset.labels):
        labels, s = torch.full((count,), label), torch.full((count,), scale)
        x0 = generate(demo.student.net, noise(demo, count, generator), demo.sigma_data, labels, s) / demo.sigma_data
        t = torch.full((count,), t_max(demo.sigma_data))
        F = guided(demo.teacher.net, noise(demo, count, generator) / demo.sigma_data, t, labels, s)
        found.append(mean((F.mean(0) + x0.mean(0)) ** 2) - mean(x0.var(0)) / count)
    return statistics.fmean(found)


def teacher_bias(demo: Demo, at: float, generator: torch.Generator, count: int = 400) -> float:
    """‖E[D(x_t, t) | class] − E[x0 | class]‖²/D in units of σ_d², unguided, averaged over the classes."""
    known, found = demo.data.labels, []
    assert known is not None
    for label in range(demo.slot.dataset.labels):
        indices = torch.nonzero(known == label).flatten()[:count]
        x0, t = demo.store.sample(indices, generator), torch.full((len(indices),), at)
        z = noise(demo, len(indices), generator)
        F = demo.teacher.net(diffuse(x0, z, t) / demo.sigma_data, t, known[indices])
        error = F - velocity(x0, z, t) / demo.sigma_data  # D − x0 = −sin(t) σ_d (F − v_t/σ_d)
        found.append(math.sin(at) ** 2 * mean(error.mean(0) ** 2))
    return round(statistics.fmean(found), 5)


def page(report: Mapping[str, Any]) -> str:
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
            lines += signal_table(cases["signal"])
    return "\n".join(lines)


def cell(points: list[dict[str, float]]) -> str:
    """FID ± error, precision, recall: means over seeds, with the error of their mean, or of the one."""
    fid, precision, recall = (statistics.fmean(p[key] for p in points) for key in ("fid", "precision", "recall"))
    errors = [p["fid_se"] for p in points]
    own = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    if len(points) > 1:
        own = max(own, statistics.stdev(p["fid"] for p in points) / math.sqrt(len(points)))
    return f"{fid:.3f} ± {own:.3f}, {precision:.3f}, {recall:.3f}"


def signal_table(found: Mapping[str, Any]) -> list[str]:
    """(F_teacher − F_φ)² by t."""
    columns = [
        "t",
        "σ",
        "teacher's bias of the mean",
        "s = 1: signal",
        "noise",
        "s = 1.5: signal",
        "noise",
        "s = 2: signal",
        "noise",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for at in (*TIMES, round(math.pi / 2, 5)):
        sigma = f"{0.5 * math.tan(at):.2f}" if at in TIMES else "∞"
        cells = [f"{at:g}", sigma, str(found["teacher_bias"].get(f"{at:g}", ""))]
        for row in (row for row in found["rows"] if abs(row["t"] - at) < 1e-4):
            cells += [f"{row['signal']:.4f}", f"{row['noise']:.4f}" if "noise" in row else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


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
            write(report, path, page)
    write(report, path, page)
    print(page(report))


if __name__ == "__main__":
    main()
