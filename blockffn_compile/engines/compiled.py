"""Graphs that are called without guards: what they are called with is known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blockffn_compile.backend import blockffn

OPTIONS = {
    "linears": True,
    "size_asserts": False,
    # Inductor sums one row in parallel, and unrolls short sums of several rows: both would make
    # a token's bits depend on the token count.
    "cpp.min_chunk_size": 2**31,
    "unroll_reductions_threshold": 0,
}


def compile_once(
    function: Callable[..., tuple[Tensor, ...]], constants: Sequence[Any], *example: Tensor
) -> Callable[..., tuple[Tensor, ...]]:
    """Compiles ``function(*constants, *tensors)`` for tensors like the example, and runs it once.

    Guards and the search for the right graph cost more than a small model's kernels, so later
    calls go straight to the compiled graph.  With linear layers on our kernels, a token's bits do
    not depend on the token count that a graph is for.

    Args:
        function: traced whole; its results are different tensors that it makes.
        constants: modules, tensors and numbers that stay the same for good.
        example: all later calls must be with tensors of the same shapes, dtypes and strides.

    Returns:
        A function of the tensors alone.
    """
    graph: Any = None
    flat: list[Any] = []
    made: Any = ()

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = blockffn(gm, inputs, options=OPTIONS)

        def first_call(*args: Any) -> Any:
            nonlocal graph, made
            graph, made = compiled, compiled(*args)
            flat[:] = args
            return made

        return first_call

    # Every graph here is of the same few functions, which Dynamo would count as recompilations.
    jit: Any = functools.partial(torch.compile, isolate_recompiles=True)(
        function, backend=backend, fullgraph=True, dynamic=False
    )
    results = jit(*constants, *example)
    # Where the graph, whose arguments and results have an order of their own, has ours.
    inputs = [(i, j) for i, arg in enumerate(flat) for j, t in enumerate(example) if arg is t]
    outputs = [next(i for i, value in enumerate(made) if value is result) for result in results]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        args = flat.copy()
        for i, j in inputs:
            args[i] = tensors[j]
        values = graph(*args)
        return tuple([values[i] for i in outputs])

    return call


def capture(
    function: Callable[..., tuple[Tensor, ...]], example: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """Records what a function launches on a GPU, once, and replays it with other tensors.

    Args:
        function: launches without waiting, and reads its arguments only; what it reads and writes
            beside them stays in place.  It ran before, so that all it needs is set up.
        example: all later calls must be with tensors of the same shapes and dtypes.

    Returns:
        A function of the tensors; each call has results of its own.
    """
    inputs = [tensor.clone() for tensor in example]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*inputs)

    # What the function keeps alive, the graph reads.
    def replay(*tensors: Tensor, function: object = function) -> tuple[Tensor, ...]:
        for mine, given in zip(inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        graph.replay()
        return tuple([result.clone() for result in results])

    return replay
