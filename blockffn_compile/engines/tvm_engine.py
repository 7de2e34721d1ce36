"""The engine on a bundle compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import tvm
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from blockffn_compile.aot.bundle import Bundle
from blockffn_compile.aot.session import Session
from blockffn_compile.engines.engine import Output, divide
from blockffn_compile.engines.texts import Texts
from blockffn_compile.speculative.tree import DraftTree


class TvmEngine:
    """A bundle; see :class:`~blockffn_compile.engines.engine.Engine`.

    A token's logits are bit-identical however many nodes, and which, are verified with it, and
    whether it came with the prompt.  Nothing is compiled when it runs.  Results are tensors of
    PyTorch in TVM's memory, on the CPU wherever the model runs.

    Attributes:
        rows: how many texts.
        max_length: as asked for, at most the model's context.
        session: the bundle and its cache.
    """

    def __init__(self, bundle: Bundle, rows: int = 1, max_length: int | None = None) -> None:
        """Allocates the cache.

        Raises:
            ValueError: ``max_length`` is not within the model's context.
        """
        self.session = Session(bundle, rows, max_length)
        self.rows, self.max_length = rows, self.session.max_length
        self.vocab_size = bundle.manifest.vocab_size
        self._texts = Texts(rows, self.max_length, self.vocab_size)

    def prefill(self, row: int, tokens: Sequence[int]) -> Output:
        """See :class:`~blockffn_compile.engines.engine.Engine`."""
        self._texts.start(row, tokens)
        chunks = list(self.session.prefill(row, tokens))
        logits = self.session.head(self.session.last(chunks[-1]))
        return Output(self._tensor(logits), torch.cat([self._tensor(chunk) for chunk in chunks]))

    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Output]:
        """See :class:`~blockffn_compile.engines.engine.Engine`."""
        places = self._texts.verify(trees, self.session.bundle.manifest.max_tokens)
        features = self.session.trunk(places)
        logits = self.session.head(features)
        return divide(trees, self._tensor(logits), self._tensor(features))

    def commit(self, row: int, path: Sequence[int]) -> None:
        """See :class:`~blockffn_compile.engines.engine.Engine`."""
        move = self._texts.commit(row, path)
        if move is not None:
            self.session.move(row, move)

    def _tensor(self, result: tvm.runtime.Tensor) -> Tensor:
        return from_dlpack(self.session.on_cpu(result))

    def length(self, row: int) -> int:
        """See :class:`~blockffn_compile.engines.engine.Engine`."""
        return self._texts.lengths[row]
