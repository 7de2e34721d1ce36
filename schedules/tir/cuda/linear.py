"""A linear layer of few tokens over panels, as one CUDA kernel."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.cuda.tile import (
    PANEL,
    TOKENS,
    Products,
    Step,
    depth,
    digits,
    kept,
    launch,
    synchronise,
    total,
    totals,
)
from blockffn_compile.schedules.tir.header import kernel
from blockffn_compile.schedules.tir.tile import narrow, widen


def panel_linear(inputs: int, outputs: int, dtype: str) -> tirx.PrimFunc:
    """Builds ``f(x, weight, y)``: ``y = x @ weight.T``.

    Args:
        inputs: K.
        outputs: N.
        dtype: of every argument: float32, bfloat16 or float16.

    Returns:
        A function of x [n, K], weight panels [1, N/P, K, P] with P = PANEL, and the result y
        [n, N], for any n from 1.
    """
    panels, stride = -(-outputs // PANEL), depth(dtype)
    with kernel("panel_linear") as builder:
        n = tirx.Var("n", "int32")
        x = T.arg("x", T.buffer((n, inputs), dtype))
        weight = T.arg("weight", T.buffer((1, panels, inputs, PANEL), dtype))
        y = T.arg("y", T.buffer((n, outputs), dtype))
        tiles = (n + (TOKENS - 1)) // TOKENS

        # The tiles of a panel run side by side, so that memory is asked once for the weights.
        with launch(tiles * panels) as (block, thread):
            sums, parts = Products(thread, dtype), totals()
            panel, tile = digits(block, tiles)
            first = kept(tile * TOKENS)
            active = kept((T.int32(1) << T.min(n - first, TOKENS)) - 1)

            def step(i: tirx.PrimExpr) -> Step:
                row = kept(i * stride + sums.row)
                return Step(0, row, kept(T.Select(row < inputs, active, 0)))

            sums.multiply(
                weight,
                panel,
                -(-inputs // stride),
                step,
                lambda token, step: widen(x[first + token, step.row], dtype, 1),
            )
            sums.fold(lambda token: first + token < n, parts)
            synchronise()
            slot, column = digits(thread, PANEL)
            token, output = kept(first + slot), kept(panel * PANEL + column)
            there = T.And(slot < TOKENS, T.And(token < n, output < outputs))
            with T.If(there), T.Then():
                T.buffer_store(y, narrow(total(parts, slot, column), dtype, 1), [token, output])
    return builder.get()
