# SPDX-License-Identifier: Apache-2.0
"""Results that do not depend on what a process has set for speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 as IEEE 754 has it (no autocast, no TF32 or bfloat16 in products of float32 numbers, sums of
    bfloat16 products in float32), with one fixed algorithm for each convolution; what was set before is set again
    afterwards. The settings are the process's, not the thread's.
    """
    cudnn: Any = torch.backends.cudnn  # torch's stubs do not know what is in these modules
    mkldnn: Any = torch.backends.mkldnn
    products = (torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
    before = [backend.fp32_precision for backend in products]
    choice = cudnn.benchmark, cudnn.deterministic
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        for backend in products:
            backend.fp32_precision = "ieee"
        cudnn.benchmark, cudnn.deterministic = False, True
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(products, before, strict=True):
            backend.fp32_precision = precision
        cudnn.benchmark, cudnn.deterministic = choice
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
