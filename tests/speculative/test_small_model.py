"""Drafting with another model: its guesses, its cache, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.small_model import ModelDrafter
from tests.speculative.tables import Always, TableEngine, plain, table

PROMPT = [3, 1, 4, 1, 5]


def drafter(engine: TableEngine | None = None, **options: int) -> ModelDrafter:
    made = ModelDrafter(engine or TableEngine(), **options)
    made.observe(PROMPT[:-1], None)
    return made


@pytest.mark.parametrize(("nodes", "drafted"), [(64, 6), (5, 4), (2, 1), (1, 0)])
def test_a_chain_is_what_the_model_would_write(nodes: int, drafted: int) -> None:
    tree = drafter(depth=6).propose(PROMPT[-1], nodes)
    assert tree.tokens.tolist() == [PROMPT[-1], *plain(PROMPT, drafted)]
    assert tree.parents.tolist() == list(range(-1, drafted))


def test_log_probabilities_are_those_of_the_model() -> None:
    tree = drafter(depth=2, width=3).propose(PROMPT[-1], 64)
    first = table(1, 5).log_softmax(-1)
    children = tree.children(0)
    assert set(children) == set(first.topk(3).indices.tolist())
    for token, node in children.items():
        assert tree.log_probs[node] == pytest.approx(float(first[token]), abs=1e-6)
        second = table(5, token).log_softmax(-1)
        for after, below in tree.children(node).items():
            expected = float(first[token] + second[after])
            assert tree.log_probs[below] == pytest.approx(expected, abs=1e-6)


def test_the_best_nodes_are_kept() -> None:
    """A smaller tree is the most probable part of a larger one."""
    whole = drafter(depth=3, width=3).propose(PROMPT[-1], 64)
    part = drafter(depth=3, width=3).propose(PROMPT[-1], 5)
    assert len(part) == 5 < len(whole)
    best = np.sort(whole.log_probs)[::-1][:5]
    np.testing.assert_allclose(np.sort(part.log_probs)[::-1], best, rtol=1e-6)


def test_proposals_leave_no_trace_in_the_text() -> None:
    engine = TableEngine()
    made = drafter(engine, depth=4, width=2)
    made.propose(PROMPT[-1], 64)
    again = made.propose(PROMPT[-1], 64)
    assert engine.texts[0] == PROMPT[:-1]
    fresh = drafter(depth=4, width=2).propose(PROMPT[-1], 64)
    assert again.tokens.tolist() == fresh.tokens.tolist()


def test_levels_that_do_not_pay_are_not_drafted() -> None:
    """The first one is; whether it pays is known only then."""
    assert drafter(depth=4).propose(PROMPT[-1], 64, rate=1e6).depths.max() == 1
    assert drafter(depth=4).propose(PROMPT[-1], 64, rate=1e-6).depths.max() == 4


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_catches_up_with_any_number_of_tokens(count: int) -> None:
    engine = TableEngine()
    made = drafter(engine)
    made.propose(PROMPT[-1], 4)
    more = [PROMPT[-1], *([7, 2, 9] * 70)][:count]
    made.observe(more, None)
    tree = made.propose(8, 4)
    assert engine.texts[0] == [*PROMPT[:-1], *more]
    assert tree.tokens.tolist() == [8, *plain([*PROMPT[:-1], *more, 8], 3)]


def test_after_a_reset_another_text_begins() -> None:
    engine = TableEngine()
    made = drafter(engine)
    made.propose(PROMPT[-1], 4)
    made.reset()
    made.observe([9, 9], None)
    assert made.propose(2, 3).tokens.tolist() == [2, *plain([9, 9, 2], 2)]
    assert engine.texts[0] == [9, 9]


@pytest.mark.parametrize(("room", "levels"), [(0, 0), (1, 1), (2, 1), (3, 2), (5, 3)])
def test_a_full_context_ends_the_tree(room: int, levels: int) -> None:
    """The second level needs the root and two nodes behind it, the third at most two more."""
    engine = TableEngine(max_length=len(PROMPT) - 1 + room)
    tree = drafter(engine, depth=3, width=2).propose(PROMPT[-1], 64)
    assert tree.depths.max() == levels


@pytest.mark.parametrize("options", [{"depth": 5}, {"depth": 3, "width": 3}], ids=str)
def test_the_same_model_guesses_right(options: dict[str, int]) -> None:
    steps = list(
        decode(
            TableEngine(),
            [PROMPT],
            60,
            drafters=lambda: [ModelDrafter(TableEngine(), **options)],
            policy=Always(64),
        )
    )
    assert [token for step in steps for token in step.tokens] == plain(PROMPT, 60)
    full = steps[1:-1]
    assert all(len(step.tokens) > 1 and step.drafter == "model" for step in full)
    if options.get("width", 1) == 1:
        assert all(len(step.tokens) == options["depth"] + 1 for step in full)


@pytest.mark.parametrize(
    ("depth", "width"), [(0, 1), (1, 0), (-1, 1), (64, 1), (16, 4), (1, 64)], ids=str
)
def test_impossible_sizes(depth: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"depth {depth} and width {width} make no tree"):
        ModelDrafter(TableEngine(), depth, width)


@pytest.mark.parametrize(("depth", "width"), [(63, 1), (9, 7), (1, 12)])
def test_largest_sizes(depth: int, width: int) -> None:
    tree = drafter(depth=depth, width=width).propose(PROMPT[-1], 64)
    assert tree.depths.max() <= depth
    assert 1 + width <= len(tree) <= 64
