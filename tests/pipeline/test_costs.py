# SPDX-License-Identifier: Apache-2.0
"""What a job is expected to cost, against what torch counts, and whether the paper's trainings fit into the GPU that they ask for."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import TypeAdapter

from pipeline import costs, passes
from pipeline.networks import Items, Network
from pipeline.params import load
from scm_core.compat import prepare_torchvision
from scm_core.nn.build import build_network
from scm_core.nn.dual import Dual
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.objectives.methods import METHODS
from scm_core.train.flops import count_flops

ROOT = Path(__file__).resolve().parents[2]
PARAMS = load(ROOT / "params.yaml")
ITEMS = Items(2, 8, 3)
EDM2 = {
    "architecture": "edm2", "width": 32, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": [], "head_channels": 64,
    "norm": "double", "embedding": "positional", "c_noise": "t", "checkpointing": False, "precision": "fp32",
}  # fmt: skip
TANGENT = {"P_mean": -1.0, "P_std": 1.4, "warmup": 5, "normalize": "norm", "c": 0.1, "adaptive_weighting": True}
VSD = {"vsd_P_mean": 0.4, "vsd_P_std": 2.0, "fake_P_mean": -0.8, "fake_P_std": 1.6, "fake_guidance": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "sct": TANGENT,
    "scd": TANGENT,
    "dsct": {**TANGENT, "intervals": 16},
    "dscd": {**TANGENT, "intervals": 16},
    "multistep": {**TANGENT, "segments": 4},
    "vsd": {**VSD, "adaptive_weighting": True},
    "scd_vsd": {**TANGENT, **VSD, "vsd_weight": 1.0},
    "ect": {"P_mean": -1.0, "P_std": 1.8, "stage_iterations": 5, "q": 2.0, "k": 8.0, "b": 1.0, "c": 0.03},
}
CASES = [
    *((method, False) for method in OPTIONS if "vsd" not in method),
    *((method, True) for method in OPTIONS if method not in ("sct", "dsct", "ect")),
]


def section(**changes: Any) -> Any:
    return TypeAdapter(Network).validate_python({**EDM2, **changes})


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(2, ITEMS.channels, ITEMS.resolution, ITEMS.resolution, generator=generator)
    return Batch(x0, torch.tensor([0, 2]), torch.arange(2))


def counted(objective: Any, companions: dict[str, Any]) -> int:
    """FLOPs of one step's passes for each of two items."""

    def step() -> None:
        for other in companions.values():
            other.objective(batch(), torch.Generator().manual_seed(2), 0).loss.backward()
        objective(batch(), torch.Generator().manual_seed(1), 0).loss.backward()

    return count_flops(step) // 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_teachers_step_costs_what_is_counted(checkpointing: bool) -> None:
    network = section(checkpointing=checkpointing)
    net = build_network({**network.config(0.5), **ITEMS._asdict()}).train()
    objective = DiffusionObjective(net, LogVarHead(0.0), 0.5, -0.4, 1.0, 0.1)
    expected = passes.TEACHER.total(guided=False, checkpointing=checkpointing) * network.flops(ITEMS)
    assert counted(objective, {}) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("method", "guided"), CASES)
def test_a_students_step_costs_what_is_counted(method: str, guided: bool) -> None:
    """Within a few percent: beside the network there are its input's gradient, which is not taken, and the products of attention."""
    network = section()
    teacher = build_network({**network.config(0.5), **ITEMS._asdict()}).eval().requires_grad_(False)
    net = build_network({**network.config(0.5), **ITEMS._asdict(), "guidance_input": guided}).train()
    options = {**OPTIONS[method], "guidance": (1.0, 2.0) if guided else None}
    shape = (ITEMS.channels, ITEMS.resolution, ITEMS.resolution)
    made = METHODS[method](net, teacher, 0.5, shape, **options)
    expected = passes.STUDENTS[method].total(guided, checkpointing=False) * network.flops(ITEMS)
    assert counted(made.objective, dict(made.companions)) == pytest.approx(expected, rel=0.05)


def test_every_method_has_its_passes() -> None:
    assert passes.STUDENTS.keys() == METHODS.keys()


def test_the_demos_rate_is_that_of_its_measured_run() -> None:
    slot = PARAMS.scales["demo"].slots["latent_guided"]
    flops = slot.sizes["M"].network.flops(slot.items)
    assert flops == pytest.approx(12.59e6, rel=0.001)


@pytest.mark.slow
def test_the_autoencoders_and_the_extractors_flops() -> None:
    """sd-vae-ft-mse's architecture on the meta device; Inception and DINOv2 as torch-fidelity and timm build them."""
    prepare_torchvision()
    import timm
    from diffusers import AutoencoderKL
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    blocks = (128, 256, 512, 512)
    down, up = ("DownEncoderBlock2D",) * len(blocks), ("UpDecoderBlock2D",) * len(blocks)
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL(
            3,
            3,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=blocks,
            layers_per_block=2,
            latent_channels=4,
        )
        encoding = count_flops(lambda: vae.encode(torch.zeros(1, 3, 512, 512)))
        decoding = count_flops(lambda: vae.decode(torch.zeros(1, 4, 64, 64)))
        vit = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=224).eval()
        dinov2 = count_flops(lambda: vit(torch.zeros(1, 3, 224, 224)))
    assert encoding == pytest.approx(512**2 * costs.ENCODER_FLOPS, rel=0.02)
    assert decoding == pytest.approx(512**2 * costs.DECODER_FLOPS, rel=0.02)
    assert dinov2 == pytest.approx(costs.EXTRACTOR_FLOPS["dinov2"], rel=0.03)
    fetch = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
    with mock.patch(fetch, return_value={}), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    with torch.no_grad():
        inception = count_flops(lambda: network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    assert inception == pytest.approx(costs.EXTRACTOR_FLOPS["inception"], rel=0.03)


def activations(network: Any, items: Items, count: int) -> int:
    """Bytes that the backward pass of a pair of value and tangent keeps of `count` items, beside the weights."""
    with torch.device("meta"):
        net = build_network({**network.config(0.5), **items._asdict()}).train()
    x, t = (
        torch.zeros(count, items.channels, items.resolution, items.resolution, device="meta"),
        torch.zeros(count, device="meta"),
    )
    labels = torch.zeros(count, dtype=torch.long, device="meta") if items.labels else None
    kept: dict[Any, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor too, or its address may be another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(Dual(x, torch.zeros_like(x)), Dual(t, torch.zeros_like(t)), labels)
    weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    return sum(size for storage, (size, _) in kept.items() if storage not in weights)


def fits() -> list[tuple[str, str, str]]:
    scales = {name: scale for name, scale in PARAMS.scales.items() if scale.hardware}
    return [
        (name, slot, size) for name, scale in scales.items() for slot in scale.slots for size in scale.slots[slot].sizes
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "slot", "size"), fits())
def test_every_training_fits_into_its_gpus(scale: str, slot: str, size: str) -> None:
    """By count, since no GPU was at hand: weights, gradients, moments, averages and the other networks of the most demanding training, and
    the activations of a part of a batch, take at most nine tenths of the memory."""
    hardware, data = PARAMS.scales[scale].hardware, PARAMS.scales[scale].slots[slot]
    own, items = data.sizes[size], data.items
    assert hardware is not None
    processes, accumulation = own.engine.processes, own.engine.accumulation
    weights = 4 * own.network.weights(items)
    one, two = (activations(own.network, items, count) for count in (1, 2))
    per_item, per_pass = two - one, 2 * one - two
    moments = 2 * weights / (processes if own.engine.shard_optimizer else 1)
    for training in (own.teacher, *own.students.values()):
        method = getattr(training, "method", "teacher")
        trained = 2 if "vsd" in method else 1  # F_φ beside the student
        averages = 1 + len(training.snapshots.sigma_rel if training.snapshots else ())
        others = 0 if method in ("teacher", "sct", "ect") else 1
        state = trained * (2 * weights + moments) + (averages + others) * weights
        part = -(-training.batch // (processes * accumulation))
        graphs = 2 if method == "scd_vsd" else 1  # of L_sCD and L_VSD, until the backward of their sum
        needed = state + graphs * (part * per_item + per_pass)
        assert needed <= 0.9e9 * hardware.memory_gb, f"{method}: {needed / 1e9:.1f} GB"
