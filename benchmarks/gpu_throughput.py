# SPDX-License-Identifier: Apache-2.0
"""The part of bench_train_throughput.py that needs a GPU: EDM2 S in bf16, every step, engine and way to run."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step_cost import SIGMA_DATA, Network, edm2_xs  # before torch: it sets its threads

# isort: split
import torch
from report import processor
from trained import Set, some_batch, stored

from scm_core.data.loader import Prefetcher
from scm_core.nn.unet_edm2 import WIDTHS
from scm_core.objectives import Batch
from scm_core.train.flops import count_flops, utilisation
from scm_core.train.step import train_step

IMAGES = 4096


def edm2_s(batch: int) -> Network:
    """EDM2 S on latents of ImageNet 512, its trunk in bf16."""
    smaller = edm2_xs(64, batch)
    config = {**smaller.config, "width": WIDTHS["S"], "precision": "bf16"}
    return smaller._replace(title="EDM2 S, 4×64×64, bf16", config=config)


def deviation(network: Network, device: str) -> float:
    """RMS of what compiling changes in a teacher's F, over that of F: rounding, if it is right."""
    batch = some_batch(network)
    t = torch.linspace(0.1, 1.5, len(batch.x0), device=device)
    labels = None if batch.labels is None else batch.labels.to(device)
    net = Set(network, "teacher", device=device).net.eval()
    with torch.no_grad():
        F, compiled = (f(batch.x0.to(device) / SIGMA_DATA, t, labels).double() for f in (net, torch.compile(net)))
    return ((compiled - F).square().mean() / F.square().mean()).sqrt().item()


def throughput(
    network: Network, step: str, engine: str, compiled: bool, at: Callable[[int], Batch], device: str, seconds: float
) -> dict[str, Any]:
    """Images per second with data from the loader, model FLOPs and their share of the device's peak, and peak memory in GB."""
    cuda = device == "cuda"
    trained = Set(network, step, engine, device, compiled)
    state = trained.state(1, network.batch)
    trained.net.train()
    with Prefetcher(at, device) as batches:
        batch = batches(0)
        generator = torch.Generator(device).manual_seed(0)
        flops = count_flops(lambda: trained.objective(batch, generator, 0).loss.backward())
        for iteration in range(5):  # compiles, chooses kernels
            train_step(state, trained.objective, batches(iteration))
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds or count < 10:
            for _ in range(5):
                count += 1
                train_step(state, trained.objective, batches(4 + count))
            if cuda:
                torch.cuda.synchronize()
        taken = (time.perf_counter() - begin) / count
    share = utilisation(flops, taken, device, torch.bfloat16)
    return {
        "images_per_second": round(network.batch / taken, 1),
        "ms": round(1000 * taken, 2),
        "teraflops": round(flops / 1e12, 3),
        "utilisation": None if share is None else round(share, 4),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
    }


def run_gpu(network: Network, device: str, seconds: float) -> dict[str, Any]:
    """Every step, engine and way to run, one after the other; what a way cannot run says why."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        at = stored(network, IMAGES, Path(folder))
        for step, engine in (("teacher", ""), ("sCD", "dual"), ("sCD", "func")):
            for compiled in (False, True):
                row: dict[str, Any] = {"step": step, "engine": engine, "compiled": compiled}
                try:
                    row |= throughput(network, step, engine or "auto", compiled, at, device, seconds)
                except Exception as error:  # a result too: this combination does not run here
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
                rows.append(row)
                torch.compiler.reset()
                if device == "cuda":
                    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(0) if device == "cuda" else processor()
    return {
        "title": network.title, "batch": network.batch, "device": name, "torch": torch.__version__, "rows": rows,
        "compiled_deviation": deviation(network._replace(batch=4), device),
    }  # fmt: skip


def gpu_lines(result: dict[str, Any] | None) -> list[str]:
    """The page's part about the GPU."""
    if result is None:
        return ["Skipped: no CUDA device where this was run."]
    lines = [
        f"{result['title']}, batch {result['batch']}, on {result['device']}; torch {result['torch']}. sCD is guided. Utilisation: model "
        "FLOPs of a step over the device's dense bf16 peak. Compiling changes a teacher's F by "
        f"{100 * result['compiled_deviation']:.2g} % (RMS).",
        "",
        "| step | engine | compiled | images/s | step | utilisation | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        head = f"| {row['step']} | {row['engine']} | {'yes' if row['compiled'] else 'no'} |"
        if "error" in row:
            lines.append(f"{head} does not run: {row['error']} | | | |")
            continue
        share = "unknown" if row["utilisation"] is None else f"{100 * row['utilisation']:.0f} %"
        memory = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f} GB"
        lines.append(f"{head} {row['images_per_second']:.0f} | {row['ms']:.0f} ms | {share} | {memory} |")
    return lines
