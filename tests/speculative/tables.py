"""An engine without a model, and drafters that know it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from blockffn_compile.engines.engine import Output
from blockffn_compile.speculative.policy import Choice, TreePolicy
from blockffn_compile.speculative.tree import DraftTree

VOCABULARY = 12


@cache
def table(*context: int) -> Tensor:
    """Logits [V] after the last two tokens of a text, at random."""
    generator = torch.Generator().manual_seed(hash(context) % 2**32)
    return torch.randn(VOCABULARY, generator=generator)


def plain(prompt: Sequence[int], count: int) -> list[int]:
    """What greedy decoding writes."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(table(*text[-2:]).argmax()))
    return text[len(prompt) :]


class TableEngine:
    """Follows :class:`Engine` to the letter; features are (token, position)."""

    def __init__(self, rows: int = 1, max_length: int = 1000, features: bool = True) -> None:
        self.vocab_size, self.rows, self.max_length = VOCABULARY, rows, max_length
        self.verified: dict[int, DraftTree] = {}
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.sizes: list[int] = []  # nodes of each pass
        self._features = features

    def prefill(self, row: int, tokens: Sequence[int]) -> Output:
        if not 0 < len(tokens) <= self.max_length:
            raise ValueError(f"a text of {len(tokens)} tokens")
        self._check(tokens)
        self.verified.pop(row, None)
        self.texts[row] = list(tokens)
        logits = table(*tokens[-2:])[None]
        return Output(logits, self._feature(list(tokens), range(len(tokens))))

    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Output]:
        self.sizes.append(sum(map(len, trees.values())))
        assert 0 < self.sizes[-1] <= 64
        outputs = {}
        for row, tree in trees.items():
            past = len(self.texts[row])
            assert past + len(tree) <= self.max_length
            tokens = tree.tokens.tolist()
            self._check(tokens)
            before = [self.texts[row][-1], *(tokens[p] for p in tree.parents[1:])]
            logits = torch.stack([table(*pair) for pair in zip(before, tokens, strict=True)])
            features = self._feature(tokens, (tree.depths + past).tolist())
            outputs[row] = Output(logits, features)
        self.verified = dict(trees)
        return outputs

    def commit(self, row: int, path: Sequence[int]) -> None:
        tree = self.verified.pop(row)
        assert path[0] == 0
        assert all(tree.parents[b] == a for a, b in itertools.pairwise(path))
        self.texts[row] += tree.tokens[list(path)].tolist()

    def length(self, row: int) -> int:
        return len(self.texts[row])

    def _feature(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor | None:
        return torch.tensor([tokens, list(positions)]).T if self._features else None

    def _check(self, tokens: Sequence[int]) -> None:
        if any(not 0 <= token < VOCABULARY for token in tokens):
            raise ValueError("token outside the vocabulary")


class Always(TreePolicy):
    """Drafts in every step, with each of the drafters in turn, and verifies all of it."""

    def __init__(self, nodes: int, drafters: int = 1) -> None:
        super().__init__({1: 1.0, 64: 1.0}, [0.0] * drafters)
        self._turns, self._nodes = itertools.cycle(range(drafters)), nodes

    def choose(self) -> Choice:
        return Choice(next(self._turns), self._nodes, False)

    def trim(self, choice: Choice, tree: DraftTree) -> DraftTree:
        return tree


class Oracle:
    """Drafts what follows in the table, or, with ``shift``, always something else.

    On each level the right token comes with ``others`` wrong ones.
    """

    name = "oracle"

    def __init__(self, shift: int = 0, others: int = 0) -> None:
        self._shift, self._others = shift, others
        self.reset()

    def reset(self) -> None:
        self.text: list[int] = []
        self.features: list[list[int]] = []

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None:
        self.text += tokens
        self.features += [] if features is None else features.tolist()

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        tokens, parents, log_probs = [root], [-1], [0.0]
        text, node, depth = [*self.text, root], 0, 0
        while True:
            depth += 1
            (right,) = plain(text, 1)
            # Wrong ones first: the right path is not side by side.
            for i in reversed(range(self._others + 1)):
                if len(tokens) == nodes:
                    return DraftTree(
                        np.array(tokens), np.array(parents), np.array(log_probs, np.float32)
                    )
                tokens.append((right + self._shift + i) % VOCABULARY)
                parents.append(node)
                log_probs.append(-0.25 * depth)
            text, node = [*text, tokens[-1]], len(tokens) - 1
