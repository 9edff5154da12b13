# SPDX-License-Identifier: Apache-2.0
"""What a step costs: its floating-point operations, the share of the device's peak that they use, and the memory held.

Model FLOPs: the multiplications and additions of matrix products and convolutions (2 for each pair), which is where the time of these
networks goes. What a kernel repeats to save memory does not count: attention costs two products forward and four backward, whichever of
torch's kernels runs. Where no fused kernel is counted as a whole (`chunked` of scm_core/nn/attention.py), what is run is what counts.
"""

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from scm_core.nn.attention import TRITON, Tangents
from scm_core.validate import check_positive

aten = torch.ops.aten


def products(q: Tensor, k: Tensor, count: int) -> int:
    """FLOPs of `count` products of an L × L_k matrix with d columns for each head; q (B, heads, L, d), k (B, heads, L_k, d)."""
    return 2 * q.numel() * k.shape[-2] * count


def _attention(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:
    return products(q, k, 2)  # q kᵀ and p v


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> int:
    return products(q, k, 4)  # ∂p, ∂v, ∂q, ∂k; the scores that a fused kernel computes again do not count


def _baddbmm(y: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # what torch's own table lacks (attention on the CPU, in-place products) or counts with the scores that a kernel computes again
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.baddbmm_: _baddbmm,
}


def count_flops(step: Callable[[], object]) -> int:
    """The model FLOPs of one call of `step`, which runs once, with its forward, tangent and backward passes; this process's alone.

    Counting does not change the step's results. But compiled networks run uncompiled meanwhile (their kernels cannot be looked into), which
    changes their rounding: count a step that is then discarded, such as a loss and its backward without the optimizer.
    """
    counter = _Counter()
    compiled = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), _flash_attention(counter), counter:
        step()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds the FLOPs of torch's operations up. (torch's FlopCounterMode takes fused kernels apart, which changes rounding.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, _real, (args, kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # made of other operations, which inference mode does not take apart
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def _real(x: Tensor) -> Tensor:
    """Zeros for a zero tensor of torch's forward mode, on which torch 2.13 crashes below a dispatch mode."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x


@contextmanager
def _flash_attention(counter: _Counter) -> Iterator[None]:
    """Counts the Triton kernels of attention, which no operation of torch stands for, by the products that App. F needs."""
    if not (TRITON and (torch.cuda.is_available() or "scm_core.nn.flash_jvp" in sys.modules)):
        yield  # nothing in this process launches them, and importing them would import triton
        return
    from scm_core.nn import flash_jvp

    real = flash_jvp.flash_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, tangents: Tangents, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        y, tangent = real(q, k, v, tangents, key_mask)
        tq, tk, tv = (t is not None for t in tangents)
        counter.total += products(q, k, 2 + tq + tk + (tq or tk) + tv)  # q kᵀ, p v; q̇ kᵀ, q k̇ᵀ, (p ⊙ (ẋ − c)) v, p v̇
        if y.requires_grad:

            def backward(grad: Tensor) -> None:
                counter.total += products(q, k, 4)

            y.register_hook(backward)
        return y, tangent

    flash_jvp.flash_attention = counted
    try:
        yield
    finally:
        flash_jvp.flash_attention = real


class Peak(NamedTuple):
    """Peak dense TFLOP/s by format; None where a device has no fast way for it, or its maker does not say."""

    float16: float
    bfloat16: float | None
    tf32: float | None
    float32: float
    float64: float | None


# By the names that torch.cuda.get_device_name gives (regular expressions). Source: NVIDIA's data sheet of each product, as of 2025; where
# it gives numbers with 2:4 sparsity, half of them. 16 bit: tensor cores that accumulate in float32. float32: without tensor cores.
# float64: with them, where there are any.
PEAKS = {
    r"V100-SXM2-\d+GB": Peak(125, None, None, 15.7, 7.8),
    r"V100-PCIE-\d+GB": Peak(112, None, None, 14, 7),
    r"V100S-PCIE-\d+GB": Peak(130, None, None, 16.4, 8.2),
    r"A100(-SXM4|-PCIE)?[- ]\d+GB( PCIe)?": Peak(312, 312, 156, 19.5, 19.5),  # PCIe and SXM alike
    r"H100 80GB HBM3": Peak(989, 989, 494, 67, 67),  # SXM
    r"H100 NVL": Peak(835, 835, 417, 60, 60),
    r"H100 PCIe": Peak(756, 756, 378, 51, 51),
    r"H200": Peak(989, 989, 494, 67, 67),  # SXM
    r"H200 NVL": Peak(835, 835, 417, 60, 60),
    r"B200": Peak(2250, 2250, 1100, 75, 37),  # HGX B200
    r"L4": Peak(121, 121, 60, 30.3, None),
    r"GeForce RTX 4090": Peak(165.2, 165.2, 82.6, 82.6, 1.29),  # Ada GPU architecture white paper, appendix A
}


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Peak dense FLOP/s of a device by its name, computing in `dtype`; None if unknown.

    float32 counts as TF32 where torch's settings let convolutions or matrix products use it (convolutions may unless told otherwise). A
    part of a device (MIG) is unknown.
    """
    for pattern, peak in PEAKS.items():
        if re.fullmatch(rf"(NVIDIA |Tesla )?{pattern}", name):
            tf32 = dtype == torch.float32 and peak.tf32 is not None and _tf32()
            teraflops = peak.tf32 if tf32 else getattr(peak, str(dtype).removeprefix("torch."), None)
            return None if teraflops is None else 1e12 * teraflops
    return None


def _tf32() -> bool:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" in (convolutions.fp32_precision, products.fp32_precision)


def utilisation(
    flops_per_step: float,
    seconds_per_step: float,
    device: torch.device | str,
    dtype: torch.dtype,
    processes: int = 1,
) -> float | None:
    """The share, 0 to 1, of the peak of `processes` such devices that a step uses; None where the peak is unknown (any CPU).

    `flops_per_step` is that of all processes together. Raises ValueError for seconds or processes that are not positive.
    """
    check_positive("seconds_per_step", seconds_per_step)
    check_positive("processes", processes)
    device = torch.device(device)
    peak = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return None if peak is None else flops_per_step / (seconds_per_step * processes * peak)


def memory() -> dict[str, int]:
    """Bytes held: `rss`, the process's resident set (its peak where there is no /proc), and `cuda_peak`, the most that tensors took on the
    current CUDA device so far, if this process uses one."""
    result = {"rss": _resident()}
    if torch.cuda.is_initialized():  # asking an idle CUDA would start it
        result["cuda_peak"] = torch.cuda.max_memory_allocated()
    return result


def _resident() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
