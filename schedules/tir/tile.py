"""Building blocks of the CPU kernels: vectors of 16 lanes, and products with panels.

The IR is built with the builder rather than TVMScript because register tiles are unrolled at build
time; vectors are explicit, and LLVM splits them to what the target has.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm import DataType, tirx
from tvm.tirx.script.builder import ir as T

from blockffn_compile.layer import Quantisation

LANES = 16
#: Terms summed before they join the total: rounding grows with BLOCK + depth / BLOCK, not depth.
BLOCK = 32
#: How far ahead of its use a weight is fetched: hardware stops at the end of each 4 kB page.
PREFETCH_BYTES = 12288
CACHE_LINE_BYTES = 64
#: Of a panel that meets all tokens while the first-level cache holds it, at least one block.
CACHED_BYTES = 8192


class Registers(NamedTuple):
    """How the kernels use a CPU's vector registers.

    Attributes:
        widest: most outputs of a panel, a multiple of 16.
        tokens: most tokens in one register tile.
        streams: panels that few tokens meet side by side; memory is faster with several readers.
        dot: whether there is an instruction for pairs of bfloat16 products (Arm's ``bfdot``).
    """

    widest: int
    tokens: int
    streams: int = 1
    dot: bool = False


@dataclass(frozen=True)
class Tiling:
    """Panels of a layer's weights, and what they are made for.

    Attributes:
        up_panel: P of the up (and gate) panels, a multiple of 16.
        down_panel: P of the down panels, a multiple of 16.
        registers: which both panels fit.
    """

    up_panel: int
    down_panel: int
    registers: Registers


class Panels(NamedTuple):
    """Packed weights as a kernel reads them: [E, N/P, K, P].

    Attributes:
        values: buffer of the kernel's floating-point type; of int8; or of uint8 with K/2 rows, each
            of two: the lower four bits, signed, are those of the first.
        scales: buffer bfloat16 [E, N/P, K/group, P] that integers are multiplied by.
        group: rows to a scale, a multiple of :data:`BLOCK`.
    """

    values: Any
    scales: Any = None
    group: int = 0

    @property
    def dtype(self) -> str:
        return str(self.values.dtype)

    @property
    def rows(self) -> int:
        """How many rows of weights a row of the buffer holds."""
        return 2 if self.dtype == "uint8" else 1

    @property
    def depth(self) -> Any:
        """K."""
        return self.values.shape[2] * self.rows

    @property
    def width(self) -> int:
        """P."""
        return int(self.values.shape[3])

    @property
    def row_bytes(self) -> int:
        """Of a row of the buffer."""
        return self.width * DataType(self.dtype).itemsize


def weight_arguments(
    name: str, shape: Sequence[Any], dtype: str, quantisation: Quantisation | None
) -> Panels:
    """Adds the arguments ``name`` and, where it is quantised, ``name_scales`` to a function.

    Args:
        name: of the first.
        shape: [E, N/P, K, P] of the weights.
        dtype: theirs, unless they are quantised.
        quantisation: of the weights.
    """
    if quantisation is None:
        return Panels(T.arg(name, T.buffer(shape, dtype)))
    *outer, depth, width = shape
    group = quantisation.group
    values = T.buffer((*outer, depth // quantisation.per_byte, width), quantisation.dtype)
    scales = T.buffer((*outer, depth // group, width), "bfloat16")
    return Panels(T.arg(name, values), T.arg(f"{name}_scales", scales), group)


def broadcast(value: Any) -> Any:
    return T.broadcast(value, LANES)


def f32(value: float) -> Any:
    return broadcast(T.float32(value))


def widen(value: Any, dtype: str, lanes: int = LANES) -> Any:
    """``dtype`` to float32, exact.  A vector cast from bfloat16 is miscompiled, shifts are not."""
    suffix = f"x{lanes}" if lanes > 1 else ""
    if dtype != "bfloat16":
        return T.cast(value, f"float32{suffix}")
    bits = T.cast(T.reinterpret(f"uint16{suffix}", value), f"uint32{suffix}")
    shift = T.uint32(16) if lanes == 1 else broadcast(T.uint32(16))
    return T.reinterpret(f"float32{suffix}", bits << shift)


def narrow(value: Any, dtype: str, lanes: int = LANES) -> Any:
    """float32 to ``dtype``, round to nearest even, NaN stays NaN."""
    suffix = f"x{lanes}" if lanes > 1 else ""
    if dtype != "bfloat16":
        return T.cast(value, f"{dtype}{suffix}")

    def constant(bits: int) -> Any:
        return T.uint32(bits) if lanes == 1 else broadcast(T.uint32(bits))

    value = T.bind(value)
    bits = T.bind(T.reinterpret(f"uint32{suffix}", value))
    odd = (bits >> constant(16)) & constant(1)
    rounded = (bits + constant(0x7FFF) + odd) >> constant(16)
    is_nan = (bits & constant(0x7FFFFFFF)) > constant(0x7F800000)
    bits = T.Select(is_nan, constant(0x7FC0), rounded)
    return T.reinterpret(f"bfloat16{suffix}", T.cast(bits, f"uint16{suffix}"))


def exp(value: Any) -> Any:
    """exp of a vector, within 1 ulp; Cephes' expf (Moshier, 1989) with fused multiply-adds.

    Arguments above 88.7 give Inf, below -87.3 zero.  NaN does not survive the clamp.
    """
    value = T.bind(T.min(T.max(value, f32(-104.0)), f32(88.9)))
    n = T.bind(T.nearbyint(value * f32(1.44269504)))
    r = T.bind(T.fma(n, f32(-0.693359375), value))
    r = T.bind(T.fma(n, f32(2.12194440e-4), r))
    p: Any = f32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = T.bind(T.fma(p, r, f32(c)))
    p = T.bind(T.fma(p, r * r, r) + f32(1.0))  # one is added last: it rounds the most
    exponent = T.cast(n, f"int32x{LANES}") + broadcast(T.int32(127))
    exponent = T.max(exponent, broadcast(T.int32(0)))
    return p * T.reinterpret(f"float32x{LANES}", exponent << broadcast(T.int32(23)))


def _silu(value: Any) -> Any:
    return value / (f32(1.0) + exp(f32(0.0) - value))


def _relu(value: Any) -> Any:
    return T.Select(value < f32(0.0), f32(0.0), value)


def _gelu(value: Any) -> Any:
    """Exact GELU; erf by Eigen's rational approximation, about 3 ulp."""
    x = T.bind(T.min(T.max(value * f32(0.7071067811865476), f32(-4.0)), f32(4.0)))
    x2 = T.bind(x * x)
    p: Any = f32(-2.72614225801306e-10)
    for c in (2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
              -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02):  # fmt: skip
        p = T.bind(T.fma(p, x2, f32(c)))
    q: Any = f32(-1.45660718464996e-05)
    for c in (-2.13374055278905e-04, -1.68282697438203e-03,
              -7.37332916720468e-03, -1.42647390514189e-02):  # fmt: skip
        q = T.bind(T.fma(q, x2, f32(c)))
    return f32(0.5) * value * (f32(1.0) + x * p / q)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"silu": _silu, "relu": _relu, "gelu": _gelu}


def at(column: Any) -> Any:
    """Index of the 16 lanes that start at ``column``."""
    return T.ramp(column, 1, LANES)


def _ahead(panels: Panels, here: Sequence[Any], then: Sequence[Any], row: Any) -> list[Any]:
    """[expert, panel, row] of what is read ``PREFETCH_BYTES`` after a row of panel ``here``."""
    count = panels.values.shape[2]
    row = T.bind(row + PREFETCH_BYTES // panels.row_bytes)
    beyond = T.bind(row >= count)
    places = zip((*then, row - count), (*here, row), strict=True)
    return [T.bind(T.Select(beyond, *place)) for place in places]


def _prefetch(panels: Panels, place: Sequence[Any], rows: int = 1) -> None:
    """Fetches rows of the buffer from ``place`` = [expert, panel, row] on into the L2 cache."""
    *panel, first = place
    itemsize = DataType(panels.dtype).itemsize
    for element in range(0, rows * panels.width, CACHE_LINE_BYTES // itemsize):
        row, lane = divmod(element, panels.width)
        address = T.address_of(panels.values[*panel, first + row, lane])
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 0, 2, 1))


#: ``sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]`` for the four lanes i of ``sum``.  Through LLVM's
#: own language because TVM has bfloat16 vectors as integers, which the intrinsic does not take.
#: Weak: every kernel of a module brings it.
_BFDOT = """
define weak_odr hidden <4 x float> @blockffn_bfdot(<4 x float> %sum, <8 x i16> %a, <8 x i16> %b)
    alwaysinline {
  %x = bitcast <8 x i16> %a to <8 x bfloat>
  %y = bitcast <8 x i16> %b to <8 x bfloat>
  %r = call <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(
      <4 x float> %sum, <8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %r
}
declare <4 x float> @llvm.aarch64.neon.bfdot.v4f32.v8bf16(
    <4 x float>, <8 x bfloat>, <8 x bfloat>)
"""


def in_pairs(dot: bool, dtype: str, depth: Any) -> bool:
    """Whether products of ``depth`` terms are summed in pairs: bfloat16, an even number."""
    return dot and dtype == "bfloat16" and isinstance(depth, int) and depth % 2 == 0


def _load(panels: Panels, place: Sequence[Any]) -> list[Any]:
    """16 weights of each row that a row of the buffer holds, in float32, without their scale.

    Args:
        panels: the weights.
        place: [expert, panel, row, lanes].
    """
    vector = panels.values[*place]
    if panels.dtype not in ("int8", "uint8"):
        return [T.bind(widen(vector, panels.dtype))]
    signed = T.cast(T.reinterpret(f"int8x{LANES}", vector), f"int32x{LANES}")
    if panels.dtype == "int8":
        return [T.bind(T.cast(signed, f"float32x{LANES}"))]
    both = T.bind(signed)
    upper = T.bind(both >> broadcast(T.int32(4)))
    lower = (both << broadcast(T.int32(28))) >> broadcast(T.int32(28))
    return [T.bind(T.cast(half, f"float32x{LANES}")) for half in (lower, upper)]


def _add_each(
    sums: Sequence[Any], inputs: Sequence[Any], panels: Panels, place: Sequence[Any]
) -> None:
    """Adds the products with a row of a panel's buffer, ``place`` = [expert, panel, row].

    Args:
        sums: a buffer float32 [P] for each token.
        inputs: (buffer float32, row) of each token.
        panels: the weights.
        place: of the row.
    """
    vectors = range(0, panels.width, LANES)
    loaded = [_load(panels, [*place, at(v)]) for v in vectors]
    for i in range(panels.rows):
        k = place[-1] * panels.rows + i
        for (buffer, row), total in zip(inputs, sums, strict=True):
            scalar = broadcast(buffer[row, k])
            for v, rows in zip(vectors, loaded, strict=True):
                T.buffer_store(total, T.fma(scalar, rows[i], total[at(v)]), [at(v)])


def _add_pair(
    sums: Sequence[Any], inputs: Sequence[Any], panels: Panels, place: Sequence[Any]
) -> None:
    """Adds the products with rows ``k`` and ``k + 1`` of a panel, ``place`` = [expert, panel, k].

    Args:
        sums: a buffer float32 [P] for each token.
        inputs: (buffer bfloat16, or its bits, row) of each token.
        panels: the weights, bfloat16.
        place: of the first of the two rows.
    """
    *panel, k = place
    weights = panels.values
    shares = []
    for buffer, row in inputs:
        both = T.bind(T.reinterpret("uint32", buffer[row, T.ramp(k, 1, 2)]))
        shares.append(T.bind(T.reinterpret("uint16x8", T.broadcast(both, 4))))
    for v in range(0, panels.width, LANES):
        rows = [
            T.bind(T.reinterpret(f"uint16x{LANES}", weights[*panel, k + i, at(v)])) for i in (0, 1)
        ]
        for lane in range(0, LANES, 4):
            order = [i for column in range(lane, lane + 4) for i in (column, LANES + column)]
            pairs = T.bind(T.Shuffle(rows, [T.int32(i) for i in order]))
            four = T.ramp(v + lane, 1, 4)
            for total, share in zip(sums, shares, strict=True):
                value = T.call_extern("float32x4", "blockffn_bfdot", total[four], share, pairs)
                T.buffer_store(total, value, [four])


class _Place(NamedTuple):
    """A panel, and the one that is read after it, which prefetching goes on to."""

    here: tuple[Any, Any]
    then: tuple[Any, Any]


def add_products(
    panels: Panels,
    here: tuple[Any, Any],
    number: Any,
    then: tuple[Any, Any],
    pairs: tuple[Any, Any],
    registers: Registers,
    source: Callable[[Any], tuple[Any, Any]],
    target: Callable[[Any], tuple[Any, Any]],
    accumulate: bool,
    dot: bool,
) -> None:
    """``target[panel] (+)= source @ weights[expert, panel]`` for every pair and panel.

    A part of a panel meets all pairs while the first-level cache holds it.  Few pairs meet
    ``registers.streams`` panels side by side, where registers hold all their sums.

    Args:
        panels: the weights.
        here: expert and first panel.
        number: of panels from there on, 1 to ``registers.streams``.
        then: expert and first panel of those that are read next, which prefetching goes on to.
        pairs: first and last + 1.
        registers: how many tokens and panels at a time.
        source: pair to the (buffer, row) of its K inputs, in float32 or, with ``dot``, bfloat16.
        target: pair to the (buffer, row) of its N outputs in float32.
        accumulate: add to what is in ``target``.
        dot: sum products in pairs; see :func:`in_pairs`.
    """
    depth, width = panels.depth, panels.width
    vectors = range(0, width, LANES)
    step_rows = 2 if dot else 1  # of the buffer
    block_rows = BLOCK // panels.rows
    most, streams = registers.tokens, registers.streams
    few = most // streams
    if panels.scales is not None:
        few = max(few - 1, 1)  # integers on their way to float32 need registers too

    def add_block(
        places: Sequence[_Place], inputs: Sequence[Any], outputs: Sequence[Any], block: Any
    ) -> None:
        # One small buffer each: under 1 kB a buffer is a stack slot that LLVM keeps in registers.
        sums = [[T.alloc_buffer((width,), "float32") for _ in inputs] for _ in places]
        for total in itertools.chain(*sums):
            for v in vectors:
                T.buffer_store(total, f32(0), [at(v)])
        # Hardware keeps up with several streams of whole cache lines (measured on Zen 3: 1.09x).
        fetch = len(places) == 1 or panels.row_bytes % CACHE_LINE_BYTES
        first = T.bind(block * block_rows)
        ahead = [_ahead(panels, *place, first) for place in places] if fetch else []
        # Rows of small integers are so short that many share a line.
        if panels.scales is not None:
            for start in ahead:
                _prefetch(panels, start, block_rows)
            ahead = []
        steps = (panels.values.shape[2] - first) // step_rows
        with T.serial(T.min(block_rows // step_rows, steps)) as step:
            row = T.bind(first + step * step_rows)
            for *panel, start in ahead:
                _prefetch(panels, [*panel, start + step * step_rows], step_rows)
            for place, totals in zip(places, sums, strict=True):
                (_add_pair if dot else _add_each)(totals, inputs, panels, [*place.here, row])
        for place, totals in zip(places, sums, strict=True):
            for v in vectors:
                if panels.scales is not None:
                    group = T.bind(block // (panels.group // BLOCK))
                    scale = T.bind(widen(panels.scales[*place.here, group, at(v)], "bfloat16"))
                for (buffer, row), total in zip(outputs, totals, strict=True):
                    cell = [row, at(place.here[1] * width + v)]
                    if panels.scales is None:
                        value = buffer[*cell] + total[at(v)]
                    else:
                        value = T.fma(total[at(v)], scale, buffer[*cell])
                    T.buffer_store(buffer, value, cell)

    def tile(places: Sequence[_Place], count: int, begin: Any, first: Any, last: Any) -> None:
        inputs = [source(begin + i) for i in range(count)]
        outputs = [target(begin + i) for i in range(count)]
        with T.serial(last - first) as step:
            add_block(places, inputs, outputs, T.bind(first + step))

    total = T.bind(pairs[1] - pairs[0])
    if not accumulate:
        with T.serial(total) as i, T.serial(number * (width // LANES)) as v:
            buffer, row = target(T.bind(pairs[0] + i))
            T.buffer_store(buffer, f32(0), [row, at(T.bind(here[1] * width + v * LANES))])
    blocks = (depth + (BLOCK - 1)) // BLOCK

    def choose(count: Any, sizes: Sequence[int], run: Callable[[int], None]) -> None:
        """Runs what is built for one of ``sizes``, or for the last one."""
        if len(sizes) == 1:
            run(sizes[0])
            return
        with T.If(count == sizes[0]):
            with T.Then():
                run(sizes[0])
            with T.Else():
                choose(count, sizes[1:], run)

    def side_by_side() -> None:
        places = [_Place((here[0], here[1] + i), (then[0], then[1] + i)) for i in range(streams)]
        choose(total, range(1, few + 1), lambda size: tile(places, size, pairs[0], 0, blocks))

    def one_by_one() -> None:
        together = max(CACHED_BYTES // (block_rows * panels.row_bytes), 1)
        # Tiles as even as can be.
        tiles = T.bind(T.max((total + (most - 1)) // most, 1))
        least, larger = T.bind(total // tiles), T.bind(total % tiles)
        with (
            T.serial(number) as i,
            T.serial((blocks + (together - 1)) // together) as part,
            T.serial(tiles) as j,
        ):
            panel, end = T.bind(here[1] + i), T.bind(i + 1 == number)
            following = zip(then, (here[0], panel + 1), strict=True)
            place = _Place(
                (here[0], panel), tuple(T.bind(T.Select(end, *each)) for each in following)
            )
            # Read back from a variable: TVM's arithmetic would carry the quotients through every
            # index of the tile, which took most of the time to compile.
            start = T.alloc_buffer((1,), "int32")
            T.buffer_store(start, pairs[0] + least * j + T.min(j, larger), [0])
            begin, count = T.bind(start[0]), T.bind(T.Select(j < larger, least + 1, least))
            first = T.bind(part * together)
            last = T.bind(T.min(first + together, blocks))
            choose(count, range(1, most + 1), lambda size: tile([place], size, begin, first, last))

    with T.attr(0, "pragma_import_llvm", _BFDOT) if dot else contextlib.nullcontext():
        if streams == 1:
            one_by_one()
        else:
            with T.If(tirx.all(total <= few, number == streams)):
                with T.Then():
                    side_by_side()
                with T.Else():
                    one_by_one()


def widen_row(source: Any, target: Any, row: Any) -> None:
    """``target[row, :width] = source[row]`` in float32, for a source of the given width."""
    width, dtype = source.shape[1], str(source.dtype)
    whole = width // LANES * LANES
    with T.serial(whole // LANES) as v:
        T.buffer_store(target, widen(source[row, at(v * LANES)], dtype), [row, at(v * LANES)])
    with T.serial(width - whole) as k:
        T.buffer_store(target, widen(source[row, whole + k], dtype, 1), [row, whole + k])


def store_row(source: Any, target: Any, row: Any, column: Any) -> None:
    """Rounds 16 float32 values from ``column`` into ``target``, or as many as it still has."""
    width, dtype = target.shape[1], str(target.dtype)
    with T.If(column + LANES <= width):
        with T.Then():
            T.buffer_store(target, narrow(source[row, at(column)], dtype), [row, at(column)])
        with T.Else(), T.serial(width - column) as i:
            j = T.bind(column + i)
            T.buffer_store(target, narrow(source[row, j], dtype, 1), [row, j])
