# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint costs the training that goes on: `python benchmarks/bench_checkpoint.py [NETWORK …]`.

A state of weights, Adam's two moments and one average (16 bytes for each parameter) is trained, by whole training steps on one thread, in
turn without a checkpoint being written and with one: as many steps as begin while the background writes. The *stall* of a checkpoint is the
time that training loses to it: the call of `save_async`, and what the steps beside the writing take longer than the median of the steps
before and after. Linux counts how long the training's thread was ready to run while others had the cores; that part of the stall is told
apart, because on a busy machine it says more about the other processes than about the checkpoint. The copy of the state, the one part that
training has to wait for, is timed by itself; the target is a stall of at most 1 s beyond it. `save`, which does all in the foreground, is
timed for comparison. On a GPU, if there is one: the steps are then there too.

Networks: the demo's M, EDM2 XS and S (0.13 and 0.29 billion parameters). Writes benchmarks/results/checkpoint.json and .md; networks that
are not named keep their results. The folder of the checkpoints is a temporary one, in TMPDIR. S takes 12 GB of memory: twice the state, and
the gradients.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from bench_step_cost import SIGMA_DATA, Network, demo, edm2_xs, memory_mb  # noqa: E402
from report import RESULTS, arguments_of, measure, processor  # noqa: E402
from torch import nn  # noqa: E402

from scm_core.nn.build import build_network, count_parameters  # noqa: E402
from scm_core.nn.embedding import LogVarHead  # noqa: E402
from scm_core.nn.unet_edm2 import WIDTHS  # noqa: E402
from scm_core.objectives import Batch  # noqa: E402
from scm_core.objectives.diffusion import DiffusionObjective  # noqa: E402
from scm_core.train.checkpoint import CheckpointStore  # noqa: E402
from scm_core.train.state import TrainSettings, TrainState  # noqa: E402
from scm_core.train.step import train_step  # noqa: E402

TARGET = 1.0  # seconds of stall beyond the copy


def edm2_s(resolution: int, batch: int) -> Network:
    """EDM2 S, otherwise as XS."""
    xs = edm2_xs(resolution, batch)
    return xs._replace(title=f"EDM2 S, 4×{resolution}×{resolution}", config={**xs.config, "width": WIDTHS["S"]})


NETWORKS: dict[str, Callable[[], Network]] = {
    "demo-M": lambda: demo("M"),
    "xs": lambda: edm2_xs(16, 2),
    "s": lambda: edm2_s(16, 2),
}
ROUNDS = {"demo-M": 20, "xs": 4, "s": 3}


class Seconds(NamedTuple):
    """What something took: by the clock, and of that, waiting for a core."""

    wall: float
    waited: float

    @property
    def own(self) -> float:
        return self.wall - self.waited


def waited() -> float:
    """Seconds that this thread was ready to run but had no core."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def timed(call: Callable[[], object]) -> Seconds:
    begin, before = time.perf_counter(), waited()
    call()
    return Seconds(time.perf_counter() - begin, waited() - before)


def training(network: Network, device: torch.device) -> tuple[TrainState, Callable[[], None]]:
    """A state, and a step of it."""
    config = network.config
    shape = (config["channels"], config["resolution"], config["resolution"])
    torch.manual_seed(0)
    x0 = SIGMA_DATA * torch.randn(network.batch, *shape)
    indices = torch.arange(network.batch)
    batch = Batch(x0.to(device), (indices % config["labels"]).to(device), indices)
    net, head = build_network(config).to(device), LogVarHead(0.0).to(device)
    nn.init.ones_(net.get_parameter("out_gain"))  # as in training: it starts at 0
    settings = TrainSettings(10**6, network.batch, 1e-4, 0, ema_sigma_rel=0.05)
    state = TrainState(net, settings, {"logvar": head})
    objective = DiffusionObjective(net, head, SIGMA_DATA, -0.4, 1.0, 0.1)

    def step() -> None:
        train_step(state, objective, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return state, step


def run(name: str, folder: Path) -> dict[str, Any]:
    """Everything about one network."""
    network = NETWORKS[name]()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, step = training(network, device)
    state_mb = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values()) / 2**20
    store = CheckpointStore(folder, keep=1)
    step()
    first = timed(lambda: store.save_async(state.iteration, state.tensors(), state.meta()))  # makes the buffers
    store.wait()
    foreground = timed(lambda: store.save(state.iteration + 1, state.tensors(), state.meta()))

    def copied() -> None:
        store._buffers.fill(state.tensors())()

    copies, rounds, alone = [timed(copied) for _ in range(3)], [], [timed(step), timed(step)]
    for index in range(ROUNDS[name]):
        begin = time.perf_counter()
        call = timed(lambda: store.save_async(10 + state.iteration, state.tensors(), state.meta()))
        beside = []
        while store.writing():
            beside.append(timed(step))
        store.wait()
        write = time.perf_counter() - begin
        after = [timed(step) for _ in range(max(2, len(beside)))]
        # before and after, so that a slow change of the machine's load hits all
        wall, own = (statistics.median(getattr(one, what) for one in alone + after) for what in ("wall", "own"))
        alone = after
        rounds.append(
            {
                "call": round(call.wall, 4),
                "write": round(write, 3),
                "steps": len(beside),
                "step": round(wall, 4),
                "step_own": round(own, 4),
                "stall": round(call.wall + sum(one.wall for one in beside) - len(beside) * wall, 4),
                "stall_own": round(call.own + sum(one.own for one in beside) - len(beside) * own, 4),
            }
        )
        print(f"{name}: round {index + 1}: {rounds[-1]}", flush=True)
    return {
        "title": network.title, "batch": network.batch, "parameters": count_parameters(state.net),
        "state_mb": round(state_mb, 1), "first_call": round(first.wall, 3), "copy": round(statistics.median(one.own for one in copies), 4),
        "foreground": round(foreground.wall, 3), "rounds": rounds, "peak_mb": round(memory_mb("VmHWM")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(), "torch": torch.__version__, "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# What a checkpoint costs the training that goes on",
        "",
        "Whole training steps on one thread while `save_async` writes weights, Adam's moments and one average in the background, against "
        "the steps before and after. *Copy*: of the state, in memory. *Stall*: seconds that training loses to a checkpoint, the call and "
        "what the steps beside the writing take longer, median over checkpoints (range); *own*: without the time that the training's "
        "thread had to wait for a core, which other processes had as well as the writer. *Foreground*: what `save` takes.",
        "",
        "| network | state | copy | stall | stall, own | own, beyond the copy | writing | steps meanwhile | foreground |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in report.values():
        rounds = result["rounds"]
        columns = {key: sorted(one[key] for one in rounds) for key in rounds[0]}
        middle = {key: statistics.median(values) for key, values in columns.items()}
        stalls = [
            f"{middle[key]:.2f} s ({columns[key][0]:.2f}–{columns[key][-1]:.2f})" for key in ("stall", "stall_own")
        ]
        lines.append(
            f"| {result['title']}, {result['parameters'] / 1e6:.0f} M | {result['state_mb'] / 1024:.2f} GB | {result['copy']:.2f} s "
            f"| {' | '.join(stalls)} | {middle['stall_own'] - result['copy']:.2f} s | {middle['write']:.1f} s "
            f"| {middle['steps']:.0f} × {middle['step']:.2f} s | {result['foreground']:.1f} s |"
        )
    lines += ["", f"Target: at most {TARGET:.0f} s beyond the copy.", ""]
    lines += [
        f"- {result['title']}: {result['device']}, {result['cores']} cores, load average {result['load']} after; torch {result['torch']}; "
        f"{len(result['rounds'])} checkpoints; the first one, which makes the buffers, had training wait {result['first_call']:.2f} s; "
        f"peak memory {result['peak_mb'] / 1024:.1f} GB."
        for result in report.values()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a checkpoint costs the training that goes on.")
    arguments = arguments_of(parser, "network", NETWORKS)
    torch.set_num_threads(1)

    def in_a_folder(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return run(name, Path(folder) / "checkpoints")

    measure(NETWORKS, arguments.networks, in_a_folder, RESULTS / "checkpoint.json", markdown)


if __name__ == "__main__":
    main()
