"""Linear layers for CUDA, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn_compile.schedules.packing import to_panels
from blockffn_compile.schedules.tir import DTYPES
from blockffn_compile.schedules.tir.cuda.linear import panel_linear
from blockffn_compile.schedules.tir.cuda.tile import PANEL
from tests.schedules.tir.cuda.emulator import emulate


@pytest.mark.parametrize(
    ("dtype", "inputs", "outputs"),
    [(torch.bfloat16, 1024, 48), (torch.float16, 52, 5), (torch.float32, 300, 20)],
    ids=["bfloat16", "float16", "float32"],
)
def test_linear(dtype, inputs, outputs, tmp_path):
    function = emulate(panel_linear(inputs, outputs, DTYPES[dtype]), tmp_path)
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype)
    panels = to_panels(weight[None], PANEL)

    def run(x):
        y = torch.full((len(x), outputs), math.nan, dtype=dtype)
        function(x, panels, y)
        return y

    x = torch.randn(64, inputs).to(dtype)
    together = run(x)
    want = x.double() @ weight.double().T
    assert (together - want).norm() <= torch.finfo(dtype).eps * want.norm()
    order = torch.randperm(64)
    assert torch.equal(run(x[order]), together[order])
    for part in (slice(0, 1), slice(63, 64), slice(3, 12), slice(20, 53)):
        assert torch.equal(run(x[part].clone()), together[part])
    x[9, 0] = math.nan
    poisoned, rest = run(x), torch.arange(64) != 9
    assert poisoned[9].isnan().all()
    assert torch.equal(poisoned[rest], together[rest])
