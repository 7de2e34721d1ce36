from __future__ import annotations

import pytest

from blockffn_compile.speculative.drafter import FirstOf
from blockffn_compile.speculative.tree import DraftTree


class Fixed:
    """Proposes the same chain always, and notes what it is asked and told."""

    def __init__(self, name: str, tokens: list[int]) -> None:
        self.name, self.tokens = name, tokens
        self.calls: list[object] = []

    def reset(self) -> None:
        self.calls.append("reset")

    def observe(self, tokens, features) -> None:
        self.calls.append((tokens, features))

    def propose(self, root: int, nodes: int, rate: float = 0.0) -> DraftTree:
        self.calls.append((root, nodes))
        return DraftTree.chain(root, self.tokens, [0.0] * len(self.tokens))


def test_the_first_with_a_proposal_wins_and_the_rest_are_not_asked() -> None:
    empty, full, last = Fixed("a", []), Fixed("b", [3, 4]), Fixed("c", [5])
    first = FirstOf([empty, full, last])
    assert first.name == "a+b+c"
    assert first.propose(7, 16).tokens.tolist() == [7, 3, 4]
    assert empty.calls == full.calls == [(7, 16)]
    assert last.calls == []


def test_nobody_has_a_proposal() -> None:
    assert FirstOf([Fixed("a", []), Fixed("b", [])]).propose(7, 16).tokens.tolist() == [7]


def test_all_follow_the_text() -> None:
    drafters = [Fixed("a", []), Fixed("b", [1])]
    first = FirstOf(drafters)
    first.reset()
    first.observe([1, 2], None)
    for drafter in drafters:
        assert drafter.calls == ["reset", ([1, 2], None)]


def test_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one drafter"):
        FirstOf([])
