"""The kernels on a real GPU: ``make test-gpu``.  Not collected by a plain ``pytest``.

``-k memory`` is a short run for compute-sanitizer.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import blockffn_compile.backend  # noqa: F401
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.schedules import select, triton
from blockffn_compile.schedules.plan import Problem, regime
from blockffn_compile.schedules.triton import attention
from tests.schedules.triton.problems import MANY_EXPERTS, eager, error, inputs, oracle, weights
from tests.test_step_ops import HEADS, LIMITS, SHAPES, Case

PROBLEMS = {
    "2.8B": Problem(2048, 128, 128, "silu", False, torch.bfloat16, "cuda"),
    "2.8B gated": Problem(2048, 128, 128, "silu", True, torch.float16, "cuda"),
    "0.1B": Problem(768, 48, 64, "gelu", False, torch.float16, "cuda"),
    "1.2B": Problem(1792, 56, 128, "relu", True, torch.bfloat16, "cuda"),
    "odd": Problem(52, 5, 24, "gelu", True, torch.bfloat16, "cuda"),
    "one expert": Problem(96, 1, 32, "silu", False, torch.float16, "cuda"),
    "many experts": MANY_EXPERTS,
}
problems = pytest.mark.parametrize("name", PROBLEMS)


@pytest.fixture(scope="module", autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.fail("these tests need an NVIDIA GPU, and PyTorch finds none")


def on_gpu(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: None if t is None else t.cuda() for name, t in values.items()}
    return [t.cuda() for t in values]


def run(problem: Problem, x: Tensor, scores: Tensor, w: dict[str, Any]) -> Tensor:
    assert isinstance(select(problem, regime(len(x))), triton.TritonKernel)
    return torch.ops.blockffn.chunk_sparse_ffn(
        x, scores, w["w_up"], w["w_down"], problem.act, w["w_gate"]
    )


@problems
@pytest.mark.parametrize("density", [0.0, 0.12, 1.0])
def test_error_is_within_eager(name, density):
    problem, w = PROBLEMS[name], on_gpu(weights(PROBLEMS[name]))
    for tokens in (*range(1, 65), 65, 500, 2049):
        x, scores = on_gpu(inputs(problem, tokens, density, seed=tokens))
        want = oracle(problem, x, scores, w)
        y = run(problem, x, scores, w)
        if not (scores != 0).any():
            assert torch.equal(y, torch.zeros_like(x))
            continue
        # Few values can be lucky: a unit in the last place of the result is allowed.
        allowed = max(1.5 * error(eager(problem, x, scores, w), want), torch.finfo(x.dtype).eps)
        assert error(y, want) <= allowed, tokens


@problems
def test_rows_do_not_depend_on_company(name):
    """Bit-identical from one token to 64: all launches of decode and chunk sum in one order."""
    problem, w = PROBLEMS[name], on_gpu(weights(PROBLEMS[name]))
    x, scores = on_gpu(inputs(problem, 64, 0.3))
    together = run(problem, x, scores, w)
    order = torch.randperm(64, device="cuda")
    assert torch.equal(run(problem, x[order], scores[order], w), together[order])
    for size in range(1, 64):
        for first in {0, (64 - size) // 2, 64 - size}:
            part = slice(first, first + size)
            assert torch.equal(run(problem, x[part], scores[part], w), together[part]), size


@problems
@pytest.mark.parametrize("tokens", [1, 64, 2049])
def test_runs_are_equal(name, tokens):
    problem, w = PROBLEMS[name], on_gpu(weights(PROBLEMS[name]))
    x, scores = on_gpu(inputs(problem, tokens, 0.3))
    first = run(problem, x, scores, w)
    assert all(torch.equal(run(problem, x, scores, w), first) for _ in range(20))


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_a_chain_of_launches_equals_separate_ones(tokens):
    """From compute capability 9.0 launches overlap: each must still see all that the last wrote."""
    problem = PROBLEMS["2.8B"]
    layers = [on_gpu(weights(problem, seed)) for seed in range(8)]
    x, scores = on_gpu(inputs(problem, tokens, 0.2))

    def chain(wait: bool) -> Tensor:
        y = x
        for w in layers:
            # The next launch may take the memory that this one's intermediate results had.
            y = run(problem, y, scores, w).mul_(4)
            y = run(problem, y, scores, w)
            # After a copy, and after a memset, which are not kernels.
            y = run(problem, y.clone(), scores, w)
            y += torch.zeros_like(y)
            if wait:
                torch.cuda.synchronize()
        return y

    want = chain(wait=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(50):
        y.zero_()
        graph.replay()
        assert torch.equal(y, want)


@problems
@pytest.mark.parametrize("tokens", [5, 70])
def test_non_finite_values_stay_in_their_row(name, tokens):
    problem, w = PROBLEMS[name], on_gpu(weights(PROBLEMS[name]))
    for value, where in itertools.product((math.nan, math.inf), ("x", "scores", "no expert")):
        x, scores = on_gpu(inputs(problem, tokens, 0.5))
        scores[3] = 0
        if where != "no expert":
            scores[3, :2] = 0.5
        clean = run(problem, x, scores, w)
        (scores if where == "scores" else x)[3, 0] = value
        y = run(problem, x, scores, w)
        assert not y[3].isfinite().all()
        assert value == math.inf or y[3].isnan().all()
        rest = torch.arange(tokens, device="cuda") != 3
        assert torch.equal(y[rest], clean[rest])


def test_inf_in_the_expert_of_another_token_is_ignored():
    problem, w = PROBLEMS["2.8B"], on_gpu(weights(PROBLEMS["2.8B"]))
    x, scores = on_gpu(inputs(problem, 9, 0.5))
    scores[:, 2] = 0
    clean = run(problem, x, scores, w)
    w["w_up"][2], w["w_down"][2] = math.inf, math.inf
    scores[4, 2] = 1
    y = run(problem, x, scores, w)
    rest = torch.arange(9, device="cuda") != 4
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("tokens", [1, 3, 33, 70])
def test_memory(tokens):
    for name in ("odd", "one expert", "0.1B"):
        x, scores = on_gpu(inputs(PROBLEMS[name], tokens, 0.3))
        run(PROBLEMS[name], x, scores, on_gpu(weights(PROBLEMS[name])))
    case = Case("groups of three", torch.float16, SHAPES["rows"][:tokens])
    torch.ops.blockffn.cached_attention(*on_gpu(case.arguments()))
    case = Case("groups of three", torch.float16, SHAPES["tree"][:tokens])
    q, keys, values, _, *places = on_gpu(case.arguments())
    rows = torch.zeros(len(q), dtype=torch.int64, device="cuda")
    torch.ops.blockffn.cached_attention(q, keys[:1], values[:1], rows, *places)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [*HEADS, "GQA", "MLA", "wide"])
@pytest.mark.parametrize("pieces", [64, 1])
def test_attention(heads, shape, dtype, pieces, monkeypatch):
    monkeypatch.setattr(attention, "PIECES", pieces)
    monkeypatch.setitem(HEADS, "wide", (16, 2, 256, 256))
    monkeypatch.setitem(HEADS, "GQA", (16, 2, 128, 128))
    monkeypatch.setitem(HEADS, "MLA", (16, 16, 192, 128))
    case = Case(heads, dtype, SHAPES[shape])
    q, keys, values, *places = on_gpu(case.arguments())
    y = torch.ops.blockffn.cached_attention(q, keys, values, *places)
    assert error(y.cpu(), case.exact()) <= 2 * LIMITS[dtype]
    if not case.rows.any():
        y = torch.ops.blockffn.cached_attention(q, keys[:1], values[:1], *places)
        assert error(y.cpu(), case.exact()) <= 2 * LIMITS[dtype]


def test_mixed_devices_are_refused():
    problem, w = PROBLEMS["odd"], on_gpu(weights(PROBLEMS["odd"]))
    x, scores = on_gpu(inputs(problem, 3, 1.0))
    w["w_down"] = w["w_down"].cpu()
    with pytest.raises(RuntimeError, match="one dtype and device"):
        run(problem, x, scores, w)


@pytest.mark.parametrize("layout", ["block", "block_linear"])
def test_compiled_layers_run_as_a_cuda_graph_without_waiting(layout):
    torch._dynamo.reset()
    spec = BlockFFNSpec(2048, 128, 128, layout=layout)
    layers = nn.Sequential(*(BlockFFN(spec) for _ in range(3)))
    layers.to("cuda", torch.bfloat16).requires_grad_(False)
    exact = copy.deepcopy(layers).double()
    fast = torch.compile(layers, backend="blockffn", mode="reduce-overhead", fullgraph=True)
    for tokens in (1, 32):
        x = torch.randn(tokens, 2048, dtype=torch.bfloat16, device="cuda")
        want = exact(x.double())
        for _ in range(3):  # warm up, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            y = fast(x).clone()
        plain = error(layers(x), want)
        assert error(y, want) <= 1.5 * plain
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            torch.cuda.set_sync_debug_mode("error")
            torch.compiler.cudagraph_mark_step_begin()
            fast(x)
            torch.cuda.set_sync_debug_mode("default")
        names = {event.key for event in trace.key_averages()}
        assert any("cudaGraphLaunch" in name for name in names)
        assert not any("StreamSynchronize" in name or "DtoH" in name for name in names)
