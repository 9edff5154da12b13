# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: tests/scm_core/flash_jvp_cases.py in a process of its own, on a GPU or in Triton's interpreter on the CPU.

Triton decides when it is imported whether to compile or to interpret; in this process another module may have imported it by now.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(interpret: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_kernels() -> None:
    cases = "tests/scm_core/flash_jvp_cases.py"
    done = run("0" if torch.cuda.is_available() else "1", "-m", "pytest", "-q", "-p", "no:cacheprovider", cases)
    assert done.returncode == 0, f"{cases}:\n{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_tensors_that_no_kernel_can_read_are_refused() -> None:
    code = (
        "import torch; from scm_core.nn.attention import attention; from scm_core.nn.dual import Dual\n"
        "x = torch.ones(1, 1, 2, 2); attention(Dual(x, x), x, x, backend='triton')"
    )
    done = run("0", "-c", code)
    assert done.returncode == 1
    assert "ValueError: backend: 'triton' needs CUDA tensors, got cpu" in done.stderr
