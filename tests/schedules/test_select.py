"""Choice among schedules."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import blockffn_compile.ops  # noqa: F401
from blockffn_compile.schedules import select, tir
from blockffn_compile.schedules.plan import Problem, regime


@pytest.mark.parametrize(
    ("tokens", "name"), [(1, "decode"), (2, "chunk"), (64, "chunk"), (65, "prefill")]
)
def test_regimes(tokens, name):
    assert regime(tokens) == name


def test_cpu_problems_get_the_tir_kernel():
    problem = Problem(48, 2, 16, "relu", False, torch.float32, "cpu")
    kernel = select(problem, "decode")
    assert isinstance(kernel, tir.CpuKernel)
    assert select(problem, "chunk") is kernel


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "xpu")])
def test_other_problems_get_the_reference(dtype, device):
    kernel = select(Problem(48, 2, 16, "relu", False, dtype, device), "decode")
    assert not isinstance(kernel, tir.CpuKernel)


def test_fp64_runs_through_the_reference():
    x, scores = torch.randn(3, 8).double(), torch.rand(3, 2).double()
    up, down = torch.randn(2, 4, 8).double(), torch.randn(2, 8, 4).double()
    y = torch.ops.blockffn.chunk_sparse_ffn(x, scores, up, down, "relu")
    mid = torch.einsum("th,esh->tes", x, up).relu() * scores[..., None]
    torch.testing.assert_close(y, torch.einsum("tes,ehs->th", mid, down))


@pytest.mark.parametrize("failure", ["missing", "unknown CPU"])
def test_without_tvm_one_warning_and_the_right_result(failure):
    code = f"""
import sys, warnings
if {failure!r} == "missing":
    sys.modules["tvm"] = None
else:
    from blockffn_compile.schedules.tir import build
    def unknown(): raise RuntimeError("LLVM does not know this CPU")
    build.host_target = unknown
import torch, blockffn_compile.ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for size in (8, 16):
        x, scores = torch.randn(3, size), torch.rand(3, 2)
        up, down = torch.randn(2, 4, size), torch.randn(2, size, 4)
        y = torch.ops.blockffn.chunk_sparse_ffn(x, scores, up, down, "relu")
        mid = torch.einsum("th,esh->tes", x, up).relu() * scores[..., None]
        torch.testing.assert_close(y, torch.einsum("tes,ehs->th", mid, down))
messages = [str(w.message) for w in caught if "blockffn" in str(w.message)]
assert len(messages) == 1 and "run every expert" in messages[0], messages
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_follow_pytorch():
    """With one PyTorch thread, the kernel starts no worker threads."""
    code = """
import os, torch
torch.set_num_threads(1)
import blockffn_compile.ops, tvm
before = len(os.listdir("/proc/self/task"))
x, scores, w = torch.ones(1, 16), torch.ones(1, 1), torch.ones(1, 16, 16)
torch.ops.blockffn.chunk_sparse_ffn(x, scores, w, w, "relu")
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
