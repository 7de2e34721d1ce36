"""The chunk-sparse FFN as one TIR function for CPUs (x86 and Arm).

Steps:

1. Plan: for each active expert the tokens that use it, from the non-zero scores.
2. Up: for each (active expert, panel) and each tile of its tokens, ``x @ up`` with the tile's
   sums in registers, then the activation times the score.  One read of a weight vector serves
   all tokens of the tile.
3. Down: for each slice of output panels, which lie side by side, add every active expert's
   contribution to its tokens.

The sum of one output is formed in fp32 in one fixed order, whatever the other tokens are: fused
multiply-adds over blocks of k, or pairs of products where the CPU has an instruction for these,
blocks in ascending order, experts in ascending order.  Rows are bit-identical alone or in a chunk.

Weights are panels [E, N/P, K, P] (see ``schedules/packing.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.layer import Quantisation
from blockffn_compile.schedules.tir.header import kernel
from blockffn_compile.schedules.tir.tile import (
    ACTIVATIONS,
    LANES,
    Panels,
    Tiling,
    add_products,
    at,
    broadcast,
    in_pairs,
    narrow,
    store_row,
    weight_arguments,
    widen,
    widen_row,
)

#: Of an expert's down panels that a thread reads in one go, at least one panel.
SLICE_BYTES = 32768


def chunk_sparse_ffn(
    hidden: int | None,
    experts: int | None,
    size: int | None,
    dtype: str,
    act: str | None,
    gated: bool,
    tiling: Tiling,
    quantisation: Quantisation | None = None,
) -> tirx.PrimFunc:
    """Builds ``f(x, scores, up, [gate,] down, y[, act])``.

    Args:
        hidden: H; None reads it from the shapes of the arguments, which costs no speed.
        experts: E; likewise.
        size: S; likewise.
        dtype: of every tensor: float32, bfloat16 or float16.
        act: activation of the experts; None takes it from the last argument, its index (int32) in
            :data:`ACTIVATIONS`.
        gated: whether there is a gate.
        tiling: panels of the packed weights, and register use.
        quantisation: of the weights; None has them in ``dtype``.

    Returns:
        A function of x [n, H], scores [n, E], up and gate [E, S/P, H, P], down [E, H/P, S, P],
        each followed by its scales where they are quantised (see :func:`tile.weight_arguments`),
        and the result y [n, H], for any n from 1.
    """
    h, e, s = (
        tirx.Var(name, "int32") if length is None else length
        for name, length in (("hidden", hidden), ("experts", experts), ("size", size))
    )
    up_p, down_p = tiling.up_panel, tiling.down_panel
    up_panels, down_panels = (s + (up_p - 1)) // up_p, (h + (down_p - 1)) // down_p
    streams = tiling.registers.streams
    dot_up, dot_down = (
        quantisation is None and in_pairs(tiling.registers.dot, dtype, depth) for depth in (h, s)
    )
    # 64 bytes more per row: rows a power of two apart would share one set of the L1 cache.
    pad = LANES

    with kernel("chunk_sparse_ffn") as builder:
        n = tirx.Var("n", "int32")
        x = T.arg("x", T.buffer((n, h), dtype))
        scores = T.arg("scores", T.buffer((n, e), dtype))
        first_shape, down_shape = (e, up_panels, h, up_p), (e, down_panels, s, down_p)
        up = weight_arguments("up", first_shape, dtype, quantisation)
        gate = weight_arguments("gate", first_shape, dtype, quantisation) if gated else None
        down = weight_arguments("down", down_shape, dtype, quantisation)
        y = T.arg("y", T.buffer((n, h), dtype))
        chosen = T.arg("act", T.int32()) if act is None else None

        pairs = n * e
        x32 = T.alloc_buffer((n, h + pad), "float32")
        y32 = T.alloc_buffer((n, down_panels * down_p + pad), "float32")
        mid = T.alloc_buffer((pairs, up_panels * up_p + pad), "float32")
        # The same as products in pairs take them, by their bits: TVM loses bfloat16 buffers.
        wide = (pairs, up_panels * up_p + 2 * pad)
        mid16 = T.alloc_buffer(wide, "uint16") if dot_down else mid
        gates = T.alloc_buffer((pairs if gated else 1, up_panels * up_p + pad), "float32")
        pair_token = T.alloc_buffer((pairs,), "int32")
        pair_score = T.alloc_buffer((pairs,), "float32")
        # The active experts, ascending, and the first pair of each.
        active = T.alloc_buffer((e,), "int32")
        offset = T.alloc_buffer((e + 1,), "int32")
        used = T.alloc_buffer((n,), "int32")
        counts = T.alloc_buffer((2,), "int32")  # active experts, pairs

        # Plan.  A score is compared by its bits: NaN is active, -0.0 is not.
        T.buffer_store(counts, 0, [0])
        T.buffer_store(counts, 0, [1])
        with T.serial(n) as t:
            T.buffer_store(used, 0, [t])
        with T.serial(e) as expert:
            T.buffer_store(offset, counts[1], [counts[0]])
            with T.serial(n) as t:
                score = T.bind(widen(scores[t, expert], dtype, 1))
                magnitude = T.reinterpret("uint32", score) & T.uint32(0x7FFFFFFF)
                with T.If(magnitude != T.uint32(0)), T.Then():
                    T.buffer_store(pair_token, t, [counts[1]])
                    T.buffer_store(pair_score, score, [counts[1]])
                    T.buffer_store(counts, counts[1] + 1, [1])
                    T.buffer_store(used, 1, [t])
            with T.If(counts[1] > offset[counts[0]]), T.Then():
                T.buffer_store(active, expert, [counts[0]])
                T.buffer_store(counts, counts[0] + 1, [0])
        T.buffer_store(offset, counts[1], [counts[0]])

        with T.serial(n) as t:
            if not dot_up:
                widen_row(x, x32, t)
            # A token without experts still carries its NaN: 0 * sum(x) is NaN or zero.  A product
            # with zero would be simplified away, a fused one is not.
            poison = T.alloc_buffer((1,), "float32")
            T.buffer_store(poison, T.float32(0), [0])
            with T.If(used[t] == 0), T.Then(), T.serial(h) as i:
                value = widen(x[t, i], dtype, 1)
                T.buffer_store(poison, T.fma(value, T.float32(0), poison[0]), [0])
            with T.serial(down_panels * down_p // LANES) as v:
                T.buffer_store(y32, broadcast(poison[0]), [t, at(v * LANES)])

        groups = (up_panels + (streams - 1)) // streams
        with T.parallel(counts[0] * groups) as unit:
            index = T.bind(unit // groups)
            here = (T.bind(active[index]), T.bind(unit % groups * streams))
            panels = T.bind(T.min(up_panels - here[1], streams))
            following = T.bind(T.min(unit + 1, counts[0] * groups - 1))
            then = (T.bind(active[following // groups]), T.bind(following % groups * streams))
            first, last = T.bind(offset[index]), T.bind(offset[index + 1])

            def project(weights: Panels, result: Any) -> None:
                add_products(
                    weights,
                    here,
                    panels,
                    then,
                    (first, last),
                    tiling.registers,
                    source=lambda pair: (x if dot_up else x32, T.bind(pair_token[pair])),
                    target=lambda pair: (result, pair),
                    accumulate=False,
                    dot=dot_up,
                )

            project(up, mid)
            if gate is not None:
                project(gate, gates)

            def activate(function: Callable[[Any], Any]) -> None:
                with T.serial(last - first) as i, T.serial(panels * (up_p // LANES)) as v:
                    pair = T.bind(first + i)
                    column = T.bind(here[1] * up_p + v * LANES)
                    value = T.bind(mid[pair, at(column)])
                    if gated:
                        value = value * function(T.bind(gates[pair, at(column)]))
                    else:
                        value = function(value)
                    value = value * broadcast(pair_score[pair])
                    if dot_down:
                        value = T.reinterpret(f"uint16x{LANES}", narrow(value, dtype))
                    T.buffer_store(mid16, value, [pair, at(column)])

            if act is not None:
                activate(ACTIVATIONS[act])
            else:
                for number, function in enumerate(ACTIVATIONS.values()):
                    with T.If(chosen == number), T.Then():
                        activate(function)

        most = T.bind(T.max(SLICE_BYTES // (s // down.rows * down.row_bytes), 1))
        with T.parallel((down_panels + (most - 1)) // most) as part:
            begin = T.bind(part * most)
            width = T.bind(T.min(most, down_panels - begin))
            groups = T.bind((width + (streams - 1)) // streams)
            with T.serial(counts[0]) as index, T.serial(groups) as group:
                expert, panel = T.bind(active[index]), T.bind(begin + group * streams)
                following = T.bind(active[T.min(index + 1, counts[0] - 1)])
                end = T.bind(group + 1 == groups)
                add_products(
                    down,
                    (expert, panel),
                    T.bind(T.min(begin + width - panel, streams)),
                    tuple(
                        T.bind(T.Select(end, *places))
                        for places in ((following, expert), (begin, panel + streams))
                    ),
                    (T.bind(offset[index]), T.bind(offset[index + 1])),
                    tiling.registers,
                    source=lambda pair: (mid16, pair),
                    target=lambda pair: (y32, T.bind(pair_token[pair])),
                    accumulate=True,
                    dot=dot_down,
                )
            with T.serial(n) as t, T.serial(width * down_p // LANES) as v:
                store_row(y32, y, t, T.bind(begin * down_p + v * LANES))
    return builder.get()
