"""Drafting with an EAGLE head: trees grown level by level (EAGLE-2, arXiv 2406.16858)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockffn_compile.engines.compiled import compile_once
from blockffn_compile.engines.engine import text_length
from blockffn_compile.models.cache import StaticCache, TreeStep
from blockffn_compile.models.eagle import EagleHead
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.speculative.cost import fastest_ms
from blockffn_compile.speculative.tree import DraftTree, TreeBuilder

#: Children of a node, and nodes that grow on each level.
WIDTH = 4
#: Levels of the deepest tree: the head is run once for each.
DEPTH = 5
#: Token counts that graphs are compiled for.
COUNTS = (1, 2, 4, 8, 64)


class Guesses(NamedTuple):
    """What the head says of T tokens.

    Attributes:
        features: [T, H], predicted; they stand in for the target's at the next level.
        log_probs: [T, WIDTH], of the likeliest next tokens, largest first.
        tokens: [T, WIDTH] int64, these, as numbers of the (reduced) drafting vocabulary.
    """

    features: Tensor
    log_probs: Tensor
    tokens: Tensor


def _guess(
    head: EagleHead,
    embedding: Tensor,
    unembedding: Tensor,
    scales: tuple[float, float],
    inputs: Tensor,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Guesses:
    """One pass of the head over nodes, from int64 [6, T] and features [T, H]."""
    tokens, positions, *places = inputs
    embeddings = torch.nn.functional.embedding(tokens, embedding) * scales[0]
    step = TreeStep(StaticCache.of([keys], [values]), *places)
    predicted = head(embeddings[None], features[None], positions, step, None)[0]
    logits = torch.nn.functional.linear(predicted * scales[1], unembedding).float()
    best = logits.topk(WIDTH)
    return Guesses(predicted, best.values - logits.logsumexp(-1, keepdim=True), best.indices)


class EagleModel:
    """A head with its compiled graphs and its drafting vocabulary; serves any number of texts.

    Attributes:
        level_ms: milliseconds for a level of a tree, once warmed up.
    """

    def __init__(
        self, target: BlockFFNForCausalLM, head: EagleHead, max_length: int | None = None
    ) -> None:
        """Sets the length of all caches: the longest text to draft for, and a tree behind it.

        Longer texts than the head's context are drafted for up to its end.

        Raises:
            ValueError: ``max_length`` is less than 1.
        """
        self.target, self.head = target, head
        context = head.config.max_position_embeddings
        asked = None if max_length is None else min(max_length, context)
        self.max_length = text_length(asked, context)
        weight = target.lm_head.weight.detach()
        self.token_map = head.token_map
        self.unembedding = weight if self.token_map is None else weight[self.token_map].contiguous()
        self.level_ms = 0.0
        self._graphs: dict[int, Callable[..., tuple[Tensor, ...]]] = {}

    def new_cache(self) -> StaticCache:
        """A cache for one text."""
        weight = self.target.model.embed_tokens.weight
        return StaticCache(self.head.config, 1, self.max_length, weight.dtype, weight.device)

    @torch.no_grad()
    def warm_up(self) -> Iterator[int]:
        """Compiles the graphs of all token counts, yielding each when it is done; times a level."""
        cache = self.new_cache()
        for count in COUNTS:
            zeros = [[0] * count for _ in range(4)]
            features = self.unembedding.new_zeros(count, self.head.config.hidden_size)
            inputs = [*zeros, [1] * count]
            self.guess(inputs, features, cache)
            if count == WIDTH:
                self.level_ms = fastest_ms(functools.partial(self.guess, inputs, features, cache))
            yield count

    @torch.no_grad()
    def guess(
        self, inputs: Sequence[Sequence[int]], features: Tensor, cache: StaticCache
    ) -> Guesses:
        """Runs the head.

        Args:
            inputs: [5, T], T in COUNTS: tokens, positions, context, slots and ancestor masks of
                :class:`TreeStep`.
            features: [T, H], of the position before each token.
            cache: written at the slots.
        """
        tokens, positions, *places = inputs
        count = len(tokens)
        table = torch.tensor([tokens, positions, [0] * count, *places], device=features.device)
        tensors = (table, features, cache.keys[0], cache.values[0])
        if count not in self._graphs:
            embedding = self.target.model.embed_tokens.weight
            scales = (self.target.config.scale_emb, self.target.logit_scale)
            constants = (self.head, embedding, self.unembedding, scales)
            self._graphs[count] = compile_once(_guess, constants, *tensors)
        return Guesses(*self._graphs[count](*tensors))


class EagleDrafter:
    """Drafts one text with an EAGLE head.

    The head's cache holds one entry for each pair of a target feature and the token after it.  A
    tree's nodes are run behind these and forgotten.

    Attributes:
        name: "eagle".
    """

    name = "eagle"

    def __init__(self, model: EagleModel) -> None:
        self.model, self._cache = model, model.new_cache()
        self.reset()

    def reset(self) -> None:
        """See :class:`Drafter`."""
        self._length = 0  # pairs in the cache
        self._tokens: list[int] = []  # observed, of pairs not yet in the cache
        self._features: list[Tensor] = []

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None:
        """See :class:`Drafter`."""
        if features is None:
            raise ValueError("EAGLE drafts from the target's features, and the engine gives none")
        self._tokens += tokens
        self._features.append(features)
        if self._length == 0:
            while len(self._tokens) > COUNTS[-1]:
                self._extend(self._tokens[1 : COUNTS[-1] + 1])
        elif len(self._tokens) > 2 * COUNTS[-1]:
            self._drop_old()

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        """See :class:`Drafter`."""
        if len(self._tokens) > COUNTS[-1]:
            self._drop_old()
        guesses = self._extend([*self._tokens[1:], root])
        builder = TreeBuilder(root)
        depth = min(DEPTH, nodes - 1, self._cache.max_len - self._length - WIDTH * DEPTH)
        if guesses is None or depth < 1:
            return DraftTree.root(root)
        base, ancestors, run, before = self._length, {0: 0}, 0, [0]
        for level in range(1, depth + 1):
            frontier = builder.expand(self._ids(guesses.tokens), guesses.log_probs.tolist())
            if level == depth or builder.hope < rate * self.model.level_ms:
                break
            parents = [builder.parents[node] for node in frontier]
            rows = guesses.features[[before.index(parent) for parent in parents]]
            for i, (node, parent) in enumerate(zip(frontier, parents, strict=True)):
                ancestors[node] = ancestors[parent] | 1 << (run + i)
            inputs = [
                [builder.tokens[node] for node in frontier],
                [base + level - 1] * WIDTH,
                [base] * WIDTH,
                [base + run + i for i in range(WIDTH)],
                [ancestors[node] for node in frontier],
            ]
            guesses = self.model.guess(inputs, rows, self._cache)
            before = frontier
            run += WIDTH
        return builder.build(nodes)

    def _drop_old(self) -> None:
        """After long not being asked, the head does without what lies far back: catching up costs
        more than that is worth."""
        self._tokens = self._tokens[-COUNTS[-1] :]
        self._features = [torch.cat(self._features)[-COUNTS[-1] :]]

    def _extend(self, tokens: list[int]) -> Guesses | None:
        """Takes the next observed tokens, at most 64, with what follows each into the cache.

        Returns:
            What the head says of the last one, [1, ...]; None where the cache is full.
        """
        count, base = len(tokens), self._length
        features = torch.cat(self._features)
        self._tokens, self._features = self._tokens[count:], [features[count:]]
        if base + count > self._cache.max_len:
            self._length = self._cache.max_len  # and stays full: later pairs would be misplaced
            return None
        bucket = next(size for size in COUNTS if size >= count)
        index = [*range(count), *[0] * (bucket - count)]  # copies of the first fill up
        inputs = [
            [tokens[i] for i in index],
            [base + i for i in index],
            [base] * bucket,
            [base + i for i in index],
            [(1 << (i + 1)) - 1 if i < 63 else -1 for i in index],
        ]
        guesses = self.model.guess(inputs, features[index], self._cache)
        self._length += count
        return Guesses(*(t[count - 1 : count] for t in guesses))

    def _ids(self, tokens: Tensor) -> list[list[int]]:
        token_map = self.model.token_map
        return (tokens if token_map is None else token_map[tokens]).tolist()
