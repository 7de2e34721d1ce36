"""Writing keys or values of a few tokens into a static cache, and moving them, in TIR for CPUs."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

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
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("store_entries")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n, batch, length = (tirx.Var(name, "int32") for name in ("n", "batch", "length"))
        cache = T.arg("cache", T.buffer((batch, heads, length, dim), dtype))
        new = T.arg("new", T.buffer((n, heads, dim), dtype))
        rows, slots = (T.arg(name, T.buffer((n,), "int64")) for name in ("rows", "slots"))
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
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("move_entries")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n, batch, length = (tirx.Var(name, "int32") for name in ("n", "batch", "length"))
        cache = T.arg("cache", T.buffer((batch, heads, length, dim), dtype))
        rows, sources, slots = (
            T.arg(name, T.buffer((n,), "int64")) for name in ("rows", "sources", "slots")
        )
        with T.serial(n) as i:
            row, source, slot = (
                T.bind(T.cast(place[i], "int32")) for place in (rows, sources, slots)
            )
            with T.serial(heads) as head, T.serial(dim // LANES) as v:
                lanes = at(v * LANES)
                T.buffer_store(cache, cache[row, head, source, lanes], [row, head, slot, lanes])
    return builder.get()
