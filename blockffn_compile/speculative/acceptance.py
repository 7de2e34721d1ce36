"""Which drafted tokens the target accepts, without changing what it would have written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from blockffn_compile.speculative.sampling import Sampler, best_tokens
from blockffn_compile.speculative.tree import DraftTree


class Accepted(NamedTuple):
    """The outcome of one verification.

    Attributes:
        path: accepted nodes from the root on, the root (0) included: what the cache keeps.
        tokens: as many: the tokens of ``path[1:]``, and one more that the target chose at the last
            node, the next root.
    """

    path: list[int]
    tokens: list[int]


def accept(
    tree: DraftTree,
    logits: Tensor,
    sampler: Sampler,
    history: Sequence[int],
    position: int,
    stop_tokens: Collection[int] = (),
) -> Accepted:
    """Walks down the tree along the tokens that the target chooses.

    At each node the target's token is drawn as in plain decoding. If a child has that token, the
    walk goes on there, else it ends (SpecInfer, arXiv 2305.09781, its naive sampling). The draft
    therefore decides only how many tokens come out of a step, never which: the output is, draw for
    draw, that of plain decoding with the same sampler, and so has its distribution.

    A step into the tree happens with the target's probability of all children together. For
    children that were chosen without chance (a top-k, an n-gram) no lossless method does better:
    the output is one of them just that often. Multi-step rejection sampling gains only where the
    children are drawn at random from the drafter.

    Args:
        tree: N nodes.
        logits: [N, V] of the target, each row at one node.
        sampler: how the target chooses.
        history: the text up to the root, root included; needed for the repetition penalty only.
        position: index of the first new token in the text.
        stop_tokens: one of these ends the walk, as the last of the new tokens.

    Raises:
        ValueError: the logits are not one row per node.
    """
    if logits.dim() != 2 or len(logits) != len(tree):
        raise ValueError(
            f"{len(tree)} nodes need logits [{len(tree)}, V], got {list(logits.shape)}"
        )
    best = best_tokens(logits) if sampler.is_argmax else None
    text = list(history)
    path, tokens = [0], list[int]()
    while True:
        node = path[-1]
        if best is None:
            token = sampler.choose(logits[node], text, position + len(tokens))
        else:
            token = best[node]
        tokens.append(token)
        text.append(token)
        child = tree.children(node).get(token)
        if child is None or token in stop_tokens:
            return Accepted(path, tokens)
        path.append(child)
