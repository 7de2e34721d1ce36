"""Running a bundle, a few tokens at a time, with TVM's runtime and NumPy alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blockffn_compile.aot.bundle import ALIGNMENT, DTYPE_BYTES, Bundle, tensor
from blockffn_compile.engines.engine import text_length
from blockffn_compile.engines.texts import Move, Texts
from blockffn_compile.speculative.tree import DraftTree

if TYPE_CHECKING:
    import tvm


class Session:
    """A bundle with a cache for several texts.

    Attributes:
        bundle: what runs.
        rows: how many texts there is room for.
        max_length: most tokens of a text.
        cache: keys and values of each layer in turn, [rows, heads, max_length, dim].
    """

    def __init__(self, bundle: Bundle, rows: int = 1, max_length: int | None = None) -> None:
        """Allocates the cache.

        Raises:
            ValueError: ``max_length`` is not within the model's context.
        """
        import tvm
        import tvm_ffi

        manifest = bundle.manifest
        self.bundle, self.rows = bundle, rows
        self.max_length = text_length(max_length, manifest.max_length)
        shape = (rows, manifest.heads, self.max_length)
        self.cache = [
            tvm.runtime.empty((*shape, dim), manifest.dtype)
            for _ in range(manifest.layers)
            for dim in (manifest.key_dim, manifest.value_dim)
        ]
        self._cache_array = tvm_ffi.Array(self.cache)
        self._cache_bytes = [as_bytes(entries) for entries in self.cache]
        # One row an input, each aligned whatever the number of tokens.
        self._inputs = aligned((6, 8 * manifest.max_tokens)).view(np.int64)
        self._views: dict[int, list[tvm.runtime.Tensor]] = {}

    def trunk(self, inputs: Sequence[Sequence[int]]) -> tvm.runtime.Tensor:
        """Features [T, H] of T tokens, see :mod:`blockffn_compile.aot.bundle`.

        Args:
            inputs: tokens, positions, rows, context, slots and ancestors, T integers each, within
                their ranges.
        """
        count = len(inputs[0])
        self._inputs[:, :count] = inputs
        return self.bundle.trunk(
            *self._tensors(count), self._cache_array, self.bundle.trunk_weights
        )

    def head(self, features: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        """Logits [N, V] of features [N, H]."""
        return self.bundle.head(features, self.bundle.head_weights)

    def _tensors(self, count: int) -> list[tvm.runtime.Tensor]:
        """The inputs of ``count`` tokens, in the same memory for every call."""
        import tvm

        if count not in self._views:
            self._views[count] = [tvm.runtime.from_dlpack(row[:count]) for row in self._inputs]
        return self._views[count]

    def prefill(self, row: int, tokens: Sequence[int]) -> Iterator[tvm.runtime.Tensor]:
        """Starts a text anew with these tokens; yields the features of each chunk of them."""
        most = self.bundle.manifest.max_tokens
        for start in range(0, len(tokens), most):
            chunk = tokens[start : start + most]
            count, places = len(chunk), range(start, start + len(chunk))
            yield self.trunk((chunk, places, [row] * count, [start] * count, places, CHAIN[:count]))

    def move(self, row: int, move: Move) -> None:
        """Brings cache entries of a text together."""
        end = move.start + len(move.sources)
        for entries in self._cache_bytes:
            entries[row, :, move.start : end] = entries[row, :, move.sources].swapaxes(0, 1)

    def last(self, features: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        """The last row of features [T, H], as [1, H]."""
        data = as_bytes(features)
        row = aligned((1, data.shape[1]))
        row[:] = data[-1:]
        return tensor(row, (1, features.shape[1]), str(features.dtype))


def greedy(
    session: Session, prompt: Sequence[int], stop_tokens: Collection[int] = ()
) -> Iterator[int]:
    """The most probable tokens after a prompt, until the session's longest text or a stop token.

    Raises:
        ValueError: the prompt is empty, too long, or has a token outside of the vocabulary.
    """
    texts = Texts(session.rows, session.max_length, session.bundle.manifest.vocab_size)
    texts.start(0, prompt)
    (*_, features) = session.prefill(0, prompt)
    logits = session.head(session.last(features))
    for left in reversed(range(session.max_length - texts.lengths[0])):
        token = int(logits.numpy().astype(np.float32).argmax())
        if token in stop_tokens:
            return
        yield token
        if left:
            places = texts.verify({0: DraftTree.root(token)}, 1)
            logits = session.head(session.trunk(places))
            texts.commit(0, [0])


def as_bytes(entries: tvm.runtime.Tensor) -> NDArray[np.uint8]:
    """The memory of a tensor [..., n] as [..., bytes of n elements]."""
    *shape, width = entries.shape
    size = DTYPE_BYTES[str(entries.dtype)]
    data: Any = np.from_dlpack(entries._create_view((*shape, width * size), "uint8"))
    return data


def aligned(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Zeroed bytes at a multiple of ALIGNMENT."""
    size = shape[0] * shape[1]
    data = np.zeros(size + ALIGNMENT, np.uint8)
    skip = -data.ctypes.data % ALIGNMENT
    return data[skip : skip + size].reshape(shape)


#: Ancestors of the nodes of a chain of 64: each sees those before it, and itself.
CHAIN = [(1 << (i + 1)) - 1 for i in range(63)] + [-1]
