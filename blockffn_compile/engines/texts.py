"""Which tokens are in an engine's cache, and where those of a step go: what engines share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from blockffn_compile.speculative.tree import DraftTree


class Places(NamedTuple):
    """What a step needs to know of each of its tokens, see ``models.cache.TreeStep``."""

    tokens: list[int]
    positions: list[int]
    rows: list[int]
    context: list[int]
    slots: list[int]
    ancestors: list[int]


class Move(NamedTuple):
    """Cache entries that a commit keeps: those of slots ``sources`` go to ``start``, ...."""

    start: int
    sources: list[int]


class Texts:
    """The texts of an engine: how long each is, and the tree verified behind it.

    Attributes:
        rows: how many.
        max_length: most tokens of a text.
        vocab_size: V.
        lengths: tokens in the cache, by row.
    """

    def __init__(self, rows: int, max_length: int, vocab_size: int) -> None:
        self.rows, self.max_length, self.vocab_size = rows, max_length, vocab_size
        self.lengths = [0] * rows
        self._verified: dict[int, DraftTree] = {}

    def forget(self) -> None:
        """Empties every text."""
        self.lengths = [0] * self.rows
        self._verified.clear()

    def start(self, row: int, tokens: Sequence[int]) -> None:
        """The text of a row is these tokens from now on.

        Raises:
            ValueError: there are none, too many, or one is not in the vocabulary; or there is no
                such row.
        """
        if not 0 <= row < self.rows:
            raise ValueError(f"row {row}: this engine has the rows 0..{self.rows - 1}")
        if not 0 < len(tokens) <= self.max_length:
            raise ValueError(
                f"a text of {len(tokens)} tokens: this engine takes 1 to {self.max_length}"
            )
        self._check(tokens)
        self._verified.pop(row, None)
        self.lengths[row] = len(tokens)

    def verify(self, trees: Mapping[int, DraftTree], most: int) -> Places:
        """Where the nodes of trees go, each tree behind the text of its row.

        Args:
            most: nodes in all.

        Raises:
            ValueError: too many nodes or none, a token outside the vocabulary, or a tree that
                does not fit behind its text.
        """
        places = Places([], [], [], [], [], [])
        for row, tree in trees.items():
            past, count = self.lengths[row], len(tree)
            if past + count > self.max_length:
                raise ValueError(
                    f"{count} nodes behind {past} tokens: the context ends at {self.max_length}"
                )
            places.tokens.extend(tree.tokens.tolist())
            places.positions.extend((tree.depths + past).tolist())
            places.rows.extend([row] * count)
            places.context.extend([past] * count)
            places.slots.extend(range(past, past + count))
            places.ancestors.extend(tree.ancestors.tolist())
        self._check(places.tokens)
        if not 0 < len(places.tokens) <= most:
            raise ValueError(f"{len(places.tokens)} nodes in one step: an engine takes 1 to {most}")
        self._verified = dict(trees)
        return places

    def commit(self, row: int, path: Sequence[int]) -> Move | None:
        """Appends nodes of the tree verified last to the text.

        Returns:
            What has to move in the cache; None where all entries are in their places.

        Raises:
            ValueError: the row has no verified tree, or this is no path from its root.
        """
        tree = self._verified.pop(row, None)
        if tree is None:
            raise ValueError(f"row {row} has no verified tree to commit from")
        if (
            not path
            or path[0] != 0
            or any(
                not 0 < node < len(tree) or tree.parents[node] != before
                for before, node in itertools.pairwise(path)
            )
        ):
            raise ValueError(f"{list(path)} is not a path from the root of the verified tree")
        past = self.lengths[row]
        self.lengths[row] += len(path)
        moved = next((i for i, node in enumerate(path) if node != i), len(path))
        if moved == len(path):
            return None
        return Move(past + moved, [past + node for node in path[moved:]])

    def _check(self, tokens: Sequence[int]) -> None:
        if min(tokens, default=0) < 0 or max(tokens, default=0) >= self.vocab_size:
            bad = next(t for t in tokens if not 0 <= t < self.vocab_size)
            raise ValueError(f"token {bad} is outside the vocabulary 0..{self.vocab_size - 1}")
