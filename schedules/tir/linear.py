"""A linear layer of few tokens over panels, as one TIR function for CPUs.

Reads each weight once for up to ``Tiling.tokens`` tokens.  Rows are bit-identical alone or among
others: each output's sum has one fixed order (see ``tile.add_products``).
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.layer import CHUNK_TOKENS, Quantisation
from blockffn_compile.schedules.tir.header import kernel
from blockffn_compile.schedules.tir.tile import (
    LANES,
    Registers,
    add_products,
    in_pairs,
    store_row,
    weight_arguments,
    widen_row,
)


def panel_linear(
    inputs: int,
    outputs: int,
    dtype: str,
    panel: int,
    registers: Registers,
    quantisation: Quantisation | None = None,
) -> tirx.PrimFunc:
    """Builds ``f(x, weight, [scales,] y)``: ``y = x @ weight.T``.

    Args:
        inputs: K.
        outputs: N.
        dtype: of every argument: float32, bfloat16 or float16.
        panel: P, a multiple of 16.
        registers: what the target has.
        quantisation: of the weight; None has it in ``dtype``.

    Returns:
        A function of x [n, K], weight panels [1, N/P, K, P], their scales where it is quantised
        (see :func:`tile.weight_arguments`), and the result y [n, N], for 1 <= n <= CHUNK_TOKENS.
    """
    panels = -(-outputs // panel)
    dot = quantisation is None and in_pairs(registers.dot, dtype, inputs)
    streams = registers.streams
    with kernel("panel_linear") as builder:
        n = tirx.Var("n", "int32")
        x = T.arg("x", T.buffer((n, inputs), dtype))
        weight = weight_arguments("weight", (1, panels, inputs, panel), dtype, quantisation)
        y = T.arg("y", T.buffer((n, outputs), dtype))
        x32 = T.alloc_buffer((CHUNK_TOKENS, inputs + LANES), "float32")
        y32 = T.alloc_buffer((CHUNK_TOKENS, panels * panel + LANES), "float32")

        if not dot:
            with T.serial(n) as t:
                widen_row(x, x32, t)
        with T.parallel(-(-panels // streams)) as group:
            first = T.bind(group * streams)
            count = T.bind(T.min(panels - first, streams))
            add_products(
                weight,
                (0, first),
                count,
                (0, first + streams),
                (0, n),
                registers,
                source=lambda t: (x if dot else x32, t),
                target=lambda t: (y32, t),
                accumulate=False,
                dot=dot,
            )
            with T.serial(n) as t, T.serial(count * (panel // LANES)) as v:
                store_row(y32, y, t, T.bind(first * panel + v * LANES))
    return builder.get()
