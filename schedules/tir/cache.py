"""Writing keys or values of a few tokens into a static cache, and moving them, in TIR for CPUs."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.header import kernel, move_arguments, store_arguments
from blockffn_compile.schedules.tir.tile import LANES, at


def store_entries(heads: int, dim: int, dtype: str) -> tirx.PrimFunc:
    """Builds ``f(cache, new, rows, slots)``: ``cache[rows[t], :, slots[t]] = new[t]``.

    Args:
        heads: G.
        dim: D, a multiple of 16.
        dtype: of the cache and the new entries.

    Returns:
        A function of cache [B, G, L, D], written in place, new [n, G, D], and int64 [n] each:
        rows and slots.
    """
    with kernel("store_entries") as builder:
        cache, new, rows, slots = store_arguments(heads, dim, dtype)
        n = rows.shape[0]
        with T.serial(n) as t:
            row, slot = (T.bind(T.cast(place[t], "int32")) for place in (rows, slots))
            with T.serial(heads) as head, T.serial(dim // LANES) as v:
                lanes = at(v * LANES)
                T.buffer_store(cache, new[t, head, lanes], [row, head, slot, lanes])
    return builder.get()


def move_entries(heads: int, dim: int, dtype: str) -> tirx.PrimFunc:
    """Builds ``f(cache, rows, sources, slots)``: ``cache[rows[i], :, slots[i]] =
    cache[rows[i], :, sources[i]]``, one i after the other.

    Args:
        heads: G.
        dim: D, a multiple of 16.
        dtype: of the cache.

    Returns:
        A function of cache [B, G, L, D], written in place, and int64 [n] each: rows, sources and
        slots.
    """
    with kernel("move_entries") as builder:
        cache, rows, sources, slots = move_arguments(heads, dim, dtype)
        n = rows.shape[0]
        with T.serial(n) as i:
            row, source, slot = (
                T.bind(T.cast(place[i], "int32")) for place in (rows, sources, slots)
            )
            with T.serial(heads) as head, T.serial(dim // LANES) as v:
                lanes = at(v * LANES)
                T.buffer_store(cache, cache[row, head, source, lanes], [row, head, slot, lanes])
    return builder.get()
