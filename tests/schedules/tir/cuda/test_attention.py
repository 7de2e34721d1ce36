"""Attention and the cache for CUDA, on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from blockffn_compile.schedules.tir import DTYPES
from blockffn_compile.schedules.tir.cuda.attention import cached_attention
from blockffn_compile.schedules.tir.cuda.cache import move_entries, store_entries
from tests.schedules.tir.cuda.emulator import emulate

LENGTH = 300  # three pieces, the last one not full

#: Query heads, key heads, width of keys, width of values.
SHAPES = {"gqa": (4, 2, 16, 16), "mla": (2, 2, 24, 136), "one key head": (8, 1, 32, 48)}


def visible(context: int, ancestors: int) -> list[int]:
    """Slots of the keys that a token sees."""
    return [*range(context), *(context + j for j in range(64) if ancestors >> j & 1)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("gqa", torch.bfloat16), ("mla", torch.float32), ("one key head", torch.float16)],
)
def test_attention(shape, dtype, tmp_path):
    heads, kv_heads, key_dim, value_dim = SHAPES[shape]
    function = emulate(
        cached_attention(heads, kv_heads, key_dim, value_dim, DTYPES[dtype]), tmp_path
    )
    torch.manual_seed(0)
    keys = torch.randn(2, kv_heads, LENGTH, key_dim).to(dtype)
    values = torch.randn(2, kv_heads, LENGTH, value_dim).to(dtype)
    places = [  # row, context, ancestors
        (0, 0, 1), (1, 5, 0b1011), (0, 127, 1), (0, 127, 0b11), (1, 128, 0b101), (0, 236, -1),
        (1, 236, -(1 << 63) + 1), (0, 299, 1),
    ]  # fmt: skip
    rows, context, ancestors = (torch.tensor(place) for place in zip(*places, strict=True))
    q = torch.randn(len(places), heads, key_dim).to(dtype)

    def run(part):
        y = torch.full((len(q[part]), heads, value_dim), math.nan, dtype=dtype)
        chosen = (t[part].clone() for t in (rows, context, ancestors))
        function(q[part].clone(), keys, values, *chosen, y)
        return y

    y = run(slice(None))
    for t, (row, past, bits) in enumerate(places):
        seen = visible(past, bits)
        group = heads // kv_heads
        k, v = (c[row, :, seen].double().repeat_interleave(group, 0) for c in (keys, values))
        weights = torch.einsum("hd,hkd->hk", q[t].double(), k) * key_dim**-0.5
        want = torch.einsum("hk,hkd->hd", weights.softmax(1), v)
        assert (y[t] - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm(), t
        assert torch.equal(run(slice(t, t + 1))[0], y[t])

    # A predecessor may be a node of the tree or part of the context.
    context[3], ancestors[3] = 126, 0b111
    assert torch.equal(run(slice(3, 4))[0], y[3])
    keys[1, :, 200] = math.nan  # no token sees it
    values[1, :, 200] = math.nan
    assert torch.equal(run(slice(0, 6))[[0, 1, 2, 4, 5]], y[[0, 1, 2, 4, 5]])
    values[0, :, 2] = math.nan
    assert run(slice(7, 8)).isnan().all()


def test_entries_are_stored(tmp_path):
    function = emulate(store_entries(3, 100, "float16"), tmp_path)
    cache = torch.randn(2, 3, 9, 100).half()
    new = torch.randn(4, 3, 100).half()
    rows, slots = torch.tensor([0, 1, 1, 0]), torch.tensor([8, 0, 3, 2])
    want = cache.clone()
    want[rows, :, slots] = new
    function(cache, new, rows, slots)
    assert torch.equal(cache, want)


def test_entries_move_together(tmp_path):
    """Nodes 1, 2, 5 of a tree behind 3 tokens: what moves is read before it is overwritten."""
    function = emulate(move_entries(3, 100, "bfloat16"), tmp_path)
    cache = torch.randn(2, 3, 9, 100).bfloat16()
    want = cache.clone()
    want[1, :, [3, 4, 5]] = cache[1, :, [4, 5, 8]]
    rows, sources, slots = torch.tensor([1, 1, 1]), torch.tensor([4, 5, 8]), torch.tensor([3, 4, 5])
    function(cache, rows, sources, slots)
    assert torch.equal(cache, want)
