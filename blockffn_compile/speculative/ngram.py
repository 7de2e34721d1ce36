"""Drafting without weights: what followed the same words before."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from blockffn_compile.speculative.tree import DraftTree, best_tree

#: Earlier places that one proposal looks at, and how far it reads on from each.
OCCURRENCES, REACH = 8, 16

#: The count of what was never seen. On Python sources, probabilities come out right with 4.
ESCAPE = 4


class NGramDrafter:
    """Proposes what followed the text's last tokens earlier in the same text (prompt lookup).

    The last ``max_ngram`` tokens, root included, are looked up in the text, then fewer, down to
    one; of equally long matches the latest first. What follows the places found is merged into a
    tree. A place where n tokens match counts n^2 for every token of its continuation, and a
    child's probability is

        count(child) / (count(parent) + ESCAPE),

    the smoothing of prediction by partial matching (Cleary and Witten, 1984), which leaves some
    probability to what was never seen.

    Attributes:
        name: "ngram".
    """

    name = "ngram"

    def __init__(self, max_ngram: int = 6) -> None:
        if max_ngram < 1:
            raise ValueError(f"max_ngram must be >= 1, got {max_ngram}")
        self._sizes = range(max_ngram, 0, -1)  # longest first: the order of looking up
        self.reset()

    def reset(self) -> None:
        """See :meth:`Drafter.reset`."""
        self._text: list[int] = []
        # n-gram -> index of the token after it, for each time it occurs.
        self._index: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """See :meth:`Drafter.observe`; the features are not used."""
        text, index = self._text, self._index
        for token in tokens:
            text.append(token)
            end = len(text)
            for n in self._sizes:
                if n <= end:
                    index[tuple(text[end - n :])].append(end)

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        """See :meth:`Drafter.propose`; a level costs next to nothing, whatever the rate."""
        text = [*self._text[-self._sizes[0] :], root]
        places: dict[int, int] = {}  # index of the first token to propose -> tokens that match
        for n in self._sizes:
            if n > len(text):
                continue
            for place in reversed(self._index.get(tuple(text[-n:]), ())):
                if len(places) == OCCURRENCES:
                    break
                places.setdefault(place, n)
        return self._merge(root, places, nodes)

    def _merge(self, root: int, places: dict[int, int], nodes: int) -> DraftTree:
        tokens, parents, counts = [root], [-1], [0]
        children: list[dict[int, int]] = [{}]
        reach = min(REACH, nodes - 1)
        for place, matched in places.items():
            weight = matched * matched
            # The root follows the observed text, so it may be part of a continuation.
            continuation = self._text[place : place + reach]
            if len(continuation) < reach:
                continuation.append(root)
            node = 0
            counts[0] += weight
            for token in continuation:
                child = children[node].get(token)
                if child is None:
                    child = len(tokens)
                    children[node][token] = child
                    tokens.append(token)
                    parents.append(node)
                    counts.append(0)
                    children.append({})
                counts[child] += weight
                node = child
        log_probs = [0.0]
        for node in range(1, len(tokens)):
            parent = parents[node]
            share = counts[node] / (counts[parent] + ESCAPE)
            log_probs.append(log_probs[parent] + math.log(share))
        return best_tree(tokens, parents, log_probs, nodes)
