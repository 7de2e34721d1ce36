"""The chunk-sparse FFN as one TIR function with two CUDA kernels.

``up`` finds, in every block, the tokens of each expert as bits of a word, and the active experts
in ascending order.  Blocks then share the work: for each active expert, tile of up to 8 of its
tokens, and panel, the activation of ``x @ up`` times the score.  So an expert that no token uses
costs nothing but its column of scores, and the launch does not depend on which are used.

``down`` has a block for each panel of outputs and tile of 8 tokens, which adds up the active
experts in ascending order.  Tiles of one panel run side by side, so that memory is asked once.

Nothing of this is known to the host.  Weights are panels [E, N/P, K, P] (``schedules/packing.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.cuda.tile import (
    PANEL,
    THREADS,
    TOKENS,
    UNROLL,
    WARP,
    Products,
    Step,
    depth,
    device,
    digits,
    kept,
    launch,
    synchronise,
    total,
    totals,
    variable,
    votes,
)
from blockffn_compile.schedules.tir.header import kernel
from blockffn_compile.schedules.tir.tile import narrow, widen


def _silu(value: Any) -> Any:
    return value / (T.float32(1) + device("float32", "expf", T.float32(0) - value))


def _relu(value: Any) -> Any:
    return T.Select(value < T.float32(0), T.float32(0), value)  # keeps NaN


def _gelu(value: Any) -> Any:
    erf = device("float32", "erff", value * T.float32(0.7071067811865476))
    return T.float32(0.5) * value * (T.float32(1) + erf)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"silu": _silu, "relu": _relu, "gelu": _gelu}


def chunk_sparse_ffn(
    hidden: int, experts: int, size: int, dtype: str, act: str, gated: bool, programs: int
) -> tirx.PrimFunc:
    """Builds ``f(x, scores, up, [gate,] down, y)``.

    Args:
        hidden: H.
        experts: E.
        size: S.
        dtype: of every tensor: float32, bfloat16 or float16.
        act: activation of the experts.
        gated: whether there is a gate.
        programs: blocks of ``up``, as many as the GPU runs at once.

    Returns:
        A function of x [n, H], scores [n, E], up and gate [E, S/P, H, P], down [E, H/P, S, P]
        with P = PANEL, and the result y [n, H], for n from 1 to 64.
    """
    up_panels, down_panels = -(-size // PANEL), -(-hidden // PANEL)
    with kernel("chunk_sparse_ffn") as builder:
        n = tirx.Var("n", "int32")
        x = T.arg("x", T.buffer((n, hidden), dtype))
        scores = T.arg("scores", T.buffer((n, experts), dtype))
        weights = [
            T.arg(name, T.buffer((experts, up_panels, hidden, PANEL), dtype))
            for name in ("up", *(["gate"] if gated else []))
        ]
        down = T.arg("down", T.buffer((experts, down_panels, size, PANEL), dtype))
        y = T.arg("y", T.buffer((n, hidden), dtype))
        tiles = (n + (TOKENS - 1)) // TOKENS

        mid = T.alloc_buffer((experts, n, up_panels * PANEL), "float32")
        # The plan: the tokens of each expert, the active experts, and how many they are.
        sets = T.alloc_buffer((experts,), "uint64")
        order = T.alloc_buffer((experts,), "int32")
        count = T.alloc_buffer((1,), "int32")

        with launch(programs) as (block, thread):
            known, active, found = _plan(scores, n, thread)
            with T.If(block == 0), T.Then():
                with T.serial(-(-experts // THREADS)) as i:
                    expert = T.bind(i * THREADS + thread)
                    with T.If(expert < experts), T.Then():
                        T.buffer_store(sets, known[expert], [expert])
                        T.buffer_store(order, active[expert], [expert])
                with T.If(thread == 0), T.Then():
                    T.buffer_store(count, found[0], [0])
            parts = [totals() for _ in weights]
            # A gate takes registers.
            sums = Products(thread, dtype, UNROLL // len(weights))
            units = T.bind(found[0] * tiles * up_panels)
            with T.serial((units - block + (programs - 1)) // programs) as i:
                index, tile, panel = digits(block + i * programs, tiles, up_panels)
                expert = kept(active[index])
                members = kept(device("int32", "__popcll", known[expert]) - tile * TOKENS)
                with T.If(members > 0), T.Then():
                    tokens = _members(known[expert], tile)
                    _up(sums, x, weights, parts, expert, panel, tokens, members)
                    slot, column = digits(thread, PANEL)
                    with T.If(slot < T.min(members, TOKENS)), T.Then():
                        token = kept(_pick(tokens, slot))
                        value = total(parts[0], slot, column)
                        if gated:
                            value = value * ACTIVATIONS[act](total(parts[1], slot, column))
                        else:
                            value = ACTIVATIONS[act](value)
                        score = widen(scores[token, expert], dtype, 1)
                        T.buffer_store(mid, value * score, [expert, token, panel * PANEL + column])
                    synchronise()

        with launch(tiles * down_panels) as (block, thread):
            panel, tile = digits(block, tiles)
            _down(Products(thread, dtype), x, mid, down, y, (sets, order, count), tile, panel)
    return builder.get()


def _plan(scores: Any, n: Any, thread: Any) -> tuple[Any, Any, Any]:
    """Tokens of each expert; active experts, ascending; their number: all in shared memory."""
    experts, dtype = int(scores.shape[1]), str(scores.dtype)
    known = T.alloc_buffer((experts,), "uint64", scope="shared")
    active = T.alloc_buffer((experts,), "int32", scope="shared")
    found = T.alloc_buffer((1,), "int32", scope="shared")
    with T.serial(-(-experts // THREADS)) as i:
        expert = T.bind(i * THREADS + thread)
        with T.If(expert < experts), T.Then():
            its = variable(T.uint64(0), "uint64")
            with T.serial(n) as t:
                # A score is compared by its bits: NaN is active, -0.0 is not.
                score = T.bind(widen(scores[t, expert], dtype, 1))
                bits = device("uint32", "__float_as_uint", score) & T.uint32(0x7FFFFFFF)
                with T.If(bits != T.uint32(0)), T.Then():
                    T.buffer_store(its, its[0] | (T.uint64(1) << T.cast(t, "uint64")), [0])
            T.buffer_store(known, its[0], [expert])
            T.buffer_store(active, 0, [expert])
    synchronise()
    with T.If(thread < WARP), T.Then():
        taken = variable(0, "int32")
        with T.serial(-(-experts // WARP)) as i:
            expert = T.bind(i * WARP + thread)
            on = variable(0, "int32")
            with T.If(expert < experts), T.Then():
                T.buffer_store(on, T.cast(known[expert] != T.uint64(0), "int32"), [0])
            actives = votes(on[0])
            with T.If(on[0] != 0), T.Then():
                before = actives & ((T.uint32(1) << T.cast(thread, "uint32")) - T.uint32(1))
                T.buffer_store(active, expert, [taken[0] + device("int32", "__popc", before)])
            T.buffer_store(taken, taken[0] + device("int32", "__popc", actives), [0])
        with T.If(thread == 0), T.Then():
            T.buffer_store(found, taken[0], [0])
    synchronise()
    return known, active, found


def _members(tokens: Any, tile: Any) -> Any:
    """Up to 8 tokens of a set, those from the ``8 * tile``-th on."""
    rest = variable(tokens, "uint64")
    members = T.alloc_buffer((TOKENS,), "int32", scope="local")

    def drop() -> None:
        T.buffer_store(rest, rest[0] & (rest[0] - T.uint64(1)), [0])

    with T.serial(tile * TOKENS):
        drop()
    with T.unroll(TOKENS) as i:
        T.buffer_store(members, device("int32", "__ffsll", T.cast(rest[0], "int64")) - 1, [i])
        drop()
    return members


def _pick(members: Any, slot: Any) -> Any:
    """``members[slot]``, of registers."""
    value = members[0]
    for i in range(1, TOKENS):
        value = T.Select(slot == i, members[i], value)
    return value


def _up(
    sums: Products,
    x: Any,
    weights: list[Any],
    parts: list[Any],
    expert: Any,
    panel: Any,
    tokens: Any,
    members: Any,
) -> None:
    """``x @ weight`` for the tokens of a tile, for each weight."""
    hidden, dtype, stride = int(x.shape[1]), str(x.dtype), depth(str(x.dtype))
    active = kept((T.int32(1) << T.min(members, TOKENS)) - 1)

    def step(i: Any) -> Step:
        row = kept(i * stride + sums.row)
        return Step(expert, row, kept(T.Select(row < hidden, active, 0)))

    for weight, part in zip(weights, parts, strict=True):
        sums.multiply(
            weight,
            panel,
            -(-hidden // stride),
            step,
            lambda token, step: widen(x[tokens[token], step.row], dtype, 1),
        )
        sums.fold(lambda token: token < members, part)
        synchronise()


def _down(
    sums: Products, x: Any, mid: Any, down: Any, y: Any, plan: Any, tile: Any, panel: Any
) -> None:
    """The outputs of a panel for the tokens of a tile."""
    (n, hidden), dtype, (sets, order, count) = x.shape, str(x.dtype), plan
    size, stride = int(down.shape[2]), depth(str(x.dtype))
    rows = -(-size // stride)  # steps of an expert
    first = kept(tile * TOKENS)
    steps = T.bind(count[0] * rows)
    used = variable(0, "int32")

    def step(i: Any) -> Step:
        expert, active = variable(0, "int32"), variable(0, "int32")
        index, part = digits(i, rows)
        row = kept(part * stride + sums.row)
        with T.If(i < steps), T.Then():
            T.buffer_store(expert, order[index], [0])
            its = T.cast(sets[expert[0]] >> T.cast(first, "uint64"), "int32")
            its = kept(its & ((1 << TOKENS) - 1))
            T.buffer_store(used, used[0] | its, [0])
            T.buffer_store(active, T.Select(row < size, its, 0), [0])
        return Step(T.bind(expert[0]), row, T.bind(active[0]))

    sums.multiply(
        down, panel, steps, step, lambda token, step: mid[step.expert, first + token, step.row]
    )
    # The dense form has 0 * x for a token without experts.
    with T.unroll(TOKENS) as token:
        lone = T.And(first + token < n, ((used[0] >> token) & 1) == 0)
        with T.If(lone), T.Then():
            sums.poison(token, x, first + token)
    parts = totals()
    sums.fold(lambda token: first + token < n, parts)
    synchronise()
    slot, column = digits(sums.thread, PANEL)
    token, output = kept(first + slot), kept(panel * PANEL + column)
    there = T.And(slot < TOKENS, T.And(token < n, output < hidden))
    with T.If(there), T.Then():
        T.buffer_store(y, narrow(total(parts, slot, column), dtype, 1), [token, output])
