"""Graphs without guards: what they take, and that a row's bits do not depend on the row count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blockffn_compile.engines.compiled import capture, compile_once
from blockffn_compile.layer import rms_norm


def two_norms(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """RMS and sum: both reduce a row."""
    return rms_norm(x, weight, 1e-6), x / x.abs().sum(-1, keepdim=True)


@pytest.mark.parametrize("width", [6, 40, 2048])
def test_sums_of_a_row_do_not_depend_on_the_number_of_rows(width):
    """Widths that Inductor would unroll, pad, or share among threads."""
    torch.manual_seed(0)
    weight, x = torch.rand(width), torch.randn(64, width)
    results = []
    for rows in (1, 2, 64):
        graph = compile_once(two_norms, [weight], x[:rows].clone())
        parts = [graph(part) for part in x.split(rows)]
        results.append([torch.cat(values) for values in zip(*parts, strict=True)])
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    torch.testing.assert_close(results[0], list(two_norms(weight, x)))


def test_arguments_and_results_keep_their_order():
    def function(scale: float, weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return y - x, x * scale, y @ weight

    weight = torch.randn(4, 4)
    graph = compile_once(function, [3.0, weight], torch.zeros(2, 4), torch.zeros(2, 4))
    for _ in range(2):
        x, y = torch.randn(2, 2, 4)
        for got, want in zip(graph(x, y), function(3.0, weight, x, y), strict=True):
            torch.testing.assert_close(got, want)


def test_constants_may_be_written_to():
    weight, x = torch.ones(4), torch.randn(2, 4)
    graph = compile_once(lambda w, x: (x + w,), [weight], x)
    weight.fill_(5)
    assert torch.equal(graph(x)[0], x + 5)
    graph = compile_once(lambda w, x: (w.add_(x[0]), x * 2)[1:], [weight], x)
    graph(x)
    torch.testing.assert_close(weight, 5 + 2 * x[0])  # compiling runs it too


class Recording:
    """A CUDA graph of CPU operators: replays them on the same memory."""

    def __init__(self) -> None:
        self.operators: list[tuple[Any, ...]] = []

    def replay(self) -> None:
        for function, args, kwargs, result in self.operators:
            result.copy_(function(*args, **kwargs))


class Record(TorchDispatchMode):
    """Stands in for ``torch.cuda.graph``."""

    def __init__(self, graph: Recording) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.operators.append((function, args, kwargs or {}, result))
        return result


def test_a_replay_reads_its_own_tensors_and_gives_results_that_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    total = torch.zeros(3)
    replay = capture(lambda x, y: (x * y, total.add_(x) + y), [torch.zeros(3)] * 2)
    results, x = [], torch.arange(3.0)
    for i in range(3):
        results.append(replay(x, x + i))
        x += 1
    for i, (product, summed) in enumerate(results):
        x = torch.arange(3.0) + i
        assert torch.equal(product, x * (x + i))
        so_far = torch.stack([torch.arange(3.0) + j for j in range(i + 1)]).sum(0)
        assert torch.equal(summed, so_far + x + i)
