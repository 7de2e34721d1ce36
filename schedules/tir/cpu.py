"""The chunk-sparse FFN as one TIR function for CPUs (x86 and Arm).

Steps, for up to :data:`MAX_TOKENS` tokens:

1. Plan: for each active expert the tokens that use it, from the non-zero scores.
2. Up: for each (active expert, panel) and each tile of its tokens, ``x @ up`` with the tile's
   sums in registers, then the activation times the score.  One read of a weight vector serves
   all tokens of the tile.
3. Down: for each output panel, add every active expert's contribution to its tokens.

The sum of one output is formed in fp32 in one fixed order, whatever the other tokens are: fused
multiply-adds over blocks of k, blocks in ascending order, experts in ascending order.  Rows are
bit-identical alone or in a chunk.

Weights are panels [E, N/P, K, P] (see ``schedules/packing.py``).  The IR is built with the
builder rather than TVMScript because the register tile is unrolled at build time; vectors are
explicit, 16 lanes wide, and LLVM splits them to what the target has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

LANES = 16
MAX_TOKENS = 64
#: Terms summed before they join the total: rounding grows with BLOCK + depth / BLOCK, not depth.
BLOCK = 32


@dataclass(frozen=True)
class Tiling:
    """How the kernel uses registers.

    Attributes:
        up_panel: P of the up (and gate) panels, a multiple of 16.
        down_panel: P of the down panels, a multiple of 16.
        tokens: most tokens in one register tile.
    """

    up_panel: int
    down_panel: int
    tokens: int


def _broadcast(value: Any) -> Any:
    return T.broadcast(value, LANES)


def _f32(value: float) -> Any:
    return _broadcast(T.float32(value))


def _widen(value: Any, dtype: str, lanes: int = LANES) -> Any:
    """``dtype`` to float32, exact.  A vector cast from bfloat16 is miscompiled, shifts are not."""
    suffix = f"x{lanes}" if lanes > 1 else ""
    if dtype != "bfloat16":
        return T.cast(value, f"float32{suffix}")
    bits = T.cast(T.reinterpret(f"uint16{suffix}", value), f"uint32{suffix}")
    shift = T.uint32(16) if lanes == 1 else _broadcast(T.uint32(16))
    return T.reinterpret(f"float32{suffix}", bits << shift)


def _narrow(value: Any, dtype: str, lanes: int = LANES) -> Any:
    """float32 to ``dtype``, round to nearest even, NaN stays NaN."""
    suffix = f"x{lanes}" if lanes > 1 else ""
    if dtype != "bfloat16":
        return T.cast(value, f"{dtype}{suffix}")

    def constant(bits: int) -> Any:
        return T.uint32(bits) if lanes == 1 else _broadcast(T.uint32(bits))

    value = T.bind(value)
    bits = T.bind(T.reinterpret(f"uint32{suffix}", value))
    odd = (bits >> constant(16)) & constant(1)
    rounded = (bits + constant(0x7FFF) + odd) >> constant(16)
    is_nan = (bits & constant(0x7FFFFFFF)) > constant(0x7F800000)
    bits = T.Select(is_nan, constant(0x7FC0), rounded)
    return T.reinterpret(f"bfloat16{suffix}", T.cast(bits, f"uint16{suffix}"))


def _exp(value: Any) -> Any:
    """exp of a vector, under 2 ulp; Cephes' expf (Moshier, 1989) with fused multiply-adds.

    Arguments above 88.7 give Inf, below -87.3 zero.  NaN does not survive the clamp.
    """
    value = T.bind(T.min(T.max(value, _f32(-104.0)), _f32(88.9)))
    n = T.bind(T.nearbyint(value * _f32(1.44269504)))
    r = T.bind(T.fma(n, _f32(-0.693359375), value))
    r = T.bind(T.fma(n, _f32(2.12194440e-4), r))
    p: Any = _f32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = T.bind(T.fma(p, r, _f32(c)))
    p = T.bind(T.fma(p, r * r, r + _f32(1.0)))
    exponent = T.cast(n, f"int32x{LANES}") + _broadcast(T.int32(127))
    exponent = T.max(exponent, _broadcast(T.int32(0)))
    return p * T.reinterpret(f"float32x{LANES}", exponent << _broadcast(T.int32(23)))


def _silu(value: Any) -> Any:
    return value / (_f32(1.0) + _exp(_f32(0.0) - value))


def _relu(value: Any) -> Any:
    return T.Select(value < _f32(0.0), _f32(0.0), value)


def _gelu(value: Any) -> Any:
    """Exact GELU; erf by Eigen's rational approximation, about 3 ulp."""
    x = T.bind(T.min(T.max(value * _f32(0.7071067811865476), _f32(-4.0)), _f32(4.0)))
    x2 = T.bind(x * x)
    p: Any = _f32(-2.72614225801306e-10)
    for c in (2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
              -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02):  # fmt: skip
        p = T.bind(T.fma(p, x2, _f32(c)))
    q: Any = _f32(-1.45660718464996e-05)
    for c in (-2.13374055278905e-04, -1.68282697438203e-03,
              -7.37332916720468e-03, -1.42647390514189e-02):  # fmt: skip
        q = T.bind(T.fma(q, x2, _f32(c)))
    return _f32(0.5) * value * (_f32(1.0) + x * p / q)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"silu": _silu, "relu": _relu, "gelu": _gelu}


def _at(column: Any) -> Any:
    """Index of the 16 lanes that start at ``column``."""
    return T.ramp(column, 1, LANES)


def _tile(
    count: int,
    weight: Callable[[Any, int], Any],
    depth: int,
    panel: int,
    source: Callable[[int, Any], Any],
    rows: Sequence[tuple[Any, Any]],
    column: Any,
    accumulate: bool,
) -> None:
    """``rows[i][column:column+panel] (+)= sum_k source(i, k) * weight(k, :)`` for one token tile.

    Args:
        count: tokens, unrolled.
        weight: (k, first lane) to a float32 vector.
        depth: length of the sum.
        panel: lanes of the panel.
        source: (token of the tile, k) to a float32 scalar.
        rows: (buffer, row) that receives each token's sums.
        column: first output column.
        accumulate: start from the stored sums instead of zero.
    """
    vectors = range(0, panel, LANES)
    # One small buffer a token: under 1 kB a buffer is a stack slot that LLVM keeps in registers.
    sums = [T.alloc_buffer((panel,), "float32") for _ in range(count)]

    def every_vector(body: Callable[[Any, Any, Any, int], None]) -> None:
        for (buffer, row), total in zip(rows, sums, strict=True):
            for v in vectors:
                body(total, buffer, row, v)

    if not accumulate:
        every_vector(
            lambda s, buffer, row, v: T.buffer_store(buffer, _f32(0), [row, _at(column + v)])
        )
    with T.serial(-(-depth // BLOCK)) as block:
        every_vector(lambda s, buffer, row, v: T.buffer_store(s, _f32(0), [_at(v)]))
        with T.serial(T.min(BLOCK, depth - block * BLOCK) if depth % BLOCK else BLOCK) as step:
            k = T.bind(block * BLOCK + step)
            loaded = [T.bind(weight(k, v)) for v in vectors]
            for i in range(count):
                scalar = _broadcast(source(i, k))
                for v, vector in zip(vectors, loaded, strict=True):
                    T.buffer_store(sums[i], T.fma(scalar, vector, sums[i][_at(v)]), [_at(v)])
        every_vector(
            lambda s, buffer, row, v: T.buffer_store(
                buffer, buffer[row, _at(column + v)] + s[_at(v)], [row, _at(column + v)]
            )
        )


def _for_tiles(first: Any, last: Any, most: int, body: Callable[[int, Any], None]) -> None:
    """Splits pairs first..last into even tiles and calls ``body(static count, begin)``."""
    total = T.bind(last - first)
    tiles = T.bind((total + (most - 1)) // most)
    with T.serial(tiles) as j:
        begin = T.bind(first + total * j // tiles)
        count = T.bind(first + total * (j + 1) // tiles - begin)

        def choose(size: int) -> None:
            with T.If(count == size):
                with T.Then():
                    body(size, begin)
                if size < most:
                    with T.Else():
                        choose(size + 1)

        choose(1)


def chunk_sparse_ffn(
    hidden: int,
    experts: int,
    size: int,
    dtype: str,
    act: str,
    gated: bool,
    tiling: Tiling,
) -> tirx.PrimFunc:
    """Builds ``f(x, scores, up, [gate,] down, y)``.

    Args:
        hidden: H.
        experts: E.
        size: S.
        dtype: of every argument: float32, bfloat16 or float16.
        act: activation of the experts.
        gated: whether there is a gate.
        tiling: register use; its panels must be those of the packed weights.

    Returns:
        A function of x [n, H], scores [n, E], up and gate [E, S/P, H, P], down [E, H/P, S, P]
        and the result y [n, H], for 1 <= n <= MAX_TOKENS.
    """
    up_p, down_p = tiling.up_panel, tiling.down_panel
    up_panels, down_panels = -(-size // up_p), -(-hidden // down_p)
    whole = hidden // LANES * LANES
    # 64 bytes more per row: rows a power of two apart would share one set of the L1 cache.
    pad = LANES

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("chunk_sparse_ffn")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = tirx.Var("n", "int32")
        x = T.arg("x", T.buffer((n, hidden), dtype))
        scores = T.arg("scores", T.buffer((n, experts), dtype))
        up = T.arg("up", T.buffer((experts, up_panels, hidden, up_p), dtype))
        gate = T.arg("gate", T.buffer((experts, up_panels, hidden, up_p), dtype)) if gated else None
        down = T.arg("down", T.buffer((experts, down_panels, size, down_p), dtype))
        y = T.arg("y", T.buffer((n, hidden), dtype))

        pairs = MAX_TOKENS * experts
        x32 = T.alloc_buffer((MAX_TOKENS, hidden + pad), "float32")
        y32 = T.alloc_buffer((MAX_TOKENS, down_panels * down_p + pad), "float32")
        mid = T.alloc_buffer((pairs, up_panels * up_p + pad), "float32")
        gates = T.alloc_buffer((pairs if gated else 1, up_panels * up_p + pad), "float32")
        pair_token = T.alloc_buffer((pairs,), "int32")
        pair_score = T.alloc_buffer((pairs,), "float32")
        # The active experts, ascending, and the first pair of each.
        active = T.alloc_buffer((experts,), "int32")
        offset = T.alloc_buffer((experts + 1,), "int32")
        used = T.alloc_buffer((MAX_TOKENS,), "int32")
        counts = T.alloc_buffer((2,), "int32")  # active experts, pairs

        # Plan.  A score is compared by its bits: NaN is active, -0.0 is not.
        T.buffer_store(counts, 0, [0])
        T.buffer_store(counts, 0, [1])
        with T.serial(n) as t:
            T.buffer_store(used, 0, [t])
        with T.serial(experts) as e:
            T.buffer_store(offset, counts[1], [counts[0]])
            with T.serial(n) as t:
                score = T.bind(_widen(scores[t, e], dtype, 1))
                magnitude = T.reinterpret("uint32", score) & T.uint32(0x7FFFFFFF)
                with T.If(magnitude != T.uint32(0)), T.Then():
                    T.buffer_store(pair_token, t, [counts[1]])
                    T.buffer_store(pair_score, score, [counts[1]])
                    T.buffer_store(counts, counts[1] + 1, [1])
                    T.buffer_store(used, 1, [t])
            with T.If(counts[1] > offset[counts[0]]), T.Then():
                T.buffer_store(active, e, [counts[0]])
                T.buffer_store(counts, counts[0] + 1, [0])
        T.buffer_store(offset, counts[1], [counts[0]])

        with T.serial(n) as t:
            with T.serial(whole // LANES) as v:
                T.buffer_store(x32, _widen(x[t, _at(v * LANES)], dtype), [t, _at(v * LANES)])
            with T.serial(hidden - whole) as h:
                T.buffer_store(x32, _widen(x[t, whole + h], dtype, 1), [t, whole + h])
            # A token without experts still carries its NaN: 0 * sum(x) is NaN or zero.  A product
            # with zero would be simplified away, a fused one is not.
            poison = T.alloc_buffer((1,), "float32")
            T.buffer_store(poison, T.float32(0), [0])
            with T.If(used[t] == 0), T.Then(), T.serial(hidden) as h:
                T.buffer_store(poison, T.fma(x32[t, h], T.float32(0), poison[0]), [0])
            with T.serial(down_panels * down_p // LANES) as v:
                T.buffer_store(y32, _broadcast(poison[0]), [t, _at(v * LANES)])

        with T.parallel(counts[0] * up_panels) as unit:
            index, panel = T.bind(unit // up_panels), T.bind(unit % up_panels)
            expert = T.bind(active[index])
            first, last = T.bind(offset[index]), T.bind(offset[index + 1])
            for weights, result in ((up, mid), (gate, gates)) if gated else ((up, mid),):

                def up_tile(
                    count: int, begin: Any, weights: Any = weights, out: Any = result
                ) -> None:
                    tokens = [T.bind(pair_token[begin + i]) for i in range(count)]
                    _tile(
                        count,
                        lambda k, v: _widen(weights[expert, panel, k, _at(v)], dtype),
                        hidden,
                        up_p,
                        lambda i, k: x32[tokens[i], k],
                        [(out, begin + i) for i in range(count)],
                        panel * up_p,
                        accumulate=False,
                    )

                _for_tiles(first, last, tiling.tokens, up_tile)
            with T.serial(last - first) as i, T.serial(up_p // LANES) as v:
                pair = T.bind(first + i)
                column = T.bind(panel * up_p + v * LANES)
                value = T.bind(mid[pair, _at(column)])
                if gated:
                    value = value * ACTIVATIONS[act](T.bind(gates[pair, _at(column)]))
                else:
                    value = ACTIVATIONS[act](value)
                T.buffer_store(mid, value * _broadcast(pair_score[pair]), [pair, _at(column)])

        with T.parallel(down_panels) as panel:
            with T.serial(counts[0]) as index:
                expert = T.bind(active[index])

                def down_tile(count: int, begin: Any) -> None:
                    tokens = [T.bind(pair_token[begin + i]) for i in range(count)]
                    _tile(
                        count,
                        lambda k, v: _widen(down[expert, panel, k, _at(v)], dtype),
                        size,
                        down_p,
                        lambda i, k: mid[begin + i, k],
                        [(y32, tokens[i]) for i in range(count)],
                        panel * down_p,
                        accumulate=True,
                    )

                _for_tiles(
                    T.bind(offset[index]), T.bind(offset[index + 1]), tiling.tokens, down_tile
                )
            with T.serial(n) as t, T.serial(down_p // LANES) as v:
                column = T.bind(panel * down_p + v * LANES)
                with T.If(column + LANES <= hidden):
                    with T.Then():
                        T.buffer_store(y, _narrow(y32[t, _at(column)], dtype), [t, _at(column)])
                    with T.Else(), T.serial(hidden - column) as i:
                        j = T.bind(column + i)
                        T.buffer_store(y, _narrow(y32[t, j], dtype, 1), [t, j])
    return builder.get()
