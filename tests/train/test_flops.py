# SPDX-License-Identifier: Apache-2.0
"""FLOPs against counts by hand, the share of a device's peak, memory."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scm_core.guidance import data_velocity, teacher_velocity
from scm_core.nn.attention import attention
from scm_core.nn.build import Model, build_network, student_of
from scm_core.nn.dual import Dual
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch
from scm_core.objectives.consistency import ConsistencyObjective
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.train.flops import PEAKS, count_flops, memory, peak_flops, utilisation
from scm_core.train.state import TrainSettings, TrainState
from scm_core.train.step import train_step

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"architecture": "small", "channels": 4, "resolution": 8, "labels": 10, "width": 32, "blocks": 4}
BATCH = 4


def forward_and_backward(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[int, int]:
    """FLOPs of a forward alone, and with the gradients of all arguments."""
    with torch.no_grad():
        forward = count_flops(lambda: function(*arguments))
    leaves = [x.detach().requires_grad_() for x in arguments]
    return forward, count_flops(lambda: function(*leaves).sum().backward())


def test_a_linear_layer() -> None:
    one = 2 * 5 * 7 * 3  # a multiplication and an addition for each sample, input and output
    assert forward_and_backward(nnf.linear, torch.randn(5, 7), torch.randn(3, 7)) == (one, 3 * one)


def test_a_convolution() -> None:
    one = 2 * (2 * 6 * 5) * (4 * 3 * 3) * 8  # for each position, tap and output channel
    x, w = torch.randn(2, 4, 6, 5), torch.randn(8, 4, 3, 3)
    assert forward_and_backward(lambda x, w: nnf.conv2d(x, w, padding=1), x, w) == (one, 3 * one)
    w.requires_grad_()  # a first layer: its input needs no gradient
    assert count_flops(lambda: nnf.conv2d(x, w, padding=1).sum().backward()) == 2 * one


B, HEADS, L, KEYS, D = 2, 3, 11, 7, 4
PRODUCT = 2 * B * HEADS * L * KEYS * D


def qkv() -> list[Tensor]:
    return [torch.randn(B, HEADS, length, D) for length in (L, KEYS, KEYS)]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=["math", "flash"])
def test_attention_costs_the_same_in_every_kernel(backend: SDPBackend) -> None:
    """q kᵀ and p v; then ∂p, ∂v, ∂q and ∂k. That the fused kernel computes the scores again does not count."""
    with sdpa_kernel(backend):
        assert forward_and_backward(attention, *qkv()) == (2 * PRODUCT, 6 * PRODUCT)


def test_the_tangent_of_attention_in_pytorch() -> None:
    """Beside the value's 2: q kᵀ again, q̇ kᵀ, q k̇ᵀ, (p ⊙ ẋ) v, p v̇, of which a constant v saves the last and moving v alone the middle."""
    q, k, v = qkv()
    dq, dk, dv = qkv()
    pairs: list[tuple[tuple[Tensor | Dual, ...], int]] = [
        ((Dual(q, dq), Dual(k, dk), Dual(v, dv)), 5),
        ((Dual(q, dq), Dual(k, dk), v), 4),
        ((Dual(q, dq), k, v), 3),
        ((q, k, Dual(v, dv)), 2),
    ]
    for arguments, expected in pairs:
        with torch.no_grad():
            assert count_flops(partial(attention, *arguments, backend="chunked")) == (2 + expected) * PRODUCT


TRITON = """
import sys, torch
from scm_core.nn import flash_jvp
from scm_core.nn.attention import attention
from scm_core.nn.dual import Dual
from scm_core.nn.embedding import LogVarHead
from scm_core.train.flops import count_flops
before = flash_jvp.flash_attention
q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (11, 7, 7))
dq, dk, dv = (torch.randn(2, 3, n, 4) for n in (11, 7, 7))
def step(*pairs):
    attention(*pairs, backend="triton").value.sum().backward()
print(count_flops(lambda: step(Dual(q, dq), Dual(k, dk), Dual(v, dv))))
print(count_flops(lambda: step(q, k, Dual(v, dv))))
with torch.no_grad():
    print(count_flops(lambda: attention(Dual(q, dq), k, v, backend="triton")))
assert flash_jvp.flash_attention is before
"""


@pytest.mark.slow
def test_the_triton_kernels_are_counted() -> None:
    """By what App. F needs: 2 for the value, 4 for its backward, and 4, 1 and 2 for these tangents. In Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(line) / PRODUCT for line in done.stdout.split()] == [10, 7, 4]


def test_a_compiled_network_is_counted_like_another() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 16, 8))
    x = torch.randn(3, 4, 4, 4)
    compiled = torch.compile(net, backend="aot_eager")
    compiled(x)
    expected = count_flops(lambda: net(x).sum().backward())
    assert count_flops(lambda: compiled(x).sum().backward()) == expected > 0


class Steps:
    """Training steps of a small network: the teacher's, and the students' with the options of `ConsistencyObjective`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = build_network(CONFIG)
        nn.init.ones_(self.net.get_parameter("out_gain"))
        x0 = 0.5 * torch.randn(BATCH, 4, 8, 8)
        self.batch = Batch(x0, torch.arange(BATCH), torch.arange(BATCH))
        self.settings = TrainSettings(9, BATCH, 1e-2, seed=1, ema_sigma_rel=0.1)

    def forward(self) -> int:
        """FLOPs of one pass: the convolutions and, for each sample, the embedding's and blocks' matrices."""
        w, layers = CONFIG["width"], 1 + 2 * CONFIG["blocks"] + 1
        widths = [(17, w), *[(w, w)] * (layers - 2), (w, 16)]  # 4×4 positions, 4·2² channels and the constant one
        convolutions = 16 * sum(a * b * 9 for a, b in widths)
        embedding = w * 2 * w + 10 * 2 * w + CONFIG["blocks"] * (2 * w * 2 * w)
        return 2 * BATCH * (convolutions + embedding)

    def teacher(self) -> tuple[TrainState, Callable[[], object]]:
        head = LogVarHead(0.0)
        state = TrainState(copy.deepcopy(self.net), self.settings, {"logvar": head})
        objective = DiffusionObjective(state.net, head, 0.5, -0.4, 1.0, 0.1)
        return state, lambda: train_step(state, objective, self.batch)

    def student(
        self, distil: bool, guidance: tuple[float, float] | None = None, **options: str
    ) -> tuple[TrainState, Callable[[], object]]:
        teacher = copy.deepcopy(self.net).eval().requires_grad_(False)
        net, _ = student_of(Model(teacher, CONFIG, {}), guidance is not None, 0.1)
        velocity = teacher_velocity(teacher, 0.5) if distil else data_velocity
        objective = ConsistencyObjective(net, None, velocity, 0.5, -1.0, 1.4, 0, guidance=guidance, **options)
        state = TrainState(net, self.settings)
        return state, lambda: train_step(state, objective, self.batch)


def test_inference_mode_takes_no_operation_apart() -> None:
    x, w = torch.randn(5, 7), torch.randn(3, 7)
    with torch.inference_mode():
        assert count_flops(lambda: nnf.linear(x, w)) == 2 * 5 * 7 * 3
        assert count_flops(lambda: attention(*qkv())) == 2 * PRODUCT


def test_a_network() -> None:
    steps = Steps()
    labels = steps.batch.labels
    with torch.no_grad():
        count = count_flops(lambda: steps.net(steps.batch.x0, torch.full((BATCH,), 0.7), labels))
    assert count == steps.forward()


def test_training_steps_cost_what_their_passes_do() -> None:
    """In forwards: teacher 3, sCT 4, sCD 5, guided sCD 6, less the gradient with respect to the network's input (a first layer)."""
    steps = Steps()
    one = steps.forward()
    made = [steps.teacher(), steps.student(False), steps.student(True), steps.student(True, (1.0, 2.0))]
    found = [count_flops(step) / one for _, step in made]
    assert found == pytest.approx([3, 4, 5, 6], abs=0.08)
    assert all(number < floor + 0.01 for number, floor in zip(found, (3, 4, 5, 6), strict=True))


@pytest.mark.parametrize("engine", ["dual", "func", "finite_difference"])
def test_counting_runs_the_step_once_and_changes_nothing(engine: str) -> None:
    """The same weights, moments and averages, bit for bit; with torch.func.jvp too, whose zero tangents need care."""
    results = []
    for counted in (False, True):
        state, step = Steps().student(True, (1.0, 2.0), engine=engine)
        for _ in range(2):
            if counted:
                count_flops(step)
            else:
                step()
        assert state.iteration == 2
        results.append(state.tensors())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("Tesla V100-PCIE-32GB", torch.float16, 112e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.float64, 19.5e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float16, 989e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165.2e12),
        ("NVIDIA H200", torch.int8, None),
        *[
            (name, torch.float16, None)  # others, whose names hold one of ours
            for name in ("NVIDIA L40S", "NVIDIA GB200", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H200 MIG 1g.18gb")
        ],
    ],
)
def test_peaks(name: str, dtype: torch.dtype, expected: float | None) -> None:
    assert peak_flops(name, dtype) == expected


def test_peaks_are_of_dense_products() -> None:
    """Data sheets print twice the number, for sparse ones: TF32 has half of 16 bits' speed, and those within what one generation brings."""
    for peak in PEAKS.values():
        assert peak.bfloat16 in (None, peak.float16)
        assert peak.tf32 is None or peak.tf32 == pytest.approx(peak.float16 / 2, rel=0.03)


def test_float32_is_tf32_where_torch_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Setting:
        fp32_precision = "ieee"

    convolution, product = Setting(), Setting()
    monkeypatch.setattr(torch.backends.cudnn, "conv", convolution)
    monkeypatch.setattr(torch.backends.cuda, "matmul", product)
    for convolution.fp32_precision, product.fp32_precision, expected in (
        ("ieee", "ieee", 19.5e12),
        ("tf32", "ieee", 156e12),
        ("ieee", "tf32", 156e12),
    ):
        assert peak_flops("NVIDIA A100-SXM4-40GB", torch.float32) == expected
        assert peak_flops("Tesla V100-SXM2-32GB", torch.float32) == 15.7e12


def test_utilisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert utilisation(78e12, 0.5, "cuda", torch.bfloat16) == pytest.approx(0.5)
    assert utilisation(78e12, 0.5, torch.device("cuda", 1), torch.bfloat16, processes=4) == pytest.approx(0.125)
    assert utilisation(78e12, 0.5, "cpu", torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert utilisation(78e12, 0.5, "cuda", torch.bfloat16) is None
    with pytest.raises(ValueError, match=r"seconds_per_step: expected a positive number, got 0"):
        utilisation(1.0, 0, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"processes: expected a positive number, got 0"):
        utilisation(1.0, 1, "cpu", torch.float32, processes=0)


def test_memory_grows_with_what_is_held() -> None:
    before = memory()
    held = torch.ones(100 * 2**20, dtype=torch.uint8)
    grown = memory()["rss"] - before["rss"]
    assert 0.9 * len(held) < grown < 1.5 * len(held)
    assert ("cuda_peak" in before) == torch.cuda.is_initialized()


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak, which is not below what is held now."""
    now = memory()["rss"]

    def missing(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    assert 0.9 * now < memory()["rss"] < 100 * now
