# SPDX-License-Identifier: Apache-2.0
"""What a training step of each method costs, in teacher steps: `python benchmarks/bench_step_cost.py [NETWORK …]`.

A teacher step is one forward and a backward worth two. By that count the floors are 4/3 for sCT, which carries a tangent along, 5/3 for sCD
with one forward of the teacher, and 2 with guidance, where the teacher runs twice. Whole training steps (loss, backward, Adam, weight
normalisation, average) are timed in turn with the teacher's, A B A B …, on one thread, so that a busy machine slows both alike. What the
optimizer and the averages take is the same for all and pulls the ratio to 1 where the batch is small, so the passes (loss and backward
alone), which the count is about, are timed for themselves in the same rounds. Peak memory is that of a process of its own for each step,
less what it had before it built its networks.

Networks: the demo's S and M, and EDM2 XS (131 million parameters) on latents of 16×16 and 64×64. Writes
benchmarks/results/step_cost.json and .md; networks that are not named keep their results.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from report import RESULTS, arguments_of, processor, write  # noqa: E402
from torch import nn  # noqa: E402

from pipeline import params  # noqa: E402
from scm_core.nn.build import Model, build_network, count_parameters, student_of  # noqa: E402
from scm_core.nn.embedding import LogVarHead  # noqa: E402
from scm_core.nn.unet_edm2 import WIDTHS  # noqa: E402
from scm_core.objectives import Batch, Objective  # noqa: E402
from scm_core.objectives.diffusion import DiffusionObjective  # noqa: E402
from scm_core.objectives.methods import METHODS  # noqa: E402
from scm_core.train.state import TrainSettings, TrainState  # noqa: E402
from scm_core.train.step import gradient, train_step  # noqa: E402

SIGMA_DATA = 0.5
ENGINES = {"dual": "pairs", "func": "torch.func.jvp", "finite_difference": "finite differences"}
TARGETS = {"sCT": 1.40, "sCD": 1.75, "sCD, guided": 2.05}  # with pairs
MEMORY_TARGET = 1.3  # teacher steps, for the same
TANGENT = {"P_mean": -1.0, "P_std": 1.4, "warmup": 0}
GUIDANCE = (1.0, 2.0)


class Method(NamedTuple):
    """A row: the library's method, its options, its cost by operation count in teacher steps, and what the student's network has."""

    name: str
    options: dict[str, Any]
    floor: float
    engines: tuple[str, ...] = tuple(ENGINES)
    student: dict[str, Any] = {}  # noqa: RUF012 (a named tuple's default, which nobody changes)


ROWS = {
    "sCT": Method("sct", TANGENT, 4 / 3),
    "sCD": Method("scd", TANGENT, 5 / 3),
    "sCD, guided": Method("scd", {**TANGENT, "guidance": GUIDANCE}, 2.0),
    # a block's value and tangent are computed again in the backward: 4 + 2 + 2 passes of a teacher step's 3
    "sCD, guided, checkpointing": Method(
        "scd", {**TANGENT, "guidance": GUIDANCE}, 8 / 3, ("dual",), {"checkpointing": True}
    ),
    "multistep sCD, guided": Method("multistep", {**TANGENT, "guidance": GUIDANCE, "segments": 4}, 2.0, ("dual",)),
    # generator 3, guided teacher 2, F_φ 1; F_φ's own step: a sample 1, forward and backward 3
    "VSD, guided": Method("vsd", {"guidance": GUIDANCE}, 10 / 3, ("dual",)),
}


class Network(NamedTuple):
    """What is timed: `build_network`'s description, the batch, and the rounds and seconds to spend on each row at least."""

    title: str
    config: dict[str, Any]
    batch: int
    rounds: int
    seconds: float

    def rows(self) -> list[tuple[str, str]]:
        """Every (row, engine) that it can have: the demo's has no checkpointing."""
        small = self.config["architecture"] == "small"
        return [
            (row, engine) for row, method in ROWS.items() if not (small and method.student) for engine in method.engines
        ]


class Step(NamedTuple):
    """A training step, and its passes alone."""

    whole: Callable[[], object]
    passes: Callable[[], object]


def demo(size: str) -> Network:
    """A network of scale demo."""
    slot = params.load(ROOT / "params.yaml").with_scale("demo").active.slots["latent_guided"]
    assert slot.vae is not None
    config = {
        **slot.sizes[size].network.config(slot.sigma_data),
        "channels": slot.vae.latent_channels,
        "resolution": slot.item_resolution,
        "labels": slot.dataset.labels,
    }
    return Network(f"Demo {size}, 4×8×8", config, slot.teacher.batch, 11, 4.0)


def edm2_xs(resolution: int, batch: int) -> Network:
    """EDM2 XS with 1000 labels, as for ImageNet, on latents of a resolution."""
    sides = [side for side in (16, 8) if side <= resolution]
    config = {
        "architecture": "edm2", "channels": 4, "resolution": resolution, "labels": 1000, "width": WIDTHS["XS"],
        "attention_resolutions": sides, "sigma_data": SIGMA_DATA,
    }  # fmt: skip
    return Network(f"EDM2 XS, 4×{resolution}×{resolution}", config, batch, 3, 10.0)


NETWORKS: dict[str, Callable[[], Network]] = {
    "demo-S": lambda: demo("S"),
    "demo-M": lambda: demo("M"),
    "xs-16": lambda: edm2_xs(16, 4),
    "xs-64": lambda: edm2_xs(64, 1),
}


class Bench:
    """One network's teacher, and the training steps that start from it."""

    def __init__(self, network: Network) -> None:
        self.network, config = network, network.config
        shape = (config["channels"], config["resolution"], config["resolution"])
        generator = torch.Generator().manual_seed(0)
        x0 = SIGMA_DATA * torch.randn(network.batch, *shape, generator=generator)
        labels = torch.randint(config["labels"], (network.batch,), generator=generator)
        self.shape, self.batch = shape, Batch(x0, labels, torch.arange(network.batch))
        torch.manual_seed(0)
        self.net = build_network(config)
        nn.init.ones_(self.net.get_parameter("out_gain"))  # as in training: it starts at 0

    def step(self, row: str, engine: str) -> Step:
        """The training step of a row, or of the teacher."""
        settings = TrainSettings(1, self.network.batch, 1e-4, 0, ema_sigma_rel=0.05)
        if row == "teacher":
            head = LogVarHead(0.0)
            objective = DiffusionObjective(self.net, head, SIGMA_DATA, -0.4, 1.0, 0.1)
            state = TrainState(self.net, settings, {"logvar": head})
            return self.of(state, objective, {})
        method = ROWS[row]
        options = {**method.options, **({"engine": engine} if "P_mean" in method.options else {})}
        teacher = None if method.name == "sct" else copy.deepcopy(self.net).eval().requires_grad_(False)
        start = Model(teacher or self.net, self.network.config, {})
        net, _ = student_of(start, "guidance" in method.options, 0.0, **method.student)
        made = METHODS[method.name](net, teacher, SIGMA_DATA, self.shape, **options)
        other_seed = replace(settings, seed=1, ema_sigma_rel=None)
        beside = {name: TrainState(other.net, other_seed, other.heads) for name, other in made.companions.items()}
        state = TrainState(net, settings, made.heads, beside)
        objectives = {name: other.objective for name, other in made.companions.items()}
        return self.of(state, made.objective, objectives)

    def of(self, state: TrainState, objective: Objective, companions: dict[str, Objective]) -> Step:
        """The step of a state and its companions."""

        def passes() -> None:
            for name, other in state.companions.items():
                gradient(other, companions[name], self.batch)
            gradient(state, objective, self.batch)

        return Step(lambda: train_step(state, objective, self.batch, companions), passes)


class Round(NamedTuple):
    """Seconds of what takes turns."""

    teacher: float
    step: float
    teacher_passes: float
    passes: float


def measure(teacher: Step, step: Step, rounds: int, seconds: float) -> list[Round]:
    """Rounds of teacher step, step, and their passes, in turn; one to warm up first, at least `rounds` counted."""
    turns = (teacher.whole, step.whole, teacher.passes, step.passes)
    times: list[Round] = []
    for turn in turns:
        turn()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < rounds:
        ticks = [time.perf_counter()]
        for turn in turns:
            turn()
            ticks.append(time.perf_counter())
        times.append(Round(*(b - a for a, b in pairwise(ticks))))
    return times


def peak_of_child(name: str, row: str, engine: str) -> float:
    """Peak memory in MB of two training steps in a process of their own."""
    command = [sys.executable, __file__, "--peak", name, row, engine]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(name: str, row: str, engine: str) -> None:
    """Print the peak memory of two steps (the second has every buffer), less what the process had before."""
    network = NETWORKS[name]()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = memory_mb("VmRSS")
    bench = Bench(network)
    step = bench.step(row, engine)
    if row != "teacher":
        del bench.net  # a student's process has the student and its frozen teacher
    step.whole()
    step.whole()
    print(memory_mb("VmHWM") - before)


def memory_mb(field: str) -> float:
    """This process's memory in MB, VmRSS (now) or VmHWM (at its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def run(name: str) -> dict[str, Any]:
    """Everything about one network."""
    network = NETWORKS[name]()
    bench = Bench(network)
    teacher = bench.step("teacher", "")
    reference: list[float] = []
    rows = []
    for row, engine in network.rows():
        times = measure(teacher, bench.step(row, engine), network.rounds, network.seconds)
        reference += [now.teacher for now in times]
        whole = quartiles([now.step / now.teacher for now in times])
        passes = quartiles([now.passes / now.teacher_passes for now in times])
        rows.append(
            {
                "method": row,
                "engine": engine,
                "milliseconds": round(1000 * statistics.median(now.step for now in times), 1),
                "teacher_steps": whole[1],
                "quartiles": [whole[0], whole[2]],
                "passes": passes[1],
                "passes_quartiles": [passes[0], passes[2]],
                "passes_share": round(statistics.median(now.passes / now.step for now in times), 3),
                "rounds": len(times),
                "peak_mb": round(peak_of_child(name, row, engine), 1),
            }
        )
    parameters = count_parameters(build_network(network.config))
    return {
        "title": network.title, "batch": network.batch, "parameters": parameters, "rows": rows,
        "teacher_ms": round(1000 * statistics.median(reference), 1), "teacher_mb": round(peak_of_child(name, "teacher", ""), 1),
        "cpu": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def quartiles(ratios: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [round(value, 3) for value in statistics.quantiles(ratios, n=4)]


def judged(time: float, memory: float, target: float, floor: float) -> str:
    """Whether a row keeps its target. What took less than its operations do has not been measured well enough to say so."""
    if time < floor:
        return "below the floor: noise or the optimizer's share"
    return "met" if time <= target and memory <= MEMORY_TARGET else "missed"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Cost of a training step",
        "",
        "Training steps on one thread, in teacher steps: the median over rounds of the ratio to the teacher step of the same round "
        "(quartiles in brackets), and peak memory of a process of its own in teacher steps. *Step*: the whole one. *Passes*: loss and "
        "backward alone, in those of a teacher step; *share*: theirs of the whole step, the rest is the optimizer's and the averages'. "
        "*By count*: operations of the passes, forward 1, backward 2. Rows without an engine's name carry (value, tangent) pairs.",
        "",
    ]
    verdicts: list[str] = []
    for result in report.values():
        lines += [
            f"## {result['title']}: {result['parameters']:,} parameters, batch {result['batch']}",
            "",
            f"{result['cpu']}, {result['cores']} cores, load average {result['load']} after; torch {result['torch']}; "
            f"at least {min(row['rounds'] for row in result['rows'])} rounds each. Teacher step: {result['teacher_ms']:.0f} ms, "
            f"{result['teacher_mb']:.0f} MB.",
            "",
            "| step | engine | by count | passes | step | share | memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            method, engine = row["method"], row["engine"]
            floor = ROWS[method].floor
            memory = row["peak_mb"] / result["teacher_mb"]
            cells = [
                method,
                ENGINES[engine],
                f"{floor:.2f}" if engine == "dual" else "",
                ratio(row["passes"], row["passes_quartiles"]),
                ratio(row["teacher_steps"], row["quartiles"]),
                f"{row['passes_share']:.2f}",
                f"{memory:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            if engine == "dual" and method in TARGETS:
                verdict = judged(row["teacher_steps"], memory, TARGETS[method], floor)
                cells = [method, result["title"], f"{floor:.2f}", f"{TARGETS[method]:.2f}", f"{row['passes']:.2f}"]
                cells += [f"{row['teacher_steps']:.2f}", f"{memory:.2f}", verdict]
                verdicts.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [
        "## Against the targets",
        "",
        f"With pairs; the step at most as said, memory at most {MEMORY_TARGET}.",
        "",
        "| step | network | floor | target | passes | step | memory | |",
        "|---|---|---|---|---|---|---|---|",
        *sorted(verdicts, key=lambda line: list(TARGETS).index(line.split(" | ")[0].removeprefix("| "))),
    ]
    return "\n".join(lines) + "\n"


def ratio(median: float, quartiles: Sequence[float]) -> str:
    """A ratio with its quartiles."""
    return f"{median:.2f} ({quartiles[0]:.2f}–{quartiles[1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of training steps in teacher steps.")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # what a child process does
    arguments = arguments_of(parser, "network", NETWORKS)
    torch.set_num_threads(1)
    if arguments.peak:
        peak(*arguments.peak)
        return
    path = RESULTS / "step_cost.json"
    report = json.loads(path.read_text()) if path.exists() and arguments.networks else {}
    # results of before the passes were timed do not fit the page
    report = {name: result for name, result in report.items() if all("passes" in row for row in result["rows"])}
    for name in arguments.networks or NETWORKS:
        report[name] = run(name)
        report = {known: report[known] for known in NETWORKS if known in report}
        write(report, path, markdown)
    print(markdown(report))


if __name__ == "__main__":
    main()
