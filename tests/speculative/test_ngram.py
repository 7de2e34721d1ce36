from __future__ import annotations

import math
import random

import pytest

from blockffn_compile.speculative.ngram import ESCAPE, OCCURRENCES, REACH, NGramDrafter
from blockffn_compile.speculative.tree import DraftTree


def drafter(*tokens: int, max_ngram: int = 6) -> NGramDrafter:
    made = NGramDrafter(max_ngram)
    made.observe(tokens)
    return made


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Each node's tokens from the root on -> its probability."""
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        found.append((*found[tree.parents[node]], int(tree.tokens[node])))
    return {path: math.exp(p) for path, p in zip(found, tree.log_probs.tolist(), strict=True)}


def reference(text: list[int], root: int, max_ngram: int) -> dict[tuple[int, ...], float]:
    """The documented formula, by searching the text."""
    text = [*text, root]
    matches = []
    for place in range(1, len(text)):
        matched = 0
        while matched < min(max_ngram, place) and text[place - 1 - matched] == text[-1 - matched]:
            matched += 1
        if matched:
            matches.append((matched, place))
    matches = sorted(matches, reverse=True)[:OCCURRENCES]
    counts: dict[tuple[int, ...], float] = {(): 0}
    for matched, place in matches:
        for length in range(len(text[place : place + REACH]) + 1):
            path = tuple(text[place : place + length])
            counts[path] = counts.get(path, 0) + matched**2
    probs: dict[tuple[int, ...], float] = {(): 1.0}
    for path in sorted(counts, key=len):
        if path:
            probs[path] = probs[path[:-1]] * counts[path] / (counts[path[:-1]] + ESCAPE)
    return probs


def test_proposals_follow_the_formula() -> None:
    rng = random.Random(0)
    for vocab_size in (1, 2, 4, 30):
        for max_ngram in (1, 3, 6):
            text = [rng.randrange(vocab_size) for _ in range(60)]
            made = NGramDrafter(max_ngram)
            for i, root in enumerate(text):
                expected = reference(text[:i], root, max_ngram)
                found = paths(made.propose(root, 64))
                best = sorted(expected.values(), reverse=True)[:64]
                assert sorted(found.values(), reverse=True) == pytest.approx(best, rel=1e-5)
                assert all(expected[path] == pytest.approx(found[path], 1e-5) for path in found)
                made.observe([root])


def test_copies_what_followed_the_longest_match() -> None:
    tree = drafter(1, 2, 3, 4, 5, 9, 3, 7, 8, 1, 2).propose(3, 4)
    assert tree.tokens.tolist() == [3, 4, 5, 9]
    assert tree.parents.tolist() == [-1, 0, 1, 2]


def test_longer_matches_and_repeated_ones_are_more_probable() -> None:
    once = paths(drafter(1, 5, 9, 2).propose(1, 8))[(5,)]
    longer = paths(drafter(7, 1, 5, 9, 7).propose(1, 8))[(5,)]
    twice = paths(drafter(1, 5, 9, 1, 5, 8).propose(1, 8))[(5,)]
    assert once < longer
    assert once < twice


def test_different_continuations_become_siblings() -> None:
    tree = drafter(1, 5, 1, 6, 1, 6).propose(1, 64)
    assert set(tree.children(0)) == {5, 6}
    assert paths(tree)[(6,)] > paths(tree)[(5,)]


def test_only_the_latest_places_count() -> None:
    text = [1, 5] + [1, 6] * OCCURRENCES
    assert set(drafter(*text).propose(1, 64).children(0)) == {6}
    assert set(drafter(*text[:-2]).propose(1, 64).children(0)) == {5, 6}


def test_the_root_itself_can_be_what_followed() -> None:
    assert drafter(4).propose(4, 8).tokens.tolist() == [4, 4]


@pytest.mark.parametrize("text", [(), (1, 2, 3)], ids=["empty", "new root"])
def test_nothing_to_propose(text) -> None:
    tree = drafter(*text).propose(9, 64)
    assert tree.tokens.tolist() == [9]


@pytest.mark.parametrize("nodes", [1, 2, 3, 64])
def test_sizes(nodes) -> None:
    assert len(drafter(*range(20), *range(20)).propose(0, nodes)) == min(nodes, 1 + REACH)


def test_proposing_changes_nothing_and_a_reset_forgets() -> None:
    made = drafter(1, 2, 3)
    first = paths(made.propose(1, 8))
    assert paths(made.propose(1, 8)) == first
    assert len(first) > 1
    made.reset()
    assert len(made.propose(1, 8)) == 1


def test_observing_in_parts_is_observing_at_once() -> None:
    text = [1, 2, 1, 2, 3, 1, 2]
    parts = NGramDrafter()
    parts.observe(text[:3], None)
    parts.observe([], None)
    parts.observe(text[3:], None)
    assert paths(parts.propose(3, 64)) == paths(drafter(*text).propose(3, 64))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="max_ngram"):
        NGramDrafter(0)
    with pytest.raises(ValueError, match="at least one node"):
        drafter(1, 2, 3).propose(1, 0)
