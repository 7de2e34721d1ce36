"""Writing keys or values of a few tokens into a static cache, as CUDA kernels."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.cuda.tile import THREADS, digits, launch
from blockffn_compile.schedules.tir.header import kernel, move_arguments, store_arguments


def store_entries(heads: int, dim: int, dtype: str) -> tirx.PrimFunc:
    """Builds ``f(cache, new, rows, slots)``: ``cache[rows[t], :, slots[t]] = new[t]``.

    As ``schedules.tir.cache.store_entries``, any D.
    """
    with kernel("store_entries") as builder:
        cache, new, rows, slots = store_arguments(heads, dim, dtype)
        n = rows.shape[0]
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
    with kernel("move_entries") as builder:
        cache, rows, sources, slots = move_arguments(heads, dim, dtype)
        n = rows.shape[0]
        # A thread has one element of all entries, in order: what it reads, no other one writes.
        with launch(-(-heads * dim // THREADS)) as (block, thread):
            head, d = digits(block * THREADS + thread, dim)
            with T.If(head < heads), T.Then(), T.serial(n) as i:
                row, source, slot = (
                    T.bind(T.cast(place[i], "int32")) for place in (rows, sources, slots)
                )
                T.buffer_store(cache, cache[row, head, source, d], [row, head, slot, d])
    return builder.get()
