"""What a decoding loop needs of a model, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blockffn_compile.speculative.tree import DraftTree

if TYPE_CHECKING:
    from torch import Tensor

#: Token counts of one verification that engines prepare for.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Output(NamedTuple):
    """What the model says of some tokens.

    Attributes:
        logits: [N, V], of the token after each.
        features: [N, H], outputs of the final norm, for drafters; None where an engine has none.
    """

    logits: Tensor
    features: Tensor | None


def divide(trees: Mapping[int, DraftTree], logits: Tensor, features: Tensor) -> dict[int, Output]:
    """The part of each tree, by row; their nodes lie one tree after another."""
    outputs, first = {}, 0
    for row, tree in trees.items():
        end = first + len(tree)
        outputs[row] = Output(logits[first:end], features[first:end])
        first = end
    return outputs


def wait(outputs: Mapping[int, Output]) -> None:
    """Returns when the logits are there: on a GPU, ``verify`` returns before."""
    logits = next(iter(outputs.values())).logits
    if logits.is_cuda:
        logits[0, 0].item()


def text_length(asked: int | None, context: int) -> int:
    """Most tokens of a text: what was asked for, by default all that the model's context takes.

    Raises:
        ValueError: it is not within 1..context.
    """
    length = context if asked is None else asked
    if not 0 < length <= context:
        raise ValueError(f"max_length {length} is not within 1..{context}, the model's context")
    return length


class Engine(Protocol):
    """A model with a cache for several texts, each at a row of its own.

    A text's cache holds its first tokens.  ``verify`` looks at nodes behind them and leaves them
    uncommitted: ``commit`` keeps some, and whatever is not committed is forgotten at no cost.
    Plain decoding is a tree of one node, its root.
    """

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def rows(self) -> int:
        """How many texts there is room for."""

    @property
    def max_length(self) -> int:
        """Most tokens of a text, those being verified included."""

    def prefill(self, row: int, tokens: Sequence[int]) -> Output:
        """Starts the text of a row anew with these tokens.

        Returns:
            Features of all of them, logits [1, V] of the last.

        Raises:
            ValueError: there are none, more than ``max_length``, or one is not in the vocabulary.
        """

    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Output]:
        """Runs one tree per row, at most 64 nodes in all, in one pass.

        Raises:
            ValueError: too many nodes, a token outside the vocabulary, or a tree that does not
                fit behind its text.
        """

    def commit(self, row: int, path: Sequence[int]) -> None:
        """Appends nodes of the tree verified last, a path from its root, to the row's text.

        Raises:
            ValueError: the row has no verified tree, or this is no such path.
        """

    def length(self, row: int) -> int:
        """Tokens in the cache of a row."""
