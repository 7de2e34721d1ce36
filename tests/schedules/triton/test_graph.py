"""CUDA graphs can hold the operator: the host neither waits for the device nor reads from it.

Fake tensors have no data, so what runs on them depends on none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import blockffn_compile.lowering  # noqa: F401
from blockffn_compile import step_ops
from blockffn_compile.layer import experts_reference
from blockffn_compile.passes.fx import BlockFFNGraphPass
from blockffn_compile.schedules import select, triton
from blockffn_compile.schedules.plan import Problem, regime
from tests.schedules.triton.device import H100, Driver


def _forget() -> None:
    triton.find_gpu.cache_clear()
    triton.attention_kernel.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Tensors on an H100 that is not there."""
    for name, answer in {
        "get_device_properties": H100,
        "get_device_capability": (H100.major, H100.minor),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, lambda index: index)
    monkeypatch.setattr(CudaInterface, "get_device_properties", lambda *args: H100)
    monkeypatch.setattr(CudaInterface, "get_compute_capability", lambda *args: 90)
    monkeypatch.setattr(scheduler, "has_triton", lambda *args: True)
    driver.set_active(Driver(90))
    _forget()
    with FakeTensorMode() as mode:
        yield mode
    driver._active = None
    _forget()


def tensors(tokens: int, gated: bool = False) -> list[Tensor]:
    hidden, experts, size = 256, 16, 32
    sizes = [(tokens, hidden), (tokens, experts), (experts, size, hidden), (experts, hidden, size)]
    if gated:
        sizes.append(sizes[2])
    return [torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes]


@pytest.mark.parametrize("tokens", [1, 32, 64, 5000])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_launches_do_not_depend_on_data(gpu, tokens, gated, monkeypatch):
    launches: list[tuple[str, tuple[int, ...]]] = []
    early = {}

    def record(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        launches.append((self.__name__, grid))
        early[self.__name__] = kwargs.get("FOLLOWS"), kwargs.get("launch_pdl")

    monkeypatch.setattr(JITFunction, "run", record)
    x, scores, up, down, *gate = tensors(tokens, gated)
    problem = Problem(256, 16, 32, "silu", gated, torch.bfloat16, "cuda")
    kernel = select(problem, regime(tokens))
    kernel(x, scores, up, down, gate[0] if gated else None, "e,s,h", "e,h,s", torch.empty_like(x))
    segments = -(-tokens // triton.SEGMENT)
    expected = ["plan", "up", "down"] * segments if tokens > 64 else ["up", "down"]
    assert [name for name, _ in launches] == expected
    assert all(isinstance(size, int) and size > 0 for _, grid in launches for size in grid)
    # A launch before its time is only for a kernel that waits.
    assert set(early.values()) == {(None, None) if tokens > 64 else (True, True)}


@pytest.mark.parametrize("tokens", [1, 32])
def test_attention_is_two_launches(gpu, tokens, monkeypatch):
    launches: list[tuple[str, tuple[int, ...]]] = []

    def record(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        assert kwargs["FOLLOWS"] is kwargs["launch_pdl"] is True
        launches.append((self.__name__, grid))

    monkeypatch.setattr(JITFunction, "run", record)
    q, cache = (
        torch.empty(size, dtype=torch.bfloat16, device="cuda")
        for size in ((tokens, 16, 128), (1, 2, 1088, 128))
    )
    place = torch.empty(tokens, dtype=torch.int64, device="cuda")
    step_ops.cached_attention(q, cache, cache, place, place, place)
    tiles = {1: 1, 32: 8}[tokens]
    assert launches == [("attend", (tiles, 2, 17)), ("join", (16 * tokens,))]


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_compiled_step_is_one_graph_of_launches(gpu, tokens, gated):
    """What Inductor writes for a GPU, router and all, has nothing that ends a CUDA graph."""

    def layer(x: Tensor, router: Tensor, up: Tensor, down: Tensor, *gate: Tensor) -> Tensor:
        scores = torch.relu(x @ router.T)
        return x + experts_reference(x, scores, up, down, "silu", *gate)

    x, _, up, down, *gate = tensors(tokens, gated)
    inputs = [x, torch.empty(16, 256, dtype=x.dtype, device="cuda"), up, down, *gate]
    traced = make_fx(layer)(*inputs)
    BlockFFNGraphPass()(traced.graph)
    graph = GraphLowering(traced, example_inputs=inputs)
    debug = V.set_debug_handler(DebugContext())
    with V.set_graph_handler(graph), V.set_fake_mode(gpu), debug:
        graph.run(*inputs)
        code = graph.codegen()[0].value
    assert graph.disable_cudagraphs_reason is None
    assert graph.device_types == {"cuda"}
    assert "Runner(partitions=[])" in code  # a graph is cut at what cannot be captured
    name = "gated_ffn" if gated else "ffn"
    assert code.count(f"extern_kernels.blockffn_{name}(") == 1
    body = code[code.index("def call(") : code.index("runner = Runner")]
    assert not re.search(r"\.item\(|synchronize|\.cpu\(|\.to\(|torch\.ops\.|aten\.", body)
