"""What every engine does whose bits do not depend on company, and trees to show it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from blockffn_compile.engines.engine import Engine
from blockffn_compile.speculative.tree import DraftTree

ROWS, LENGTH = 2, 100
PROMPT = [5, 17, 3, 250, 17, 99, 4, 61, 12]


def tree(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    depth = [0.0]
    for parent in parents[1:]:
        depth.append(depth[parent] - 1)
    return DraftTree(
        np.array(tokens, np.int64), np.array(parents, np.int64), np.array(depth, np.float32)
    )


def chain(tokens: Sequence[int]) -> DraftTree:
    return tree(tokens, range(-1, len(tokens) - 1))


def random_tree(size: int, seed: int) -> DraftTree:
    """Its first child is that of the root, its last one lies deep; siblings never share a token."""
    rng = np.random.default_rng(seed)
    parents = [-1, *(int(rng.integers(max(0, i - 4), i)) for i in range(1, size))]
    return tree([int(t) for t in rng.permutation(300)[:size]], parents)


def path_to(drafts: DraftTree, node: int) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, int(drafts.parents[path[0]]))
    return path


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def plain(engine: Engine, row: int, tokens: Sequence[int]) -> list[Tensor]:
    """Decodes given tokens one by one: the logits after each."""
    logits = []
    for token in tokens:
        logits.append(engine.verify({row: DraftTree.root(token)})[row].logits[0].clone())
        engine.commit(row, [0])
    return logits


class BitsOfPlainDecoding:
    """Tests of a fixture ``engine`` with two rows.

    Attributes:
        entries: (engine, row, start, end) to copies of the cache at these slots; default: all of
            the row's text.
    """

    entries: Callable[..., list[Tensor]]

    @pytest.mark.parametrize("size", [2, 6, 8, 23, 64])
    def test_every_node_of_a_tree(self, engine, size):
        """Alone, and in one pass with the tree of another row."""
        drafts = random_tree(size, seed=size)
        engine.prefill(0, PROMPT)
        logits = engine.verify({0: drafts})[0].logits.clone()
        if size < 64:
            engine.prefill(1, PROMPT[:4])
            other = random_tree(min(20, 64 - size), seed=1)
            for trees in ({0: drafts, 1: other}, {1: other, 0: drafts}):
                assert torch.equal(engine.verify(trees)[0].logits, logits)
        for node in {1, size // 2, size - 1}:
            path = path_to(drafts, node)
            engine.prefill(0, PROMPT)
            want = plain(engine, 0, drafts.tokens[path].tolist())
            assert torch.equal(logits[path], torch.stack(want)), node

    def test_commits_keep_what_plain_decoding_would_have_stored(self, engine):
        """Paths that are not side by side, prefixes of them, and the root alone, one by one."""
        engine.prefill(0, PROMPT)
        engine.prefill(1, PROMPT)
        other = self.entries(engine, 1, 0, LENGTH)
        text = list[int]()
        drafts = tree([9, 1, 2, 3, 4, 5, 6], [-1, 0, 0, 1, 2, 4, 4])
        for path in ([0, 2, 4, 6], [0], [0, 2], [0, 1, 3], [0, 2, 4, 5]):
            engine.verify({0: drafts})
            engine.commit(0, path)
            text += drafts.tokens[path].tolist()
            assert engine.length(0) == len(PROMPT) + len(text)
        stored = self.entries(engine, 0)
        after = engine.verify({0: DraftTree.root(77)})[0].logits.clone()
        assert equal(self.entries(engine, 1, 0, LENGTH), other)
        engine.prefill(0, PROMPT)
        plain(engine, 0, text)
        assert equal(self.entries(engine, 0), stored)
        assert torch.equal(engine.verify({0: DraftTree.root(77)})[0].logits, after)

    def test_results_of_a_step_survive_the_next(self, engine):
        """Their memory is not handed out twice."""
        engine.prefill(0, PROMPT)
        first = engine.verify({0: chain([1, 2])})[0]
        kept = first.logits.clone(), first.features.clone()
        engine.verify({0: chain([3, 4])})
        assert equal((first.logits, first.features), kept)
