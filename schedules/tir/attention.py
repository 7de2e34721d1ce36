"""Attention of a few tokens over a static cache, as one TIR function for CPUs.

Each token sees the first ``context`` slots of its sequence and, among the nodes of a tree in the
slots behind them, its ancestors and itself.  Its sums run over these keys in that order and over
no other, so a row is bit-identical whichever other tokens are in the call, and whether its
predecessors are still nodes of a tree or already part of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.header import attention_arguments, kernel
from blockffn_compile.schedules.tir.tile import (
    LANES,
    at,
    broadcast,
    exp,
    f32,
    narrow,
    widen,
)

#: Queries of one key head that share a read of its keys and values.
QUERIES = 2
#: Lanes of a value row summed at a time.
WIDTH = 64


def _fold(value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combines the lanes of a vector, in a fixed order; every lane has the result."""
    for distance in (8, 4, 2, 1):
        value = T.bind(value)
        lanes = [tirx.IntImm("int32", i ^ distance) for i in range(LANES)]
        value = combine(value, T.Shuffle([value], lanes))
    return T.bind(value)


def cached_attention(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: str
) -> tirx.PrimFunc:
    """Builds ``f(q, keys, values, rows, context, ancestors, y)``.

    Args:
        heads: query heads Q, a multiple of ``kv_heads``; consecutive ones share a key head.
        kv_heads: G.
        key_dim: D, a multiple of 16.
        value_dim: V, a multiple of 16.
        dtype: of queries, keys, values and result: float32, bfloat16 or float16.

    Returns:
        A function of q [n, Q, D], keys [B, G, L, D], values [B, G, L, V], int64 [n] each: the
        sequence of a token, how many of its leading slots are visible, and which of the 64 slots
        behind those, as a bit mask; and the result y [n, Q, V].  1 <= n <= CHUNK_TOKENS.  Scores
        are scaled by D**-0.5.
    """
    group = heads // kv_heads
    shared = QUERIES if group % QUERIES == 0 else 1
    with kernel("cached_attention") as builder:
        q, keys, values, rows, context, ancestors, y = attention_arguments(
            heads, kv_heads, key_dim, value_dim, dtype
        )
        n, length = q.shape[0], keys.shape[2]

        with T.parallel(n * kv_heads) as unit:
            head, t = T.bind(unit // n), T.bind(unit % n)
            row = T.bind(T.cast(rows[t], "int32"))
            past = T.bind(T.cast(context[t], "int32"))
            own = T.alloc_buffer((64,), "int32")  # slots of the ancestors
            found = T.alloc_buffer((1,), "int32")
            T.buffer_store(found, 0, [0])
            with T.serial(64) as j:
                bit = (ancestors[t] >> T.cast(j, "int64")) & T.int64(1)
                with T.If(bit != T.int64(0)), T.Then():
                    T.buffer_store(own, past + j, [found[0]])
                    T.buffer_store(found, found[0] + 1, [0])
            count = T.bind(past + found[0])
            wide_q = T.alloc_buffer((group, key_dim), "float32")
            with T.serial(group) as g, T.serial(key_dim // LANES) as v:
                value = widen(q[t, head * group + g, at(v * LANES)], dtype)
                T.buffer_store(wide_q, value * f32(key_dim**-0.5), [g, at(v * LANES)])
            weights = T.alloc_buffer((group, length + LANES), "float32")
            total = T.alloc_buffer((group,), "float32")

            def every_key(body: Callable[[Any, Any], None]) -> None:
                """``body(index, slot)`` for all visible keys in order."""
                with T.serial(past) as i:
                    body(i, i)
                with T.serial(found[0]) as i:
                    body(T.bind(past + i), T.bind(own[i]))

            with T.serial(group // shared) as several:
                queries = [T.bind(several * shared + i) for i in range(shared)]

                def score(i: Any, slot: Any) -> None:
                    sums = [f32(0)] * shared
                    for d in range(0, key_dim, LANES):
                        key = T.bind(widen(keys[row, head, slot, at(d)], dtype))
                        for j, g in enumerate(queries):
                            sums[j] = T.bind(T.fma(key, wide_q[g, at(d)], sums[j]))
                    for g, value in zip(queries, sums, strict=True):
                        folded = _fold(value, lambda a, b: a + b)
                        T.buffer_store(weights, T.Shuffle([folded], [T.int32(0)]), [g, i])

                every_key(score)

            # Softmax; lanes past the end weigh exp(-huge) = 0.
            with T.serial(group) as g:
                T.buffer_store(weights, f32(-3e38), [g, at(count)])
                largest = T.alloc_buffer((LANES,), "float32")
                parts = T.alloc_buffer((LANES,), "float32")
                T.buffer_store(largest, f32(-3e38), [at(0)])
                T.buffer_store(parts, f32(0), [at(0)])
                vectors = T.bind((count + (LANES - 1)) // LANES)
                with T.serial(vectors) as v:
                    value = weights[g, at(v * LANES)]
                    T.buffer_store(largest, T.max(value, largest[at(0)]), [at(0)])
                top = _fold(largest[at(0)], T.max)
                with T.serial(vectors) as v:
                    shifted = T.bind(weights[g, at(v * LANES)] - top)
                    # exp loses NaN, the fused product with zero brings it back.
                    weight = T.bind(T.fma(shifted, f32(0), exp(shifted)))
                    T.buffer_store(weights, weight, [g, at(v * LANES)])
                    T.buffer_store(parts, parts[at(0)] + weight, [at(0)])
                folded = _fold(parts[at(0)], lambda a, b: a + b)
                T.buffer_store(total, T.Shuffle([folded], [T.int32(0)]), [g])

            for start in range(0, value_dim, WIDTH):
                lanes = range(start, min(start + WIDTH, value_dim), LANES)
                with T.serial(group // shared) as several:
                    mine = [T.bind(several * shared + i) for i in range(shared)]
                    sums = [T.alloc_buffer((WIDTH,), "float32") for _ in mine]
                    for output in sums:
                        for d in lanes:
                            T.buffer_store(output, f32(0), [at(d - start)])

                    def add(
                        i: Any,
                        slot: Any,
                        lanes: range = lanes,
                        start: int = start,
                        mine: list[Any] = mine,
                        sums: list[Any] = sums,
                    ) -> None:
                        shares = [broadcast(weights[g, i]) for g in mine]
                        for d in lanes:
                            value = T.bind(widen(values[row, head, slot, at(d)], dtype))
                            for share, output in zip(shares, sums, strict=True):
                                place = at(d - start)
                                T.buffer_store(output, T.fma(share, value, output[place]), [place])

                    every_key(add)
                    for g, output in zip(mine, sums, strict=True):
                        for d in lanes:
                            mean = output[at(d - start)] / broadcast(total[g])
                            place = [t, head * group + g, at(d)]
                            T.buffer_store(y, narrow(mean, dtype), place)
    return builder.get()
