"""Building blocks of the CUDA kernels: products of a few tokens with a panel, by one block.

A block has the 16 outputs of a panel for up to 8 tokens.  Each thread reads 16 bytes of a row of
the panel at a time, so that a warp reads 512 bytes in a row; threads differ in their rows, and a
thread keeps the sums of its columns for all tokens.  At the end the sums of a warp are folded with
shuffles, and those of the warps are added in order.

A token's sum is thus formed in one order, whichever other tokens are in the block, and in whichever
place of the block it is: rows are bit-identical alone and in company.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tvm import DataType
from tvm.tirx.script.builder import ir as T

from blockffn_compile.schedules.tir.tile import widen

WARP = 32
WARPS = 8
THREADS = WARP * WARPS
#: Outputs of a panel.
PANEL = 16
#: Most tokens of a block.
TOKENS = 8
#: Reads of weights that a thread has under way.
UNROLL = 4
#: All lanes of a warp.
EVERY = 0xFFFFFFFF


class Step(NamedTuple):
    """A row of a panel that a thread multiplies with.

    Attributes:
        expert: first index of the panels.
        row: third index.
        active: int32, bit t for the t-th token of the block; zero where there is no such row.
    """

    expert: Any
    row: Any
    active: Any


@contextlib.contextmanager
def launch(blocks: Any, threads: int = THREADS) -> Iterator[tuple[Any, Any]]:
    """A kernel; yields the indices of its block and thread.

    Two blocks of 256 threads fit on a multiprocessor, which limits registers to 128.
    """
    with (
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("threadIdx.x", threads) as thread,
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 2),
    ):
        yield block, thread


def device(dtype: str, function: str, *args: Any) -> Any:
    """A call of a function of CUDA that has no effect."""
    return T.call_pure_extern(dtype, function, *args)


def synchronise() -> None:
    """Waits for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared"))


def variable(value: Any, dtype: str) -> Any:
    """A buffer of one element, in a register."""
    buffer = T.alloc_buffer((1,), dtype, scope="local")
    T.buffer_store(buffer, value, [0])
    return buffer


def kept(value: Any, dtype: str = "int32") -> Any:
    """A value that is computed once: read back from a register.

    TVM would repeat an expression, however it is bound, wherever it is used.
    """
    return T.bind(variable(value, dtype)[0])


def digits(number: Any, *sizes: Any) -> list[Any]:
    """``number`` in the places of a mixed base; ``sizes`` are of all places but the first."""
    found = []
    for size in reversed(sizes):
        found.append(kept(T.truncmod(number, size)))
        number = T.truncdiv(number, size)
    return [kept(number), *reversed(found)]


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once."""
    return device("float32", "__fmaf_rn", a, b, c)


def swap(value: Any, distance: int) -> Any:
    """The value of the lane whose number differs in one bit; all lanes of the warp must ask."""
    return kept(
        T.call_extern("float32", "__shfl_xor_sync", T.uint32(EVERY), value, distance), "float32"
    )


def votes(flag: Any) -> Any:
    """The lanes of the warp whose flag is not zero, as bits; all lanes must ask."""
    return kept(T.call_extern("uint32", "__ballot_sync", T.uint32(EVERY), flag), "uint32")


def element(words: Any, index: Any, dtype: str) -> Any:
    """In float32, one of the elements of ``dtype`` that a buffer uint32 holds."""
    if dtype == "float32":
        return device("float32", "__uint_as_float", words[index])
    word = words[T.truncdiv(index, 2)] >> T.cast(T.truncmod(index, 2) * 16, "uint32")
    if dtype == "bfloat16":
        return device("float32", "__uint_as_float", word << T.uint32(16))
    half = device("float16", "__ushort_as_half", T.cast(word, "uint16"))
    return device("float32", "__half2float", half)


def depth(dtype: str) -> int:
    """How many rows of a panel a block reads at once."""
    vector = 16 // DataType(dtype).itemsize
    return THREADS * vector // PANEL


class Products:
    """Sums of a block: up to 8 tokens times 16 outputs.

    Attributes:
        row: of the thread, among the ``depth(dtype)`` rows that a block reads at once.
    """

    def __init__(self, thread: Any, dtype: str, unroll: int = UNROLL) -> None:
        self.dtype, self.thread, self.unroll = dtype, thread, unroll
        self.vector = 16 // DataType(dtype).itemsize
        self.row, column = digits(thread, PANEL // self.vector)
        self.column = column * self.vector  # a multiple, as TVM must know to read vectors
        # In registers, as every loop over it is unrolled.
        self.sums = T.alloc_buffer((TOKENS, self.vector), "float32", scope="local")

    def _add(self, token: Any, factor: Callable[[Any], Any], value: Any) -> None:
        with T.unroll(self.vector) as i:
            T.buffer_store(self.sums, fma(value, factor(i), self.sums[token, i]), [token, i])

    def multiply(
        self,
        weights: Any,
        panel: Any,
        count: Any,
        step: Callable[[Any], Step],
        source: Callable[[Any, Step], Any],
    ) -> None:
        """Products with rows of a panel, as new sums.

        Args:
            weights: panels [E, N/P, K, P].
            panel: second index.
            count: how many steps.
            step: what this thread multiplies with in the i-th step; any i.
            source: float32, of a token of the block, for a step that it is active in.
        """
        words = 4  # of 32 bits, in 16 bytes
        with T.unroll(TOKENS) as token, T.unroll(self.vector) as i:
            T.buffer_store(self.sums, T.float32(0), [token, i])
        unroll = self.unroll
        with T.serial((count + (unroll - 1)) // unroll) as group:
            loaded = T.alloc_buffer((unroll * words,), "uint32", scope="local")
            fields = [T.alloc_buffer((unroll,), "int32", scope="local") for _ in Step._fields]
            steps = [Step(*(field[i] for field in fields)) for i in range(unroll)]
            with T.unroll(unroll) as i:
                for field, value in zip(fields, step(group * unroll + i), strict=True):
                    T.buffer_store(field, value, [i])
                expert, row, active = (field[i] for field in fields)
                with T.If(active != 0), T.Then():
                    columns = T.ramp(self.column, 1, self.vector)
                    value = T.reinterpret(f"uint32x{words}", weights[expert, panel, row, columns])
                    T.buffer_store(loaded, value, [T.ramp(i * words, 1, words)])

            def weight(vectors: Any, i: int) -> Callable[[Any], Any]:
                return lambda j: element(vectors, i * self.vector + j, self.dtype)

            with T.unroll(TOKENS) as token:
                inputs = T.alloc_buffer((unroll,), "float32", scope="local")
                on = [((s.active >> token) & 1) != 0 for s in steps]
                for i, flag in enumerate(on):  # all reads before the first use
                    value = T.if_then_else(flag, source(token, steps[i]), T.float32(0))
                    T.buffer_store(inputs, value, [i])
                for i, flag in enumerate(on):
                    with T.If(flag), T.Then():
                        self._add(token, weight(loaded, i), inputs[i])

    def poison(self, token: Any, x: Any, row: Any) -> None:
        """Makes the sums of a token NaN where ``x[row]`` has a NaN or Inf: adds ``0 * x``."""
        width, dtype = int(x.shape[1]), str(x.dtype)
        stride = depth(self.dtype)
        with T.serial(-(-width // stride)) as i:
            k = kept(i * stride + self.row)
            with T.If(k < width), T.Then():
                value = kept(widen(x[row, k], dtype, 1), "float32")
                self._add(token, _zero, value)

    def fold(self, present: Callable[[Any], Any], parts: Any) -> None:
        """The sums of each warp for the tokens that are ``present``, in shared memory.

        Args:
            present: whether there is a token, the same in all threads.
            parts: of :func:`totals`.
        """
        warp, lane = digits(self.thread, WARP)
        with T.unroll(TOKENS) as token, T.If(present(token)), T.Then():
            values = [kept(self.sums[token, i], "float32") for i in range(self.vector)]
            column, distance = self.column, WARP // 2
            while len(values) > 1:  # each lane hands over half of its columns
                half = len(values) // 2
                upper = kept(T.truncdiv(lane, distance) & 1)
                folded = []
                for low, high in zip(values[:half], values[half:], strict=True):
                    given, own = T.Select(upper != 0, low, high), T.Select(upper != 0, high, low)
                    folded.append(kept(own + swap(given, distance), "float32"))
                values, column = folded, kept(column + upper * half)
                distance //= 2
            value = kept(values[0] + swap(values[0], distance), "float32")
            with T.If(T.bitwise_and(lane, distance) == 0), T.Then():
                T.buffer_store(parts, value, [warp, token, column])


def _zero(_: Any) -> Any:
    return T.float32(0)


def totals() -> Any:
    """Shared memory for :meth:`Products.fold`."""
    return T.alloc_buffer((WARPS, TOKENS, PANEL), "float32", scope="shared")


def total(parts: Any, token: Any, column: Any) -> Any:
    """The sum over the warps."""
    value = parts[0, token, column]
    for warp in range(1, WARPS):
        value = value + parts[warp, token, column]
    return kept(value, "float32")
