"""Heads of TIR functions: their attributes, and arguments that kernels of CPUs and GPUs share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T


@contextlib.contextmanager
def kernel(name: str) -> Iterator[IRBuilder]:
    """Yields the builder of a function, which TVM shall take as it is."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        yield builder


class Attention(NamedTuple):
    """Arguments of ``cached_attention``: see ``attention.py``."""

    q: Any
    keys: Any
    values: Any
    rows: Any
    context: Any
    ancestors: Any
    y: Any


def attention_arguments(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, dtype: str
) -> Attention:
    n, batch, length = _lengths()
    q = T.arg("q", T.buffer((n, heads, key_dim), dtype))
    keys = T.arg("keys", T.buffer((batch, kv_heads, length, key_dim), dtype))
    values = T.arg("values", T.buffer((batch, kv_heads, length, value_dim), dtype))
    rows, context, ancestors = _places(n, "rows", "context", "ancestors")
    y = T.arg("y", T.buffer((n, heads, value_dim), dtype))
    return Attention(q, keys, values, rows, context, ancestors, y)


def store_arguments(heads: int, dim: int, dtype: str) -> tuple[Any, ...]:
    """cache, new, rows and slots: see ``cache.store_entries``."""
    n, batch, length = _lengths()
    cache = T.arg("cache", T.buffer((batch, heads, length, dim), dtype))
    return cache, T.arg("new", T.buffer((n, heads, dim), dtype)), *_places(n, "rows", "slots")


def move_arguments(heads: int, dim: int, dtype: str) -> tuple[Any, ...]:
    """cache, rows, sources and slots: see ``cache.move_entries``."""
    n, batch, length = _lengths()
    cache = T.arg("cache", T.buffer((batch, heads, length, dim), dtype))
    return cache, *_places(n, "rows", "sources", "slots")


def _lengths() -> list[tirx.Var]:
    return [tirx.Var(name, "int32") for name in ("n", "batch", "length")]


def _places(n: tirx.Var, *names: str) -> list[Any]:
    return [T.arg(name, T.buffer((n,), "int64")) for name in names]
