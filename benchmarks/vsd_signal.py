# SPDX-License-Identifier: Apache-2.0
"""For bench_vsd.py: F_teacher − F_φ over t, for two F_φ that were trained alone on the samples of the demo's sCD student: what they
agree on, what not, and the gradients of the weighted losses, with those of sCD beside them.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from vsd_demo import FAKE, SCALES, Demo, settings  # before torch: it sets its threads

# isort: split
import torch
from torch import Tensor, nn

from scm_core.guidance import guided, sample_guidance, teacher_velocity
from scm_core.objectives.consistency import Conditioned
from scm_core.objectives.methods import METHODS
from scm_core.objectives.vsd import generate
from scm_core.seeds import derive_seed, generator_for
from scm_core.tangent import tangent
from scm_core.train.state import TrainState
from scm_core.train.step import train_step
from scm_core.trigflow import diffuse, t_max, velocity

GUIDANCE = (1.0, 1.5, 2.0)
TIMES = (0.05, 0.2, 0.5, 0.8, 1.1, 1.3, 1.45, 1.52, 1.555)


def fake_of(demo: Demo, seed: int, iterations: int = 1000) -> nn.Module:
    """F_φ, told s, trained alone on the samples of the sCD student."""
    method = METHODS["vsd"](demo.copy_of_scd(), demo.teacher.net, demo.sigma_data, demo.data.shape, guidance=SCALES)
    other = method.companions["fake"]
    state = TrainState(other.net, settings(iterations, FAKE["fake_lr"], derive_seed(seed, "alone")), other.heads)
    batches = demo.data.batches(state.settings)
    state.train()
    for i in range(iterations):
        train_step(state, other.objective, batches(i))
    return other.net.eval()


def signal(demo: Demo, count: int = 250) -> dict[str, Any]:
    """E(F_teacher − F_φ)² by scale and t: what two F_φ agree on, and what not; at t = π/2 from the means of the samples.

    The gradients of L_VSD with respect to the student's weights at one t, with e^w at its optimum: norm, and cosine between the two F_φ.
    With them that of L_sCD, and the mean of the teacher's denoiser against the data's, over the classes (units of σ_d²).
    """
    pair, sigma_data, net = [fake_of(demo, seed) for seed in (0, 1)], demo.sigma_data, demo.copy_of_scd().eval()
    generator = generator_for("signal")
    labels = torch.arange(count) % demo.slot.dataset.labels
    rows: list[dict[str, float]] = []
    for scale in GUIDANCE:
        s = torch.full((count,), scale)
        x0 = generate(net, noise(demo, count, generator), sigma_data, labels, s)
        for at in TIMES:
            t = torch.full((count,), at)
            x = diffuse(x0.detach(), noise(demo, count, generator), t) / sigma_data
            with torch.no_grad():
                teacher = guided(demo.teacher.net, x, t, labels, s)
                a, b = (teacher - fake(x, t, labels, s) for fake in pair)
            row = {"guidance": scale, "t": at, "signal": mean(a * b), "noise": mean((a - b) ** 2) / 2}
            one, other = (gradient(net, x0, difference) for difference in (a, b))
            cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
            rows.append({**row, "gradient": float(one.norm()), "cosine": cosine})
        rows.append({"guidance": scale, "t": math.pi / 2, "signal": far_signal(demo, scale, generator)})
    return {
        "rows": [{key: round(value, 5) for key, value in row.items()} for row in rows],
        "teacher_bias": {f"{at:g}": round(teacher_bias(demo, at, generator), 5) for at in TIMES},
        "scd_gradient": {f"{at:g}": round(scd_gradient(demo, net, at, generator, count), 4) for at in TIMES},
    }


def gradient(net: nn.Module, output: Tensor, direction: Tensor) -> Tensor:
    """Of the mean of e^w/D ‖output − sg(output) + direction‖², e^w = D/E‖direction‖², for the weights of `net`, in one piece."""
    pulled = (2 * direction / mean(direction**2) / direction[0].numel() * output).flatten(1).sum(1).mean()
    found: Iterable[Tensor | None] = torch.autograd.grad(
        pulled, list(net.parameters()), retain_graph=True, allow_unused=True
    )
    return torch.cat([part.flatten() for part in found if part is not None])


def scd_gradient(demo: Demo, net: nn.Module, at: float, generator: torch.Generator, count: int) -> float:
    """The norm of L_sCD's gradient at one t, over the scales, with e^w at its optimum."""
    known, sigma_data = demo.data.labels, demo.sigma_data
    assert known is not None
    indices, t = torch.arange(count) * (demo.data.count // count), torch.full((count,), at)
    x0, labels = demo.store.sample(indices, generator), known[indices]
    s, z = sample_guidance(count, *SCALES, generator), noise(demo, count, generator)
    x_t = diffuse(x0, z, t)
    dxdt = teacher_velocity(demo.teacher.net, sigma_data)(x_t, t, velocity(x0, z, t), labels, s)
    F, g, _ = tangent(Conditioned(net, labels, s), x_t, t, dxdt, sigma_data, 1.0, "norm", 0.1, "auto")
    return float(gradient(net, F, g).norm())


def noise(demo: Demo, count: int, generator: torch.Generator) -> Tensor:
    """z of the data's shape."""
    return demo.sigma_data * torch.randn(count, *demo.data.shape, generator=generator)


def mean(x: Tensor) -> float:
    return float(x.mean())


@torch.no_grad()
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


@torch.no_grad()
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
    return statistics.fmean(found)


def table(found: Mapping[str, Any]) -> list[str]:
    """`signal` as lines of Markdown."""
    columns = [
        "t",
        "σ",
        "teacher's mean",
        *(f"s = {s:g}: signal, noise; gradient, cosine" for s in GUIDANCE),
        "gradient of sCD",
    ]
    lines = [
        "## (F_teacher − F_φ)² on the samples of the sCD student",
        "",
        "Signal: what two F_φ agree on; noise: what not. Gradient: the weighted loss's at that t, its norm and its cosine.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for at in (*TIMES, math.pi / 2):
        key, far = f"{at:g}", at > max(TIMES)
        cells = [
            "π/2" if far else key,
            "∞" if far else f"{0.5 * math.tan(at):.2f}",
            str(found["teacher_bias"].get(key, "")),
        ]
        for row in (row for row in found["rows"] if abs(row["t"] - at) < 1e-4):
            rest = "" if far else f", {row['noise']:.4f}; {row['gradient']:.2f}, {row['cosine']:.2f}"
            cells.append(f"{row['signal']:.4f}{rest}")
        lines.append("| " + " | ".join([*cells, str(found["scd_gradient"].get(key, ""))]) + " |")
    return [*lines, ""]
