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


COMPILE = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from scm_core.nn import flash_jvp

dtype, d = getattr(torch, sys.argv[1]), int(sys.argv[2])
how = flash_jvp.tiles(dtype, d)
sizes = {"BLOCK_M": how.block_m, "BLOCK_N": how.block_n, "BLOCK_D": how.block_d, "PRECISION": "ieee"}
kinds = dict.fromkeys(("heads", "length", "keys", "d"), "i32")
kinds |= {"Lse": "*fp32", "Delta": "*fp32", "scale": "fp32", "Mask": "*u8"}
values = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
options = {"num_warps": how.warps, "num_stages": how.stages}
for kernel in (flash_jvp._forward_kernel, flash_jvp._backward_queries_kernel, flash_jvp._backward_keys_kernel):
    constants = {n: sizes.get(n, True) for n in kernel.arg_names if n in sizes or n.startswith("HAS_") or n == "MASKED"}
    signature = {n: "constexpr" if n in constants else kinds.get(n, values) for n in kernel.arg_names}
    done = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, "shared", done.metadata.shared)
    tensor_cores = any(word in done.asm["ptx"] for word in ("wgmma.mma_async", "mma.sync"))
    assert tensor_cores == (dtype != torch.float32), kernel.__name__
    assert done.metadata.shared <= 99 * 1024, done.metadata.shared  # what every GPU since 8.0 has
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "d"), [("float16", 64), ("bfloat16", 128), ("float16", 256), ("float32", 128)])
def test_the_kernels_compile_for_a_gpu(dtype: str, d: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and tile shapes that the interpreter lets pass are checked by the compiler, for which no GPU is needed: every choice of
    `tiles`, each at its largest d."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = run("0", "-c", COMPILE, dtype, str(d))
    assert done.returncode == 0, done.stderr[-5_000:]
    assert done.stdout.count("shared") == 3
