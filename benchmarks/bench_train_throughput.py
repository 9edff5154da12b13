# SPDX-License-Identifier: Apache-2.0
"""What the training engine adds to a step, and whether data keep up: `python benchmarks/bench_train_throughput.py [NETWORK …]`.

Overhead: `scm_core.train.loop.train` against the same step written out in plain PyTorch below, whose weights are first compared with the
engine's. They take turns step by step, A B A B …, within one run on one thread, so that a busy machine slows both alike: the objective that
the engine calls stops its clock, makes a plain step, and starts it again. Data: batches per second of the loader alone (latents in files,
memory-mapped, as the pipeline has them) against what a teacher's steps consume, and what a step costs with data made in place or ahead.
On a GPU: images per second, utilisation and peak memory of EDM2 S on 4×64×64 latents in bf16.

Networks of the first two: the demo's S and M, EDM2 XS on 4×16×16 latents. Writes benchmarks/results/train_throughput.json and .md; networks
that are not named keep their results, and so does the GPU where there is none.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_step_cost import NETWORKS as ALL_NETWORKS
from bench_step_cost import Network  # before torch: it sets its threads

# isort: split
import torch
from gpu_throughput import edm2_s, gpu_lines, run_gpu
from report import RESULTS, arguments_of, processor, write
from torch import Tensor
from trained import LR, SIGMA_REL, STEPS, Set, some_batch, stored

from scm_core.data.loader import Prefetcher
from scm_core.ema import power_beta, sigma_rel_to_gamma
from scm_core.nn.build import build_network, count_parameters
from scm_core.nn.layers import mp_weights, row_dims, row_rms
from scm_core.objectives import Batch, Terms
from scm_core.train.loop import train
from scm_core.train.step import train_step

IMAGES = {"demo-S": 5000, "demo-M": 5000, "xs-16": 20_000}  # in the data set
NETWORKS = {name: ALL_NETWORKS[name] for name in IMAGES}
DEPTHS = {"in place": 0, "ahead": 2}
GPU_BATCH = 64
OVERHEAD_TARGET = 0.03
DATA_TARGET = 10.0
WARM_UP = 2  # rounds that do not count


class Plain:
    """The step as one would write it down for this one run: the engine's mathematics without anything else."""

    def __init__(self, trained: Set) -> None:
        self.net, self.objective = trained.net, trained.objective
        self.weights = [layer.weight for _, layer in mp_weights(self.net)]
        self.source = list(self.net.parameters())
        self.parameters = [*self.source, *trained.head.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, betas=(0.9, 0.99), eps=1e-8, fused=True)
        self.average = [p.detach().clone() for p in self.source]
        self.gamma, self.nimg, self.iteration = sigma_rel_to_gamma(SIGMA_REL), 0, 0
        self.generator = torch.Generator(self.source[0].device).manual_seed(0)
        self.net.train()

    def __call__(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(batch, self.generator, self.iteration).loss
        loss.backward()
        with torch.no_grad():
            for w in self.weights:
                assert w.grad is not None
                w.grad.addcmul_(w, (w * w.grad).mean(dim=row_dims(w), keepdim=True), value=-1)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            self.optimizer.step()
            for w in self.weights:
                w.div_(row_rms(w))
            self.nimg, self.iteration = self.nimg + len(batch.x0), self.iteration + 1
            torch._foreach_lerp_(self.average, self.source, 1 - power_beta(self.nimg, len(batch.x0), self.gamma))
        return norm


# ---- what the engine adds --------------------------------------------------------------------------------------------------


def disagreement(network: Network, step: str, iterations: int = 3) -> float:
    """The largest difference of a weight or an average between the engine and the plain step, both from the same random numbers."""
    a, b, batch = Set(network, step), Set(network, step), some_batch(network)
    plain = Plain(b)

    def both(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        plain.generator.set_state(generator.get_state())
        plain(batch)
        return a.objective(batch, generator, iteration)

    state = a.state(iterations, network.batch)
    train(state, both, lambda iteration: batch)
    averages = zip(state.averaged().items(), plain.average, strict=True)
    layers = {f"{name}.weight" for name, _ in mp_weights(a.net)}
    pairs = [*zip(a.parameters(), b.parameters(), strict=True)]
    pairs += [(p, q / row_rms(q) if name in layers else q) for (name, p), q in averages]  # normalised, as they are used
    return max((p - q).abs().max().item() for p, q in pairs)


def overhead(network: Network, step: str, seconds: float) -> list[tuple[float, float]]:
    """(seconds of an engine's step, seconds of a plain one), in turn, for about so long; at least seven."""
    a, b, batch = Set(network, step), Set(network, step), some_batch(network)
    plain = Plain(b)
    for _ in range(WARM_UP):
        begin = time.perf_counter()
        plain(batch)
    rounds = max(7, round(seconds / 2 / (time.perf_counter() - begin)))
    times: list[tuple[float, float]] = []
    began = math.nan

    def turn(batch: Batch, generator: torch.Generator, iteration: int) -> Terms:
        """The engine's objective: from one call to the next is one step of the engine, all that the loop does with it included."""
        nonlocal began
        ended = time.perf_counter()
        plain(batch)
        times.append((ended - began, time.perf_counter() - ended))
        began = time.perf_counter()
        return a.objective(batch, generator, iteration)

    train(a.state(rounds + WARM_UP, network.batch), turn, lambda iteration: batch)
    return times[WARM_UP:]


def summary(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median of the ratios less one, its 95 % interval (1.57 interquartile ranges / √n), and the medians in ms."""
    low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
    half = 1.57 * (high - low) / math.sqrt(len(times))
    medians = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    engine, plain = medians
    return {
        "overhead": round(middle - 1, 4),
        "interval": [round(middle - 1 - half, 4), round(middle - 1 + half, 4)],
        "engine_ms": round(engine, 2),
        "plain_ms": round(plain, 2),
        "rounds": len(times),
    }


# ---- data ------------------------------------------------------------------------------------------------------------------


def alone(at: Callable[[int], Batch], depth: int, seconds: float) -> float:
    """Batches per second of the loader when nothing else is done; the first hundred fill the page cache."""
    with Prefetcher(at, depth=depth) as batches:
        for iteration in range(100):
            batches(iteration)
        begin, iteration = time.perf_counter(), 100
        while time.perf_counter() - begin < seconds or iteration < 107:
            batches(iteration)
            iteration += 1
        return (iteration - 100) / (time.perf_counter() - begin)


def in_training(network: Network, at: Callable[[int], Batch], seconds: float, block: int) -> dict[str, float]:
    """What data made in place and ahead add to a teacher's step, as a share of one that gets the same batch again: blocks in turn."""
    same = some_batch(network)
    trained = Set(network, "teacher")
    state = trained.state(1, network.batch)
    trained.net.train()
    ways: dict[str, tuple[Callable[[int], Batch], int]] = {"same": (lambda iteration: same, 0)}
    ways |= {name: (at, depth) for name, depth in DEPTHS.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(taken["same"]) < 4:
        for name, (source, depth) in ways.items():
            with Prefetcher(source, depth=depth) as batches:
                train_step(state, trained.objective, batches(0))
                start = time.perf_counter()
                for iteration in range(1, block + 1):
                    train_step(state, trained.objective, batches(iteration))
                taken[name].append((time.perf_counter() - start) / block)
    rounds = zip(*(taken[name][1:] for name in ways), strict=True)  # the first block warms up
    ratios = [[way / first - 1 for way in others] for first, *others in rounds]
    return dict(zip(DEPTHS, (round(statistics.median(column), 4) for column in zip(*ratios, strict=True)), strict=True))


def run(name: str, seconds: float) -> dict[str, Any]:
    """Everything about one network on this machine's CPU."""
    network = NETWORKS[name]()
    steps: dict[str, Any] = {}
    for step in STEPS:
        steps[step] = {"difference": disagreement(network, step), **summary(overhead(network, step, seconds))}
    needed = 1000 / steps["teacher"]["engine_ms"]
    with tempfile.TemporaryDirectory() as folder:
        at = stored(network, IMAGES[name], Path(folder))
        rates = {way: round(alone(at, depth, min(seconds / 10, 5)), 1) for way, depth in DEPTHS.items()}
        block = max(1, min(20, round(needed * seconds / 12)))
        added = in_training(network, at, seconds / 2, block)
    return {
        "title": network.title, "batch": network.batch, "parameters": count_parameters(build_network(network.config)),
        "steps": steps, "images": IMAGES[name], "needed": round(needed, 2), "rates": rates, "added": added,
        "cpu": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


# ---- the report ------------------------------------------------------------------------------------------------------------


def percent(x: float) -> str:
    return f"{100 * x:+.1f} %"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# Throughput of training",
        "",
        "## What the engine adds to a step",
        "",
        "`train` against the same step in plain PyTorch, in turn on one thread: the median over rounds of the ratio of a round's two "
        "steps, less one, with its 95 % interval. *Difference*: the largest of any weight or average after three steps of both from the "
        "same random numbers.",
        "",
        "| network | step | engine | plain | added | rounds | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    networks = report["networks"]
    for result in networks.values():
        for step, row in result["steps"].items():
            low, high = map(percent, row["interval"])
            lines.append(
                f"| {result['title']}, batch {result['batch']} | {step} | {row['engine_ms']:.1f} ms | {row['plain_ms']:.1f} ms "
                f"| {percent(row['overhead'])} ({low} to {high}) | {row['rounds']} | {row['difference']:.0e} |"
            )
    lines += [
        "",
        "## Whether data keep up",
        "",
        "Latents in files, memory-mapped, drawn from their posterior: batches per second of the loader alone, made in place or two ahead "
        "by a thread, over what a teacher's steps consume; and what either adds to the time of a step that gets one batch again and again.",
        "",
        "| network | images | consumed | in place | ahead | adds in place | adds ahead |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in networks.values():
        rates = [f"{rate:.0f}/s ({rate / result['needed']:.0f} ×)" for rate in result["rates"].values()]
        added = [percent(value) for value in result["added"].values()]
        title = f"{result['title']}, batch {result['batch']}"
        lines.append(f"| {title} | {result['images']:,} | {result['needed']:.1f}/s | {' | '.join(rates + added)} |")
    lines.append("")
    lines += [
        f"- {result['title']}: {result['cpu']}, {result['cores']} cores, load average {result['load']} after; torch {result['torch']}"
        for result in networks.values()
    ]
    lines += ["", "## On a GPU", "", *gpu_lines(report.get("gpu"))]
    worst = max(
        (row["overhead"], f"{r['title']}, {step}") for r in networks.values() for step, row in r["steps"].items()
    )
    slowest = min(
        (rate / r["needed"], f"{r['title']}, {way}") for r in networks.values() for way, rate in r["rates"].items()
    )
    lines += [
        "",
        "## Against the targets",
        "",
        f"- The engine adds at most {percent(OVERHEAD_TARGET)}: {percent(worst[0])} at worst ({worst[1]})",
        f"- The loader alone gives at least {DATA_TARGET:.0f} × what is consumed: {slowest[0]:.0f} × at worst ({slowest[1]})",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of the training engine, data, throughput.")
    parser.add_argument("--seconds", type=float, default=60.0, help="to spend on each measurement of overhead")
    parser.add_argument("--batch", type=int, default=GPU_BATCH, help="on a GPU")
    arguments = arguments_of(parser, "network", NETWORKS)
    torch.set_num_threads(1)
    path = RESULTS / "train_throughput.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"networks": {}, "gpu": None}
    for name in arguments.networks or NETWORKS:
        report["networks"][name] = run(name, arguments.seconds)
        report["networks"] = {known: report["networks"][known] for known in NETWORKS if known in report["networks"]}
        write(report, path, markdown)
    if torch.cuda.is_available():
        report["gpu"] = run_gpu(edm2_s(arguments.batch), "cuda", 10.0)
        write(report, path, markdown)
    else:
        print("no CUDA device: throughput on a GPU is skipped")
    print(markdown(report))


if __name__ == "__main__":
    main()
