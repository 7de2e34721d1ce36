"""Attention of a few tokens over a static cache, as one TIR function with two CUDA kernels.

A token's visible keys in the order of their positions, the context and then its ancestors, are cut
into pieces of 128.  ``pieces`` has a block for each piece of each token and key head; ``together``
joins the pieces of a token.  Which keys are in a piece, and the order of every sum, follow from the
positions alone: a row is bit-identical whichever other tokens are in the call, and whether its
predecessors are still nodes of a tree or already part of the context.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.cuda.tile import (
    WARP,
    device,
    digits,
    element,
    fma,
    kept,
    launch,
    swap,
    synchronise,
    variable,
)
from blockffn_compile.schedules.tir.header import attention_arguments, kernel
from blockffn_compile.schedules.tir.tile import narrow, widen

#: Keys of a piece, and threads of a block.
PIECE = 128
#: Values of a column that a thread has under way.
UNROLL = 8
LEAST = -3e38


class _Piece(NamedTuple):
    """The keys that a block works on, and the thread that does so.

    Attributes:
        token: that the queries are of.
        row: of the cache.
        head: of keys and values.
        number: of the piece among those of the token.
        keys: of this piece.
        thread: index in the block.
    """

    token: Any
    row: Any
    head: Any
    number: Any
    keys: Any
    thread: Any


def cached_attention(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: str
) -> tirx.PrimFunc:
    """Builds ``f(q, keys, values, rows, context, ancestors, y)``.

    As ``schedules.tir.attention.cached_attention``; key_dim a multiple of 8, any value_dim.
    """
    group = heads // kv_heads
    with kernel("cached_attention") as builder:
        q, keys, values, rows, context, ancestors, y = attention_arguments(
            heads, kv_heads, key_dim, value_dim, dtype
        )
        n, length = q.shape[0], keys.shape[2]
        most = (length + (PIECE - 1)) // PIECE
        # Of each piece: sums of the values, weighted by exp(score - largest score); sums of these
        # weights; the largest score.
        means = T.alloc_buffer((n, heads, most, value_dim), "float32")
        sums = T.alloc_buffer((n, heads, most), "float32")
        tops = T.alloc_buffer((n, heads, most), "float32")

        def count_of(t: Any) -> tuple[Any, Any]:
            past = kept(T.cast(context[t], "int32"))
            return past, kept(past + device("int32", "__popcll", ancestors[t]))

        with launch(n * kv_heads * most, PIECE) as (block, thread):
            t, head, number = digits(block, kv_heads, most)
            past, count = count_of(t)
            here = kept(T.min(count - number * PIECE, PIECE))
            with T.If(here > 0), T.Then():
                row = kept(T.cast(rows[t], "int32"))
                piece = _Piece(t, row, head, number, here, thread)
                queries = T.alloc_buffer((group, key_dim), "float32", scope="shared")
                scores, weights = (
                    T.alloc_buffer((group, PIECE), "float32", scope="shared") for _ in range(2)
                )
                slots = T.alloc_buffer((PIECE,), "int32", scope="shared")
                with T.serial(-(-group * key_dim // PIECE)) as i:
                    g, d = digits(i * PIECE + thread, key_dim)
                    with T.If(g < group), T.Then():
                        value = widen(q[t, head * group + g, d], dtype, 1)
                        T.buffer_store(queries, value * T.float32(key_dim**-0.5), [g, d])
                slot = variable(0, "int32")
                with T.If(thread < here), T.Then():
                    _find_slot(slot, number * PIECE + thread, past, ancestors[t])
                T.buffer_store(slots, slot[0], [thread])
                synchronise()
                _score(piece, keys, queries, slot, scores)
                synchronise()
                _weigh(piece, scores, weights, sums, tops)
                synchronise()
                _mean(piece, values, weights, slots, means)

        with launch(n * heads, PIECE) as (block, thread):
            t, head = digits(block, heads)
            _, count = count_of(t)
            pieces = kept((count + (PIECE - 1)) // PIECE)
            top, total = variable(T.float32(LEAST), "float32"), variable(T.float32(0), "float32")
            with T.serial(pieces) as piece:
                T.buffer_store(top, T.max(top[0], tops[t, head, piece]), [0])

            def share(piece: Any) -> Any:
                return device("float32", "expf", tops[t, head, piece] - top[0])

            with T.serial(pieces) as piece:
                T.buffer_store(total, fma(sums[t, head, piece], share(piece), total[0]), [0])
            with T.serial(-(-value_dim // PIECE)) as i:
                column = kept(i * PIECE + thread)
                with T.If(column < value_dim), T.Then():
                    mean = variable(T.float32(0), "float32")
                    with T.serial(pieces) as piece:
                        part = means[t, head, piece, column]
                        T.buffer_store(mean, fma(part, share(piece), mean[0]), [0])
                    T.buffer_store(y, narrow(mean[0] / total[0], dtype, 1), [t, head, column])
    return builder.get()


def _find_slot(slot: Any, index: Any, past: Any, ancestors: Any) -> None:
    """Where the index-th visible key lies: in the context, or at an ancestor."""
    T.buffer_store(slot, index, [0])
    with T.If(index >= past), T.Then():
        rest = variable(T.cast(ancestors, "uint64"), "uint64")
        with T.serial(index - past):
            T.buffer_store(rest, rest[0] & (rest[0] - T.uint64(1)), [0])
        first = device("int32", "__ffsll", T.cast(rest[0], "int64"))
        T.buffer_store(slot, past + first - 1, [0])


def _score(piece: _Piece, keys: Any, queries: Any, slot: Any, scores: Any) -> None:
    """Each thread the scores of its key."""
    (group, key_dim), dtype = map(int, queries.shape), str(keys.dtype)
    vector = 4 if dtype == "float32" else 8
    sums = T.alloc_buffer((group,), "float32", scope="local")
    with T.unroll(group) as g:
        T.buffer_store(sums, T.float32(LEAST), [g])
    with T.If(piece.thread < piece.keys), T.Then():
        with T.unroll(group) as g:
            T.buffer_store(sums, T.float32(0), [g])
        with T.serial(key_dim // vector) as i:
            loaded = T.alloc_buffer((4,), "uint32", scope="local")
            value = keys[piece.row, piece.head, slot[0], T.ramp(i * vector, 1, vector)]
            T.buffer_store(loaded, T.reinterpret("uint32x4", value), [T.ramp(0, 1, 4)])
            with T.unroll(vector) as j:
                key = kept(element(loaded, j, dtype), "float32")
                with T.unroll(group) as g:
                    query = queries[g, i * vector + j]
                    T.buffer_store(sums, fma(key, query, sums[g]), [g])
    synchronise()  # TVM may give the scores the memory of the queries
    with T.unroll(group) as g:
        T.buffer_store(scores, sums[g], [g, piece.thread])


def _weigh(piece: _Piece, scores: Any, weights: Any, sums: Any, tops: Any) -> None:
    """Scores to weights exp(score - largest); each warp has some of the queries."""
    group, warps = int(weights.shape[0]), PIECE // WARP
    warp, lane = digits(piece.thread, WARP)
    with T.serial(-(-group // warps)) as i:
        g = kept(i * warps + warp)
        with T.If(g < group), T.Then():
            places = [lane + j * WARP for j in range(warps)]
            mine = [kept(scores[g, place], "float32") for place in places]
            top = mine[0]
            for score in mine[1:]:
                top = T.max(top, score)
            top, total = kept(top, "float32"), T.float32(0)
            for distance in (16, 8, 4, 2, 1):
                top = kept(T.max(top, swap(top, distance)), "float32")
            for place, score in zip(places, mine, strict=True):
                weight = device("float32", "expf", score - top)
                weight = kept(T.Select(place < piece.keys, weight, T.float32(0)), "float32")
                T.buffer_store(weights, weight, [g, place])
                total = total + weight
            total = kept(total, "float32")
            for distance in (16, 8, 4, 2, 1):
                total = kept(total + swap(total, distance), "float32")
            with T.If(lane == 0), T.Then():
                place = [piece.token, piece.head * group + g, piece.number]
                T.buffer_store(tops, top, place)
                T.buffer_store(sums, total, place)


def _mean(piece: _Piece, values: Any, weights: Any, slots: Any, means: Any) -> None:
    """Weighted sums of the values; each thread has some of the columns."""
    group, (width, dtype) = int(weights.shape[0]), (int(values.shape[3]), str(values.dtype))
    with T.serial(-(-width // PIECE)) as i:
        column = kept(i * PIECE + piece.thread)
        with T.If(column < width), T.Then():
            parts = T.alloc_buffer((group,), "float32", scope="local")
            with T.unroll(group) as g:
                T.buffer_store(parts, T.float32(0), [g])
            with T.serial((piece.keys + (UNROLL - 1)) // UNROLL) as block:
                loaded = T.alloc_buffer((UNROLL,), "float32", scope="local")
                with T.unroll(UNROLL) as j:  # all reads before the first use
                    place = kept(block * UNROLL + j)
                    value = widen(values[piece.row, piece.head, slots[place], column], dtype, 1)
                    value = T.if_then_else(place < piece.keys, value, T.float32(0))
                    T.buffer_store(loaded, value, [j])
                with T.unroll(UNROLL) as j, T.unroll(group) as g:  # past the last key, 0 * 0
                    weight = weights[g, block * UNROLL + j]
                    T.buffer_store(parts, fma(loaded[j], weight, parts[g]), [g])
            with T.unroll(group) as g:
                query = piece.head * group + g
                T.buffer_store(means, parts[g], [piece.token, query, piece.number, column])
