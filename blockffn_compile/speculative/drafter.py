"""What drafts, and several drafters as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from blockffn_compile.speculative.tree import DraftTree


class Drafter(Protocol):
    """Follows one text and guesses how it goes on. A guess may be wrong in every way but form."""

    @property
    def name(self) -> str:
        """Short, for reports."""

    def reset(self) -> None:
        """Forgets the text: another one begins."""

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None:
        """Takes in tokens that the text has grown by.

        Args:
            tokens: [n], the next tokens of the text, now in the target's cache.
            features: [n, H], the target's final-norm outputs at these tokens; None where the
                engine has none.
        """

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        """Drafts what follows the observed tokens and ``root``.

        Args:
            root: the last token that the target chose, not yet observed.
            nodes: size of the largest tree wanted, root included, within 1..64.
            rate: tokens that a millisecond yields elsewhere: what is expected to yield less need
                not be drafted.

        Returns:
            A tree of 1 to ``nodes`` nodes; the bare root where there is nothing to propose.
        """


class FirstOf:
    """Asks one drafter after the other, until one proposes more than the root.

    The cheap ones go first: an n-gram matcher, then a model.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ValueError("at least one drafter is needed")
        self.drafters = list(drafters)
        self.name = "+".join(drafter.name for drafter in drafters)

    def reset(self) -> None:
        """See :meth:`Drafter.reset`."""
        for drafter in self.drafters:
            drafter.reset()

    def observe(self, tokens: Sequence[int], features: Tensor | None) -> None:
        """See :meth:`Drafter.observe`."""
        for drafter in self.drafters:
            drafter.observe(tokens, features)

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        """See :meth:`Drafter.propose`."""
        for drafter in self.drafters:
            tree = drafter.propose(root, nodes, rate)
            if len(tree) > 1:
                return tree
        return tree
