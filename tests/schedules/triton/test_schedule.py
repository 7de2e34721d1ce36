"""What the CUDA schedule takes, and why it declines the rest; no GPU is needed."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from blockffn_compile.schedules import reference, select, triton
from blockffn_compile.schedules.plan import Problem


@pytest.fixture(autouse=True)
def _each_warns():
    triton._warn.cache_clear()


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def problem(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Problem:
    return Problem(64, 4, 32, "silu", False, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (8, 7), (9, 0), (12, 0)], ids=str)
def test_takes_half_precision_on_gpus_from_8_0(monkeypatch, capability, dtype):
    gpu(monkeypatch, capability)
    assert isinstance(select(problem(dtype), "decode"), triton.ChunkKernel)
    assert isinstance(select(problem(dtype), "chunk"), triton.ChunkKernel)
    assert isinstance(select(problem(dtype), "prefill"), triton.PrefillKernel)


def test_leaves_other_devices_alone(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert triton.cuda_schedule(problem(device="cpu"), "decode") is None
        assert triton.cuda_schedule(problem(device="xpu"), "decode") is None


@pytest.mark.parametrize("case", ["dtype", "architecture", "AMD", "no Triton"])
def test_declines_with_a_reason_once(monkeypatch, case):
    gpu(monkeypatch, (7, 5) if case == "architecture" else (9, 0))
    if case == "AMD":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    if case == "no Triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    asked = problem(torch.float32 if case == "dtype" else torch.bfloat16)
    reason = {
        "dtype": "no full-precision float32; use float16 or bfloat16",
        "architecture": "compute capability 7.5; the kernels need 8.0",
        "AMD": "written for NVIDIA GPUs",
        "no Triton": r"install blockffn-compile\[cuda\]",
    }[case]
    with pytest.warns(UserWarning, match=reason):
        kernel = select(asked, "decode")
    assert kernel.__module__ == reference.__name__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(asked, "chunk")
