"""Writing keys or values of a few tokens into a static cache, as CUDA kernels."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.cuda.tile import THREADS, digits, launch


def store_entries(heads: int, dim: int, dtype: str) -> tirx.PrimFunc:
    """Builds ``f(cache, new, rows, slots)``: ``cache[rows[t], :, slots[t]] = new[t]``.

    As ``schedules.tir.cache.store_entries``, any D.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("store_entries")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n, batch, length = (tirx.Var(name, "int32") for name in ("n", "batch", "length"))
        cache = T.arg("cache", T.buffer((batch, heads, length, dim), dtype))
        new = T.arg("new", T.buffer((n, heads, dim), dtype))
        rows, slots = (T.arg(name, T.buffer((n,), "int64")) for name in ("rows", "slots"))
        with launch(n) as (t, thread):
            row, slot = (T.bind(T.cast(place[t], "int32")) for place in (rows, slots))
            with T.serial(-(-heads * dim // THREADS)) as i:
                head, d = digits(i * THREADS + thread, dim)
                with T.If(head < heads), T.Then():
                    T.buffer_store(cache, new[t, head, d], [row, head, slot, d])
    return builder.get()


def move_entries(heads: int, dim: int, dtype: str) -> tirx.PrimFunc:
    """Builds ``f(cache, rows, sources, slots)``: ``cache[rows[i], :, slots[i]] =
    cache[rows[i], :, sources[i]]``, one i after the other.

    As ``schedules.tir.cache.move_entries``, any D.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("move_entries")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n, batch, length = (tirx.Var(name, "int32") for name in ("n", "batch", "length"))
        cache = T.arg("cache", T.buffer((batch, heads, length, dim), dtype))
        rows, sources, slots = (
            T.arg(name, T.buffer((n,), "int64")) for name in ("rows", "sources", "slots")
        )
        # A thread has one element of all entries, in order: what it reads, no other one writes.
        with launch(-(-heads * dim // THREADS)) as (block, thread):
            head, d = digits(block * THREADS + thread, dim)
            with T.If(head < heads), T.Then(), T.serial(n) as i:
                row, source, slot = (
                    T.bind(T.cast(place[i], "int32")) for place in (rows, sources, slots)
                )
                T.buffer_store(cache, cache[row, head, source, d], [row, head, slot, d])
    return builder.get()
