"""Drafting with a smaller model of the same vocabulary."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from blockffn_compile.engines.engine import BUCKETS, Engine
from blockffn_compile.speculative.tree import DraftTree, TreeBuilder


class ModelDrafter:
    """Drafts one text with another model.

    Each level of the tree is one verification by that model of all levels above: a node or two
    more than the last level alone, and nothing to roll back.

    Attributes:
        name: "model".
    """

    name = "model"

    def __init__(self, engine: Engine, depth: int = 4, width: int = 1) -> None:
        """Takes over row 0 of an engine.

        Args:
            engine: of the drafting model.
            depth: most levels of a tree.
            width: children of a node, and nodes that grow on each level.

        Raises:
            ValueError: the largest tree has more nodes than the engine verifies at once.
        """
        if depth < 1 or width < 1 or 1 + width * depth > BUCKETS[-1]:
            raise ValueError(f"depth {depth} and width {width} make no tree of 2 to 64 nodes")
        self.engine, self.depth, self.width = engine, depth, width
        self.reset()

    def reset(self) -> None:
        """See :class:`Drafter`."""
        self._pending: list[int] = []
        self._started = False

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None:
        """See :class:`Drafter`; the features are those of another model, and not used."""
        self._pending += tokens

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        """See :class:`Drafter`."""
        self._catch_up()
        start = time.perf_counter()
        builder = TreeBuilder(root)
        room = self.engine.max_length - self.engine.length(0)
        for level in range(min(self.depth, nodes - 1)):
            spent_ms = (time.perf_counter() - start) * 1e3
            if level and builder.hope < rate * spent_ms / level:
                break
            # The nodes that grow, and their ancestors; in the order in which they were added.
            kept = sorted(_closure(builder.frontier, builder.parents))
            if len(kept) > min(room, BUCKETS[-1]):
                break
            index = {node: i for i, node in enumerate(kept)}
            tree = builder.subtree(kept)
            logits = self.engine.verify({0: tree})[0].logits
            rows = logits[[index[node] for node in builder.frontier]].float().log_softmax(-1)
            best = rows.topk(self.width)
            builder.expand(best.indices.tolist(), best.values.tolist())
        return builder.build(nodes)

    def _catch_up(self) -> None:
        """Brings the model's cache up to the observed text."""
        if not self._started:
            self.engine.prefill(0, self._pending)
            self._started, self._pending = True, []
        while self._pending:
            part, self._pending = self._pending[: BUCKETS[-1]], self._pending[BUCKETS[-1] :]
            self.engine.verify({0: DraftTree.chain(part[0], part[1:], [0.0] * (len(part) - 1))})
            self.engine.commit(0, range(len(part)))


def _closure(nodes: Sequence[int], parents: Sequence[int]) -> set[int]:
    """``nodes`` and all their ancestors."""
    closed: set[int] = set()
    for node in nodes:
        while node >= 0 and node not in closed:
            closed.add(node)
            node = parents[node]
    return closed
