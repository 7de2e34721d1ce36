"""The chunk-sparse FFN with shapes that it learns from its arguments."""

from __future__ import annotations

import pytest
import torch

from blockffn_compile.schedules.packing import to_panels
from blockffn_compile.schedules.tir import DTYPES, build
from blockffn_compile.schedules.tir.cpu import chunk_sparse_ffn
from blockffn_compile.schedules.tir.tile import ACTIVATIONS, Registers, Tiling

TILING = Tiling(32, 16, Registers(32, tokens=3, streams=2))


@pytest.mark.parametrize(
    ("dtype", "gated"),
    [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)],
    ids=["float32", "bfloat16-gated", "float16"],
)
def test_open_shapes_give_the_same_bits(dtype, gated):
    """One function for all shapes and activations against one built for each."""
    name, target = DTYPES[dtype], build.host_target()
    anything = build.load(chunk_sparse_ffn(None, None, None, name, None, gated, TILING), target)
    for index, (act, (hidden, experts, size)) in enumerate(
        zip(ACTIVATIONS, [(32, 3, 32), (50, 5, 40), (16, 1, 1)], strict=True)
    ):
        torch.manual_seed(index)
        fixed = build.load(
            chunk_sparse_ffn(hidden, experts, size, name, act, gated, TILING), target
        )
        up, gate = (
            to_panels(torch.randn(experts, size, hidden).to(dtype), TILING.up_panel)
            for _ in range(2)
        )
        down = to_panels(torch.randn(experts, hidden, size).to(dtype), TILING.down_panel)
        for tokens in (1, 7, 64):
            x = torch.randn(tokens, hidden).to(dtype)
            scores = torch.randn(tokens, experts).relu().to(dtype)
            arguments = [x, scores, up, *([gate] if gated else []), down]
            expected, result = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
            fixed(*arguments, expected)
            anything(*arguments, result, index)
            assert expected.isfinite().all()
            assert torch.equal(result, expected), (act, tokens)
