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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("streams", [2, 3])
def test_panels_side_by_side_give_the_same_bits(dtype, streams):
    """Against one panel at a time; the numbers of panels leave groups of every size."""
    name, target, experts = DTYPES[dtype], build.host_target(), 4
    one, several = (
        build.load(
            chunk_sparse_ffn(None, None, None, name, "silu", False, Tiling(16, 16, registers)),
            target,
        )
        for registers in (Registers(16, tokens=6, streams=n) for n in (1, streams))
    )
    for hidden, size in [(16, 16), (33, 80), (130, 49)]:
        torch.manual_seed(hidden)
        up = to_panels(torch.randn(experts, size, hidden).to(dtype), 16)
        down = to_panels(torch.randn(experts, hidden, size).to(dtype), 16)
        for tokens in (1, 2, 3, 4, 9):
            x = torch.randn(tokens, hidden).to(dtype)
            scores = torch.rand(tokens, experts).to(dtype)
            scores[1:, 1], scores[:, 2] = 0, 0  # an expert of one token, and one of none
            expected, result = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
            one(x, scores, up, down, expected)
            several(x, scores, up, down, result)
            assert expected.isfinite().all()
            assert torch.equal(result, expected), (hidden, tokens)
