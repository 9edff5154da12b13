# SPDX-License-Identifier: Apache-2.0
"""What a training step of each method costs, in teacher steps: `python benchmarks/bench_step_cost.py`.

A teacher step is one forward and a backward worth two. By that count the floors are 4/3 for sCT, which carries a tangent along, 5/3 for sCD
with one forward of the teacher, and 2 with guidance, where the teacher runs twice. Whole training steps (loss, backward, Adam, weight
normalisation, average) of the demo's networks are timed in turn, A B C A B C …, on one thread, so that a busy machine slows all of
them alike. Writes benchmarks/results/step_cost.json and .md.
"""

import copy
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from pipeline import params  # noqa: E402
from pipeline.modelling import train_settings  # noqa: E402
from pipeline.models import VAE_DOWNSAMPLING  # noqa: E402
from pipeline.params import Slot  # noqa: E402
from scm_core.guidance import VelocityFn, data_velocity, teacher_velocity  # noqa: E402
from scm_core.nn.build import Model, build_network, count_parameters, student_of  # noqa: E402
from scm_core.nn.embedding import LogVarHead  # noqa: E402
from scm_core.objectives import Batch  # noqa: E402
from scm_core.objectives.consistency import ConsistencyObjective  # noqa: E402
from scm_core.objectives.diffusion import DiffusionObjective  # noqa: E402
from scm_core.train.state import TrainState  # noqa: E402
from scm_core.train.step import train_step  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 22.0  # spent on the timed rounds of one size
TARGET = 2.2  # for guided sCD with pairs
FLOORS = {"teacher": 1.0, "sCT": 4 / 3, "sCD": 5 / 3, "sCD, guided": 2.0}
PASSES = {"pairs": "(value, tangent) pairs", "jvp": "torch.func.jvp"}


def network_config(slot: Slot, size: str) -> dict[str, Any]:
    """What `build_network` makes a teacher of the slot from."""
    assert slot.vae is not None
    return {
        **slot.sizes[size].network.config(slot.sigma_data),
        "channels": slot.vae.latent_channels,
        "resolution": slot.dataset.resolution // VAE_DOWNSAMPLING,
        "labels": slot.dataset.labels,
        "dropout": slot.teacher_for(size).dropout,
    }


def steps(slot: Slot, size: str) -> dict[tuple[str, str], Callable[[], object]]:
    """A training step of every method and way to the tangent, by (method, pass), on random latents."""
    wanted, config = slot.teacher_for(size), network_config(slot, size)
    shape = (config["channels"], config["resolution"], config["resolution"])
    generator = torch.Generator().manual_seed(0)
    x0 = slot.sigma_data * torch.randn(wanted.batch, *shape, generator=generator)
    labels = torch.randint(slot.dataset.labels, (wanted.batch,), generator=generator)
    batch = Batch(x0, labels, torch.arange(wanted.batch))
    torch.manual_seed(0)
    net = build_network(config)
    nn.init.ones_(net.get_parameter("out_gain"))  # as in training: it starts at 0
    frozen = copy.deepcopy(net).eval().requires_grad_(False)

    def teacher() -> Callable[[], object]:
        head = LogVarHead(0.0)
        objective = DiffusionObjective(net, head, slot.sigma_data, wanted.P_mean, wanted.P_std, wanted.label_dropout)
        state = TrainState(net, train_settings(wanted, 0), {"logvar": head})
        return lambda: train_step(state, objective, batch)

    def student(method: str, velocity: VelocityFn, guided: bool, pairs: bool) -> Callable[[], object]:
        how = slot.student_for(size, method).model_copy(update={"batch": wanted.batch})
        own, _ = student_of(Model(frozen, config, {}), guided, how.dropout)
        head = LogVarHead(math.log(x0[0].numel()))
        call = own if pairs else lambda *args, **kwargs: own(*args, **kwargs)  # without `supports_dual`
        objective = ConsistencyObjective(
            call,
            head,
            velocity,
            slot.sigma_data,
            how.P_mean,
            how.P_std,
            how.tangent_warmup,
            how.tangent_normalize,
            how.tangent_c,
            how.guidance if guided else None,
        )
        state = TrainState(own, train_settings(how, 0), {"logvar": head})
        return lambda: train_step(state, objective, batch)

    result = {("teacher", "plain"): teacher()}
    distil = teacher_velocity(frozen, slot.sigma_data)
    for name, pairs in (("pairs", True), ("jvp", False)):
        result["sCT", name] = student("sct", data_velocity, False, pairs)
        result["sCD", name] = student("scd", distil, False, pairs)
        result["sCD, guided", name] = student("scd", distil, True, pairs)
    return result


def measure(functions: dict[Any, Callable[[], object]], seconds: float) -> dict[Any, list[float]]:
    """Seconds of every call, the functions taking turns; two rounds to warm up first, at least five counted."""
    times: dict[Any, list[float]] = {key: [] for key in functions}
    for function in list(functions.values()) * 2:
        function()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < 5:
        for key, function in functions.items():
            start = time.perf_counter()
            function()
            times[key].append(time.perf_counter() - start)
    return times


def summarise(times: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """Median time and median (and quartiles) of the ratio to the teacher step of the same round."""
    teacher = times["teacher", "plain"]
    rows = []
    for (method, kind), values in times.items():
        ratios = [value / reference for value, reference in zip(values, teacher, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if method != "teacher" else (1.0, 1.0, 1.0)
        rows.append(
            {
                "method": method,
                "pass": kind,
                "milliseconds": round(1000 * statistics.median(values), 2),
                "teacher_steps": round(middle, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "floor": round(FLOORS[method], 3),
            }
        )
    return rows


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Cost of a training step",
        "",
        f"Whole training steps, batch {report['batch']}, in teacher steps: the median over rounds of the ratio to the "
        "teacher step of the same round (quartiles in brackets). The floor counts operations: forward 1, backward 2.",
        "",
        f"{report['cpu']}, torch {report['torch']}, {report['threads']} thread; load average {report['load_before']} before, "
        f"{report['load_after']} after, on {report['cores']} cores.",
        "",
    ]
    for size, result in report["sizes"].items():
        rows = result["rows"]
        lines += [
            f"## Size {size}: {result['parameters']:,} parameters, {result['rounds']} rounds",
            "",
            f"| step | ms | floor | {PASSES['pairs']} | {PASSES['jvp']} |",
            "|---|---|---|---|---|",
            f"| teacher | {rows[0]['milliseconds']:.1f} | 1.00 | | |",
        ]
        for method in list(FLOORS)[1:]:
            pairs, jvp = (next(r for r in rows if (r["method"], r["pass"]) == (method, kind)) for kind in PASSES)
            cells = [
                f"{r['teacher_steps']:.2f} ({r['quartiles'][0]:.2f}–{r['quartiles'][1]:.2f})" for r in (pairs, jvp)
            ]
            lines.append(f"| {method} | {pairs['milliseconds']:.1f} | {pairs['floor']:.2f} | {cells[0]} | {cells[1]} |")
        lines.append("")
    worst = max(
        r["teacher_steps"]
        for result in report["sizes"].values()
        for r in result["rows"]
        if (r["method"], r["pass"]) == ("sCD, guided", "pairs")
    )
    verdict = "met" if worst <= TARGET else "missed"
    lines.append(
        f"Target: guided sCD with pairs in at most {TARGET} teacher steps: {verdict} ({worst:.2f} at the worse size)."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    scale = params.load(ROOT / "params.yaml").with_scale("demo").active
    slot = scale.slots["latent_guided"]
    report: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
        "sizes": {},
    }
    for size in slot.sizes:
        functions = steps(slot, size)
        times = measure(functions, SECONDS)
        parameters = count_parameters(build_network(network_config(slot, size)))
        rounds = len(times["teacher", "plain"])
        report["sizes"][size] = {"parameters": parameters, "rounds": rounds, "rows": summarise(times)}
    report["batch"] = slot.teacher.batch
    report["load_after"] = round(os.getloadavg()[0], 1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "step_cost.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
