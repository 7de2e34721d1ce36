"""The engine on ``torch.compile``: one graph per token count over a static cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from blockffn_compile.engines.compiled import capture, compile_once
from blockffn_compile.engines.engine import BUCKETS, Output, divide, text_length
from blockffn_compile.engines.texts import Texts
from blockffn_compile.models.cache import StaticCache, TreeStep
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.speculative.tree import DraftTree


def _step(model: BlockFFNForCausalLM, cache: StaticCache, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and features [T, H] of nodes, from int64 [6, T]."""
    tokens, positions, *places = inputs
    features = model.model(tokens[None], positions, TreeStep(cache, *places))[0]
    return model.lm_head(features * model.logit_scale), features


def _prefill(
    model: BlockFFNForCausalLM, tokens: Tensor, positions: Tensor, cache: StaticCache
) -> tuple[Tensor, Tensor]:
    """Logits [1, V] of the last of tokens [T], and features [T, H] of all."""
    features = model.model(tokens[None], positions, cache)[0]
    return model.lm_head(features[-1:] * model.logit_scale), features


class TorchEngine:
    """A BlockFFN model under ``torch.compile(backend="blockffn")``; see :class:`Engine`.

    On a GPU a step is one CUDA graph.
    On CPUs a token's logits are bit-identical however many nodes, and which, are verified with it.
    Prefill runs in one pass of its own, whose cache entries all later steps share.

    Attributes:
        model: in eval mode.
        rows: how many texts.
        max_length: as asked for, at most the model's context.
        cache: [rows, heads, max_length, dim] for each layer.
    """

    def __init__(
        self, model: BlockFFNForCausalLM, rows: int = 1, max_length: int | None = None
    ) -> None:
        """Allocates the cache.

        Raises:
            ValueError: ``max_length`` is not within the model's context.
        """
        config, weight = model.config, model.lm_head.weight
        self.model, self.rows = model, rows
        self.max_length = text_length(max_length, config.max_position_embeddings)
        self.vocab_size = config.vocab_size
        self.cache = StaticCache(config, rows, self.max_length, weight.dtype, weight.device)
        self._texts = Texts(rows, self.max_length, config.vocab_size)
        self._steps: dict[int, Callable[..., tuple[Tensor, ...]]] = {}
        self._prefill = functools.partial(torch.compile, isolate_recompiles=True)(
            _prefill, backend="blockffn", fullgraph=True
        )

    @torch.no_grad()
    def warm_up(self, buckets: Iterable[int] = BUCKETS) -> Iterator[int]:
        """Compiles the graphs of these token counts, yielding each when it is done.

        What is not warmed up compiles at its first use; nothing compiles after that.  The texts
        of all rows are forgotten.
        """
        for bucket in buckets:
            self._texts.forget()
            trees, left = {}, bucket // 2 + 1  # the fewest nodes that need this graph
            for row in range(self.rows):
                if count := min(left, self.max_length):
                    trees[row] = DraftTree.chain(0, [0] * (count - 1), [0.0] * (count - 1))
                    left -= count
            if not left:  # else no step is ever as large
                self.verify(trees)
            yield bucket
        self._texts.forget()

    @torch.no_grad()
    def prefill(self, row: int, tokens: Sequence[int]) -> Output:
        """See :class:`Engine`."""
        self._texts.start(row, tokens)
        for stored in (*self.cache.keys, *self.cache.values):
            # Prefill multiplies hidden slots by zero: a NaN of an earlier text would survive that.
            stored[row, :, len(tokens) :] = 0
        device = self.model.lm_head.weight.device
        run = torch.tensor(list(tokens), device=device)
        positions = torch.arange(len(run), device=device)
        if len(run) > 1:  # one token is a graph of its own
            torch._dynamo.mark_dynamic(run, 0)
            torch._dynamo.mark_dynamic(positions, 0)
        logits, features = self._prefill(self.model, run, positions, self.cache.sequence(row))
        return Output(logits, features)

    @torch.no_grad()
    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Output]:
        """See :class:`Engine`."""
        inputs = self._texts.verify(trees, BUCKETS[-1])
        count = len(inputs.tokens)
        bucket = next(size for size in BUCKETS if size >= count)
        padding = bucket - count
        for values in inputs:
            # Copies of the first root: they write what it writes, and need no expert of their own.
            values.extend(values[:1] * padding)
        table = torch.tensor(inputs, device=self.model.lm_head.weight.device)
        if bucket not in self._steps:
            step = compile_once(_step, (self.model, self.cache), table)
            self._steps[bucket] = capture(step, [table]) if table.is_cuda else step
        logits, features = self._steps[bucket](table)
        return divide(trees, logits, features)

    @torch.no_grad()
    def commit(self, row: int, path: Sequence[int]) -> None:
        """See :class:`Engine`."""
        move = self._texts.commit(row, path)
        if move is None:
            return
        source = torch.tensor(move.sources, device=self.model.lm_head.weight.device)
        start, end = move.start, move.start + len(source)
        for stored in (*self.cache.keys, *self.cache.values):
            stored[row, :, start:end] = stored[row].index_select(1, source)

    def length(self, row: int) -> int:
        """See :class:`Engine`."""
        return self._texts.lengths[row]
