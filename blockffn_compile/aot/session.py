"""Running a bundle, a few tokens at a time, with TVM's runtime and NumPy alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from blockffn_compile.aot.bundle import ALIGNMENT, DTYPE_BYTES, Bundle
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
        cache: keys and values of each layer in turn, [rows, heads, max_length, dim], on the
            bundle's device.
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
        self._on_cpu = bundle.device == tvm.cpu()
        self.max_length = text_length(max_length, manifest.max_length)
        shape = (rows, manifest.heads, self.max_length)
        self.cache = [
            tvm.runtime.empty((*shape, dim), manifest.dtype, bundle.device)
            for _ in range(manifest.layers)
            for dim in (manifest.key_dim, manifest.value_dim)
        ]
        self._cache_array = tvm_ffi.Array(self.cache)
        # One row an input, each aligned whatever the number of tokens.
        self._inputs = aligned((6, 8 * manifest.max_tokens)).view(np.int64)
        self._device_inputs = [
            tvm.runtime.empty((manifest.max_tokens,), "int64", bundle.device) for _ in self._inputs
        ]
        self._views: dict[int, list[tuple[tvm.runtime.Tensor, tvm.runtime.Tensor]]] = {}

    def trunk(self, inputs: Sequence[Sequence[int]]) -> tvm.runtime.Tensor:
        """Features [T, H] of T tokens, see :mod:`blockffn_compile.aot.bundle`.

        Args:
            inputs: tokens, positions, rows, context, slots and ancestors, T integers each, within
                their ranges.
        """
        return self.bundle.trunk(
            *self._tensors(inputs), self._cache_array, self.bundle.trunk_weights
        )

    def head(self, features: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        """Logits [N, V] of features [N, H]."""
        return self.bundle.head(features, self.bundle.head_weights)

    def _tensors(self, inputs: Sequence[Sequence[int]]) -> list[tvm.runtime.Tensor]:
        """Integers as tensors, in the same memory for every call.

        A GPU's copy of so little is taken at once, and ordered behind what it still has to do.
        """
        import tvm

        count = len(inputs[0])
        self._inputs[: len(inputs), :count] = inputs
        if count not in self._views:
            ours = [tvm.runtime.from_dlpack(row[:count]) for row in self._inputs]
            device = [row._create_view((count,)) for row in self._device_inputs]
            self._views[count] = list(zip(ours, ours if self._on_cpu else device, strict=True))
        views = self._views[count][: len(inputs)]
        if not self._on_cpu:
            for here, there in views:
                here.copyto(there)
        return [there for _, there in views]

    def prefill(self, row: int, tokens: Sequence[int]) -> Iterator[tvm.runtime.Tensor]:
        """Starts a text anew with these tokens; yields the features of each chunk of them."""
        most = self.bundle.manifest.max_tokens
        for start in range(0, len(tokens), most):
            chunk = tokens[start : start + most]
            count, places = len(chunk), range(start, start + len(chunk))
            yield self.trunk((chunk, places, [row] * count, [start] * count, places, CHAIN[:count]))

    def move(self, row: int, move: Move) -> None:
        """Brings cache entries of a text together."""
        count = len(move.sources)
        slots = range(move.start, move.start + count)
        self.bundle.move(*self._tensors(([row] * count, move.sources, slots)), self._cache_array)

    def last(self, features: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        """The last row of features [T, H], as [1, H]."""
        import tvm

        (count, width), dtype = features.shape, str(features.dtype)
        start = (count - 1) * width * DTYPE_BYTES[dtype]
        row = tvm.runtime.empty((1, width), dtype, self.bundle.device)
        return features._create_view((1, width), dtype, start).copyto(row)

    def on_cpu(self, tensor: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        """A result in the CPU's memory; with a GPU, waits for it."""
        import tvm

        if self._on_cpu:
            return tensor
        result = tensor.copyto(tvm.cpu())
        self.bundle.device.sync()
        return result


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


def aligned(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Zeroed bytes at a multiple of ALIGNMENT."""
    size = shape[0] * shape[1]
    data = np.zeros(size + ALIGNMENT, np.uint8)
    skip = -data.ctypes.data % ALIGNMENT
    return data[skip : skip + size].reshape(shape)


#: Ancestors of the nodes of a chain of 64: each sees those before it, and itself.
CHAIN = [(1 << (i + 1)) - 1 for i in range(63)] + [-1]
