"""Draft trees: guesses at how a text goes on, verified by the target in one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

#: Nodes of the largest tree, root included: a node's ancestors are the bits of one int64.
MAX_NODES = 64

#: Of the probability of the best node of a level, what its best child has: the mean over the trees
#: that the bundled draft head proposes for held-out code.
BEST_CHILD = 0.36


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A tree of drafted tokens.

    Node 0 is the root: the last token that the target chose, not yet in its cache. A path from the
    root is one guess at the tokens that follow. Every parent precedes its children.

    Attributes:
        tokens: [N] int64.
        parents: [N] int64, -1 for the root.
        log_probs: [N] float32, the drafter's joint log-probability of the path from the root to
            the node; 0 for the root, never larger than the parent's.

    Raises:
        ValueError: the arrays do not describe such a tree; the message names the node.
    """

    tokens: NDArray[np.int64]
    parents: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    _children: list[dict[int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Plain lists: at this size an operation of NumPy costs more than a loop's turn.
        n = len(self.tokens)
        for name, dtype in (("tokens", "int64"), ("parents", "int64"), ("log_probs", "float32")):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != (n,):
                raise ValueError(
                    f"{name} must be {dtype} [{n}], got {array.dtype} {list(array.shape)}"
                )
        if not 1 <= n <= MAX_NODES:
            raise ValueError(f"a tree has 1 to {MAX_NODES} nodes, got {n}")
        tokens, parents, log_probs = (
            self.tokens.tolist(),
            self.parents.tolist(),
            self.log_probs.tolist(),
        )
        if parents[0] != -1 or log_probs[0] != 0:
            raise ValueError(
                "node 0 is the root: parent -1, log-probability 0, "
                f"got {parents[0]} and {log_probs[0]}"
            )
        children: list[dict[int, int]] = [{} for _ in range(n)]
        for node in range(1, n):
            parent, token = parents[node], tokens[node]
            if not 0 <= parent < node:
                raise ValueError(f"node {node}: its parent {parent} does not precede it")
            if not -math.inf < log_probs[node] <= log_probs[parent]:
                raise ValueError(
                    f"node {node}: log-probability {log_probs[node]} is not finite, or above its "
                    f"parent's {log_probs[parent]}"
                )
            if token in children[parent]:
                raise ValueError(f"node {node}: node {parent} has another child of token {token}")
            children[parent][token] = node
        object.__setattr__(self, "_children", children)

    def __len__(self) -> int:
        return len(self._children)

    @staticmethod
    def root(token: int) -> DraftTree:
        """A tree that drafts nothing."""
        return DraftTree.chain(token, [], [])

    @staticmethod
    def chain(root: int, tokens: Sequence[int], log_probs: Sequence[float]) -> DraftTree:
        """One path: ``tokens`` after ``root``, with their joint log-probabilities."""
        return _tree([root, *tokens], list(range(-1, len(tokens))), [0.0, *log_probs])

    def check(self, vocab_size: int, max_nodes: int) -> None:
        """Raises ValueError where the tree is too large, or a token is not in 0..vocab_size-1."""
        if len(self) > max_nodes:
            raise ValueError(f"the tree has {len(self)} nodes, at most {max_nodes} are allowed")
        if self.tokens.min() < 0 or self.tokens.max() >= vocab_size:
            raise ValueError(f"the tree has tokens outside 0..{vocab_size - 1}")

    def children(self, node: int) -> dict[int, int]:
        """Token -> node of each child; not to be changed."""
        return self._children[node]

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """[N] int64, steps from the root."""
        depths = [0]
        for parent in self.parents.tolist()[1:]:
            depths.append(depths[parent] + 1)
        return np.array(depths, np.int64)

    @cached_property
    def ancestors(self) -> NDArray[np.int64]:
        """[N] int64 bit masks: bit j of element i is set where j is i or an ancestor of i."""
        masks = [1]
        for node, parent in enumerate(self.parents.tolist()[1:], start=1):
            masks.append(masks[parent] | 1 << node)
        return np.array(masks, np.uint64).view(np.int64)

    def subtree(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of ``nodes`` alone: ascending, with the parent of each; order is kept."""
        tokens, parents, log_probs = (
            self.tokens.tolist(),
            self.parents.tolist(),
            self.log_probs.tolist(),
        )
        return _subtree(tokens, parents, log_probs, nodes)


def best_nodes(tree: DraftTree, n: int) -> DraftTree:
    """The most probable ``n`` nodes of a tree, ties to the earlier; always with the root.

    Joint probability never rises along a path, so these are a tree: the one of n nodes from which
    the drafter itself expects the most accepted tokens (EAGLE-2, arXiv 2406.16858, reranking).
    """
    if n >= len(tree):
        return tree
    return tree.subtree(most_probable(tree.log_probs.tolist(), n))


class TreeBuilder:
    """Grows a tree level by level, from the most probable nodes only (EAGLE-2, arXiv 2406.16858).

    Attributes:
        tokens, parents: of every node so far, in the order they were added; node 0 is the root.
        frontier: nodes whose children come next; the root at first.
    """

    def __init__(self, root: int) -> None:
        self.tokens = [root]
        self.parents = [-1]
        self.frontier = [0]
        self._log_probs = [0.0]

    @property
    def hope(self) -> float:
        """What the next level is worth, in tokens: about the probability of its best node."""
        return BEST_CHILD * math.exp(max(self._log_probs[node] for node in self.frontier))

    def expand(
        self, tokens: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]]
    ) -> list[int]:
        """Adds children to each node of the frontier; the best k of them are the next frontier.

        Args:
            tokens: [F, K] for F nodes in the frontier; ``Tensor.tolist()`` of a top-k.
            log_probs: [F, K], conditional on the parent.

        Returns:
            The next frontier: the K new nodes of largest joint probability, ascending. The
            children of the frontier's node f are consecutive, so new node number i is number
            i % K of the node i // K.

        Raises:
            ValueError: the shapes do not fit the frontier or each other.
        """
        width = len(tokens[0]) if tokens else 0
        sizes = [[len(row) for row in rows] for rows in (tokens, log_probs)]
        if width == 0 or any(size != [width] * len(self.frontier) for size in sizes):
            raise ValueError(
                f"the frontier has {len(self.frontier)} nodes, each needs as many tokens as "
                f"log-probabilities, got rows of {sizes[0]} and {sizes[1]}"
            )
        first = len(self.tokens)
        for node, row, scores in zip(self.frontier, tokens, log_probs, strict=True):
            joint = self._log_probs[node]
            self.tokens += row
            self.parents += [node] * width
            # Rounding may leave a log-softmax a little above 0.
            self._log_probs += [joint + min(score, 0.0) for score in scores]
        best = most_probable(self._log_probs[first:], width)
        self.frontier = [first + i for i in best]
        return self.frontier

    def subtree(self, nodes: Sequence[int]) -> DraftTree:
        """The tree of ``nodes`` alone: ascending, with the parent of each; order is kept."""
        return _subtree(self.tokens, self.parents, self._log_probs, nodes)

    def build(self, n: int) -> DraftTree:
        """The tree of the most probable ``n`` nodes of all, in the order they were added.

        Raises:
            ValueError: n is not within 1..64, siblings share a token, or a log-probability is not
                finite.
        """
        return best_tree(self.tokens, self.parents, self._log_probs, n)


def best_tree(
    tokens: Sequence[int], parents: Sequence[int], log_probs: Sequence[float], n: int
) -> DraftTree:
    """The most probable ``n`` of any number of nodes; the arguments are as in DraftTree."""
    return _subtree(tokens, parents, log_probs, most_probable(log_probs, n))


def most_probable(log_probs: Sequence[float], n: int) -> list[int]:
    """Indices of the ``n`` largest, ascending; of equal ones the first.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"at least one node must be kept, got {n}")
    best = sorted(range(len(log_probs)), key=log_probs.__getitem__, reverse=True)
    return sorted(best[:n])


def _subtree(
    tokens: Sequence[int],
    parents: Sequence[int],
    log_probs: Sequence[float],
    nodes: Sequence[int],
) -> DraftTree:
    index = {node: i for i, node in enumerate(nodes)}
    index[-1] = -1
    return _tree(
        [tokens[node] for node in nodes],
        [index[parents[node]] for node in nodes],
        [log_probs[node] for node in nodes],
    )


def _tree(tokens: list[int], parents: list[int], log_probs: list[float]) -> DraftTree:
    return DraftTree(
        np.array(tokens, np.int64), np.array(parents, np.int64), np.array(log_probs, np.float32)
    )
