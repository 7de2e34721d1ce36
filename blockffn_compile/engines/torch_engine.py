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


def _move(cache: StaticCache, places: Tensor) -> tuple[()]:
    """Copies cache entries from slots to others; places: int64 [3, N], rows, sources, targets."""
    rows, sources, targets = places
    for stored in (*cache.keys, *cache.values):
        stored[rows, :, targets] = stored[rows, :, sources]
    return ()


def _prefill(
    model: BlockFFNForCausalLM, tokens: Tensor, positions: Tensor, cache: StaticCache
) -> tuple[Tensor, Tensor]:
    """Logits [1, V] of the last of tokens [T], and features [T, H] of all."""
    features = model.model(tokens[None], positions, cache)[0]
    return model.lm_head(features[-1:] * model.logit_scale), features


class TorchEngine:
    """A BlockFFN model under ``torch.compile(backend="blockffn")``; see :class:`Engine`.

    On a GPU a step is one CUDA graph, which the host does not wait for.
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
        config, weight = model.config, model.model.embed_tokens.weight
        self.model, self.rows = model, rows
        self.max_length = text_length(max_length, config.max_position_embeddings)
        self.vocab_size = config.vocab_size
        self.cache = StaticCache(config, rows, self.max_length, weight.dtype, weight.device)
        self._texts = Texts(rows, self.max_length, config.vocab_size)
        self._gpu = weight.is_cuda
        self._steps: dict[int, Callable[..., tuple[Tensor, ...]]] = {}
        self._move: Callable[..., tuple[Tensor, ...]] | None = None
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
        if self._gpu:
            self._move_at_once([0], [0], [0])
        self._texts.forget()

    @torch.no_grad()
    def prefill(self, row: int, tokens: Sequence[int]) -> Output:
        """See :class:`Engine`."""
        self._texts.start(row, tokens)
        for stored in (*self.cache.keys, *self.cache.values):
            # Prefill multiplies hidden slots by zero: a NaN of an earlier text would survive that.
            stored[row, :, len(tokens) :] = 0
        device = self.model.model.embed_tokens.weight.device
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
        table = torch.tensor(inputs, pin_memory=self._gpu)
        if bucket not in self._steps:
            example = table.to(self.model.model.embed_tokens.weight.device)
            step = compile_once(_step, (self.model, self.cache), example)
            self._steps[bucket] = capture(step, [example]) if self._gpu else step
        logits, features = self._steps[bucket](table)
        return divide(trees, logits, features)

    @torch.no_grad()
    def commit(self, row: int, path: Sequence[int]) -> None:
        """See :class:`Engine`."""
        move = self._texts.commit(row, path)
        if move is None:
            return
        start, end = move.start, move.start + len(move.sources)
        if self._gpu:
            self._move_at_once([row], move.sources, list(range(start, end)))
            return
        source = torch.tensor(move.sources)
        for stored in (*self.cache.keys, *self.cache.values):
            stored[row, :, start:end] = stored[row].index_select(1, source)

    def _move_at_once(self, *places: list[int]) -> None:
        """The same as one CUDA graph, of as many moves as a tree can need: some are done twice."""
        table = [[*values, *values[-1:] * (BUCKETS[-1] - len(values))] for values in places]
        if self._move is None:
            example = torch.tensor(table, device=self.model.model.embed_tokens.weight.device)
            move = functools.partial(_move, self.cache)
            move(example)
            self._move = capture(move, [example])
        else:
            self._move(torch.tensor(table, pin_memory=True))

    def length(self, row: int) -> int:
        """See :class:`Engine`."""
        return self._texts.lengths[row]
