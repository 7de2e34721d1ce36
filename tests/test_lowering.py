"""Operators in compiled graphs: the same bits, past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache, run_and_get_code

import blockffn_compile.lowering
import blockffn_compile.ops
import blockffn_compile.step_ops  # noqa: F401

OPS = torch.ops.blockffn


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(function: Callable, *args: object, **kwargs) -> tuple[Tensor, str]:
    """Result under Inductor, and the code."""
    # Cached graphs show no code; the cache of compiled C++ may stay.
    uncached = inductor_config.patch(fx_graph_cache=False)
    with uncached, functorch_config.patch(enable_autograd_cache=False), torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(function, fullgraph=True, **kwargs), *args)
    return result, code


def ffn(x: Tensor, gated: bool) -> tuple[object, ...]:
    experts, size, hidden = 4, 8, x.shape[1]
    scores = torch.randn(len(x), experts).relu().to(x.dtype)
    up, gate = (torch.randn(experts, size, hidden).to(x.dtype) for _ in range(2))
    down = torch.randn(experts, hidden, size).to(x.dtype)
    return x, scores, up, down, "silu", gate if gated else None


def attention(tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    keys, values = torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 32)
    places = torch.arange(tokens) % 2, torch.full((tokens,), 9), (1 << torch.arange(tokens)) | 1
    # Queries arrive as a model has them: heads first.
    q = torch.randn(4, tokens, 16).to(dtype).transpose(0, 1)
    return (q, keys.to(dtype), values.to(dtype), *places)


CASES: dict[str, tuple[Any, Any]] = {
    "ffn": (OPS.chunk_sparse_ffn, lambda n, dtype: ffn(torch.randn(n, 16).to(dtype), False)),
    "gated_ffn": (OPS.chunk_sparse_ffn, lambda n, dtype: ffn(torch.randn(n, 16).to(dtype), True)),
    "linear": (
        OPS.linear,
        lambda n, dtype: (
            torch.randn(n, 24).to(dtype),
            [torch.randn(7, 24).to(dtype), torch.randn(24, 16).to(dtype).T],
        ),
    ),
    "cached_attention": (OPS.cached_attention, attention),
}


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, torch.float32), (5, torch.bfloat16)], ids=["one", "five"]
)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_called_past_the_dispatcher(name, tokens, dtype):
    """With what comes before and after left to Inductor."""
    op, make = CASES[name]
    first, *rest = make(tokens, dtype)

    def function(first: Tensor, *rest: object) -> Tensor:
        return op(first + 1, *rest) * 2

    y, code = compiled(function, first, *rest)
    assert code.count(f"extern_kernels.blockffn_{name}(") == 1
    assert "torch.ops.blockffn" not in code
    assert y.dtype == dtype
    assert torch.equal(y, function(first, *rest))


def test_a_result_is_returned_itself():
    x, weights = CASES["linear"][1](3, torch.float32)
    y, _ = compiled(OPS.linear, x, weights)
    assert torch.equal(y, OPS.linear(x, weights))
    assert y.is_contiguous()


def test_one_token_more_is_another_graph_with_the_same_bits():
    x, weights = CASES["linear"][1](6, torch.float32)
    whole = OPS.linear(x, weights)
    graph = torch.compile(OPS.linear, fullgraph=True, dynamic=False)
    for tokens in (1, 2, 6):
        assert torch.equal(graph(x[:tokens], weights), whole[:tokens])


def test_cached_graphs_find_the_kernels():
    x, weights = CASES["linear"][1](3, torch.float32)
    with fresh_cache(), torch.no_grad():
        for hits in (0, 1):
            torch._dynamo.reset()
            counters.clear()
            y = torch.compile(OPS.linear, fullgraph=True)(x, weights)
            assert torch.equal(y, OPS.linear(x, weights))
            stats = {**counters["aot_autograd"], **counters["inductor"]}
            assert stats.get("autograd_cache_hit", 0) == hits


# --- materialize ----------------------------------------------------------------------------------


def scaled_sum(rounded: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * 1.2345
        if rounded:
            scaled = OPS.materialize(scaled)
        return scaled + y, scaled - y

    return function


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_materialized_values_are_rounded_as_in_eager_mode(dtype, tokens):
    x, y = torch.randn(2, tokens, 400).to(dtype)
    want = scaled_sum(False)(x, y)
    got, code = compiled(scaled_sum(True), x, y)
    assert "torch.ops.blockffn" not in code
    assert all(map(torch.equal, got, want))
    # Left to itself, Inductor keeps the product in fp32.
    fused, _ = compiled(scaled_sum(False), x, y)
    assert not all(map(torch.equal, fused, want))


def test_materialized_inputs_and_outputs():
    x = torch.randn(5, 8).bfloat16()
    kept = x.clone()
    y, _ = compiled(lambda x: OPS.materialize(x) + 1, x)
    assert torch.equal(y, x + 1)
    y, _ = compiled(lambda x: OPS.materialize(x * 3), x)
    assert torch.equal(y, x * 3)
    assert torch.equal(x, kept)
